"""One disk under migration: its bulk cursor, what is owed of it, and what has been counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qemu_blkmig.engine.extents import Extent, union
from qemu_blkmig.engine.heat import Heat
from qemu_blkmig.engine.ports import CopyKind, CopyReport

SECTOR = 512
"""Bytes; disks are whole sectors long (ENGINE.md, "Words")."""


@dataclass(frozen=True)
class DiskSpec:
    """A disk that takes part: the name that the ports know it by, and its size in bytes.

    `unit`: bytes that dirty extents are rounded out to. Raises ValueError when size or unit is not a positive
    multiple of 512.
    """

    name: str
    size: int
    unit: int = SECTOR

    def __post_init__(self) -> None:
        if self.size <= 0 or self.size % SECTOR:
            raise ValueError(f"disk {self.name}: {self.size} bytes is not a positive multiple of {SECTOR}")
        if self.unit <= 0 or self.unit % SECTOR:
            raise ValueError(f"disk {self.name}: a unit of {self.unit} bytes is not a positive multiple of {SECTOR}")


class Device:
    """The state of one disk.

    `cursor`: every byte before it has been reported by the mover in the bulk pass. `stable`: every byte before it has
    been flushed since. `known`: what one before us has brought over beyond that, and is stable (ascending, disjoint).
    `resumed`: bytes that one before us has brought over. `owed`: bytes harvested and neither retired nor restored.
    `recorded`: bytes in the recording as last seen. `amiss`: what is to be copied again because it was found wrong at
    the destination; `mending`: the part of it that the round under way has taken. `put_off`: what rounds have left to
    later ones, and a harvested round that is kept for it still shows, `left_off` bytes; `kept`: bytes that one holds in
    all; `putting_off`: what the round under way leaves. `heat` knows what is worth that.
    The rest are counters of bytes, and of the rounds that this disk had a part in.
    """

    def __init__(self, spec: DiskSpec, granule: int) -> None:
        self.name = spec.name
        self.size = spec.size
        self.unit = spec.unit
        self.cursor = 0
        self.stable = 0
        self.resumed = 0
        self.known: Sequence[Extent] = ()
        self.owed = 0
        self.recorded = 0
        self.amiss: Sequence[Extent] = ()
        self.mending: Sequence[Extent] = ()
        self.heat = Heat(spec.size, granule)
        self.put_off: Sequence[Extent] = ()
        self.putting_off: list[Extent] = []
        self.left_off = 0
        self.kept = 0
        self.copied = 0
        self.zeroed = 0
        self.skipped = 0
        self.copied_dirty = 0
        self.rounds = 0

    @property
    def bulk_done(self) -> bool:
        """Whether the whole bulk pass has arrived and is stable."""
        return self.stable == self.size

    @property
    def to_harvest(self) -> int:
        """Bytes that a round has to bring over if it begins now, as last seen."""
        return self.recorded + _length(self.amiss) + self.left_off

    @property
    def dirty(self) -> int:
        """Bytes owed beyond the bulk pass, at most: what was put off and has been written since counts twice."""
        return self.owed + _length(self.mending) + self.to_harvest

    def expected(self, again: float) -> int:
        """`dirty`, if the part `again` of what was put off has been written since, as far as that much was written."""
        return self.dirty - min(int(again * self.left_off), self.owed + self.recorded)

    def checked_start(self, stable: int) -> int:
        """`stable`. Raises ValueError where a bulk pass cannot be taken up."""
        if not 0 <= stable <= self.size or stable % SECTOR:
            raise ValueError(f"disk {self.name}: {stable} of {self.size} bytes cannot be stable")
        return stable

    def checked_known(self, known: Sequence[Extent], stable: int) -> Sequence[Extent]:
        """`known`. Raises ValueError where it is not what a bulk pass that begins at `stable` has before it."""
        end = stable
        for extent in known:
            if extent.offset < end or extent.length <= 0 or extent.end > self.size:
                raise ValueError(f"disk {self.name}: {extent} beyond byte {end} of {self.size} cannot be known")
            end = extent.end
        return known

    def resume(self, stable: int, known: Sequence[Extent]) -> None:
        """Take the bulk pass up, of which `stable` bytes are known to be flushed, and what is `known` beyond."""
        self.cursor = self.stable = stable
        self.known = known
        self.resumed = stable + _length(known)

    def settle(self, extents: Sequence[Extent], kind: CopyKind, report: CopyReport) -> None:
        """Count what the mover reported; in the bulk pass the cursor moves on, and only here."""
        self.copied += report.copied
        self.zeroed += report.zeroed
        self.skipped += report.skipped
        if kind is CopyKind.BULK:
            self.cursor = extents[-1].end
        elif self.bulk_done:
            self.copied_dirty += report.copied

    def compared(self, extent: Extent, equal: int) -> None:
        """The bulk pass has settled `extent`, of which `equal` bytes were found at the destination already."""
        self.skipped += equal
        self.cursor = extent.end

    def secured(self, stable: int) -> None:
        """Of what the bulk pass has copied, `stable` bytes have been flushed."""
        self.stable = stable

    def unsecured(self) -> None:
        """What the bulk pass has copied since the last flush may be lost: it is to be copied again."""
        self.cursor = self.stable

    def harvested(self, length: int) -> None:
        """`length` bytes went from the recording into a round."""
        self.owed = length
        self.recorded = 0
        self.mending, self.amiss = self.amiss, ()
        self.putting_off = []
        self.heat.begin_round()

    def retired(self) -> None:
        """What was harvested, or put off before, is copied and stable, but for what is put off now."""
        self.rounds += bool(self.owed or self.mending)
        self.kept = self.owed if self.putting_off else 0
        self._put_off(self.putting_off)
        self.owed = 0
        self.mending = ()

    def found_amiss(self, extents: Sequence[Extent]) -> None:
        """The extents (ascending, disjoint) are to be copied again."""
        self.amiss = union(self.amiss, extents)

    def unmended(self) -> None:
        """The round under way does not mend what it had taken."""
        self.amiss, self.mending = union(self.amiss, self.mending), ()

    def restored(self) -> None:
        """What was harvested is back in the recording; the sum may count bytes twice until the log is asked again."""
        self.recorded = min(self.size, self.recorded + self.owed)
        self.owed = 0
        self.putting_off = []

    def recorded_again(self) -> None:
        """So is the round that was kept for what is put off."""
        self.recorded = min(self.size, self.recorded + self.kept)
        self._put_off(())
        self.kept = 0

    def _put_off(self, extents: Sequence[Extent]) -> None:
        self.put_off, self.putting_off = extents, []
        self.left_off = _length(extents)


def _length(extents: Sequence[Extent]) -> int:
    return sum(extent.length for extent in extents)
