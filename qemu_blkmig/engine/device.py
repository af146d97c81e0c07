"""One disk under migration: its bulk cursor, what is owed of it, and what has been counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.ports import CopyKind, CopyReport

SECTOR = 512
"""Bytes; disks are whole sectors long (ENGINE.md, "Words")."""


@dataclass(frozen=True)
class DiskSpec:
    """A disk that takes part: the name that the ports know it by, and its size in bytes.

    Raises ValueError when the size is not a positive multiple of 512.
    """

    name: str
    size: int

    def __post_init__(self) -> None:
        if self.size <= 0 or self.size % SECTOR:
            raise ValueError(f"disk {self.name}: {self.size} bytes is not a positive multiple of {SECTOR}")


class Device:
    """The state of one disk.

    `cursor`: every byte before it has been reported by the mover in the bulk pass. `stable`: every byte before it
    has been flushed since. `owed`: bytes harvested and neither retired nor restored. `recorded`: bytes in the
    recording as last seen. The rest are counters of bytes, and of the rounds that this disk had a part in.
    """

    def __init__(self, spec: DiskSpec) -> None:
        self.name = spec.name
        self.size = spec.size
        self.cursor = 0
        self.stable = 0
        self.owed = 0
        self.recorded = 0
        self.copied = 0
        self.zeroed = 0
        self.skipped = 0
        self.copied_dirty = 0
        self.rounds = 0

    @property
    def bulk_done(self) -> bool:
        """Whether the whole bulk pass has arrived and is stable."""
        return self.stable == self.size

    def next_range(self, length: int) -> Extent:
        """The range that the bulk pass has to copy next, of at most `length` bytes."""
        return Extent(self.cursor, min(length, self.size - self.cursor))

    def settle(self, extents: Sequence[Extent], kind: CopyKind, report: CopyReport) -> None:
        """Count what the mover reported; in the bulk pass the cursor moves on, and only here."""
        self.copied += report.copied
        self.zeroed += report.zeroed
        self.skipped += report.skipped
        if kind is CopyKind.BULK:
            self.cursor = extents[-1].end
        else:
            self.copied_dirty += report.copied

    def secured(self) -> None:
        """All that the bulk pass has copied so far has been flushed."""
        self.stable = self.cursor

    def unsecured(self) -> None:
        """What the bulk pass has copied since the last flush may be lost: it is to be copied again."""
        self.cursor = self.stable

    def harvested(self, length: int) -> None:
        """`length` bytes went from the recording into a round."""
        self.owed = length
        self.recorded = 0

    def retired(self) -> None:
        """What was harvested is copied and stable."""
        self.rounds += bool(self.owed)
        self.owed = 0

    def restored(self) -> None:
        """What was harvested is back in the recording; the sum may count bytes twice until the log is asked again."""
        self.recorded = min(self.size, self.recorded + self.owed)
        self.owed = 0
