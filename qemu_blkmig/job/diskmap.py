"""When, and how often, each part of a disk was copied: maps of bounded size, drawn while the mover carries the bytes.

A map is some hundred KiB whatever the disk's size and the job's length: cells of the disk, and a coarse picture of its
bands over time, whose time slots double in length whenever they run out.
"""

from __future__ import annotations

import asyncio
import operator
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence

import msgspec

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.ports import CopyKind, CopyReport, Mover

CELLS = 2048
"""Cells of a disk at most."""
LEAST_CELL = 64 << 10
"""Bytes of a cell at least: less than QEMU notes writes in by default tells nothing."""
BANDS, SLOTS = 128, 128
"""Parts of the disk, and of the time, that the picture has."""
SLOT = 0.125
"""Seconds of a time slot at first."""
UNIT = 1 << 10
"""Bytes that the picture counts in."""


class Cells(msgspec.Struct, frozen=True):
    """A map as it is kept, its arrays compressed. `cell`: bytes; `slot`: seconds; `began`: seconds since 1970."""

    cell: int
    slot: float
    began: float
    passes: bytes
    sent: bytes
    picture: bytes


class DiskMap:
    """One disk's map.

    `passes`: by cell, how often something of it was copied; a pass over the disk, or a dirty round, counts once.
    `sent`: by cell, KiB that were sent for it, of a whole range evenly. `picture`: KiB sent by time slot and, within
    each, by band; its last slot that is used is as many before now as the job has been at work since, `began` as many
    before that (seconds since 1970).
    """

    def __init__(self, size: int, began: float) -> None:
        self.size = size
        self.cell = LEAST_CELL
        while self.cell * CELLS < size:
            self.cell *= 2
        count = -(-size // self.cell)
        self.began = began
        self.slot = SLOT
        self.passes = array("I", bytes(4 * count))
        self.sent = array("d", bytes(8 * count))
        self.picture = array("d", bytes(8 * BANDS * SLOTS))
        self._reached = 0

    def bulk(self, extent: Extent, share: float, began: float, ended: float) -> None:
        """A range of a first pass was gone over from `began` to `ended`; `share` of its bytes had to be sent."""
        first, last = extent.offset // self.cell, (extent.end - 1) // self.cell
        for cell in range(first, last + 1):
            start, end = max(extent.offset, cell * self.cell), min(extent.end, (cell + 1) * self.cell)
            sent = (end - start) * share / UNIT
            self.passes[cell] += start == cell * self.cell
            self.sent[cell] += sent
            when = began + (ended - began) * (start - extent.offset) / extent.length
            self.picture[self._column(when) + cell * BANDS // len(self.passes)] += sent

    def dirty(self, extents: Sequence[Extent], when: float) -> None:
        """A batch of a round, ascending, is copied from `when` on."""
        size, passes, sent, picture = self.cell, self.passes, self.sent, self.picture
        column, bands, count = self._column(when), BANDS, len(passes)
        before = -1 if extents[0].offset < self._reached else (self._reached - 1) // size
        for extent in extents:
            offset, end = extent.offset, extent.offset + extent.length
            while offset < end:
                cell = offset // size
                until = min(end, (cell + 1) * size)
                amount = (until - offset) / UNIT
                if cell != before:
                    passes[cell] += 1
                    before = cell
                sent[cell] += amount
                picture[column + cell * bands // count] += amount
                offset = until
        self._reached = extents[-1].end

    def _column(self, when: float) -> int:
        """Where the time slot begins in the picture; earlier than the first is the first."""
        slot = int((when - self.began) / self.slot)
        while slot >= SLOTS:
            self._halve()
            slot = int((when - self.began) / self.slot)
        return max(0, slot) * BANDS

    def _halve(self) -> None:
        """Two time slots become one each, in place: whoever draws holds the picture."""
        self.slot *= 2
        picture = self.picture
        for slot in range(SLOTS // 2):
            at = 2 * slot * BANDS
            pair = map(operator.add, picture[at : at + BANDS], picture[at + BANDS : at + 2 * BANDS])
            picture[slot * BANDS : (slot + 1) * BANDS] = array("d", pair)
        picture[SLOTS // 2 * BANDS :] = array("d", bytes(8 * BANDS * (SLOTS // 2)))

    def kept(self) -> Cells:
        """What is to be kept of it."""
        passes, sent, picture = (_packed(each) for each in (self.passes, self.sent, self.picture))
        return Cells(self.cell, self.slot, self.began, passes, sent, picture)

    @property
    def used(self) -> int:
        """Time slots up to the last one in which something was sent."""
        slots = range(SLOTS, 0, -1)
        return next((slot for slot in slots if any(self.picture[(slot - 1) * BANDS : slot * BANDS])), 0)

    def go_on(self, when: float) -> None:
        """The job is resumed: the time in which it rested is left out of the picture."""
        self.began = when - self.used * self.slot

    @classmethod
    def of(cls, size: int, cells: Cells) -> DiskMap | None:
        """A map that was kept; None where it is not one of a disk of `size` bytes."""
        made = cls(size, cells.began)
        if made.cell != cells.cell or not cells.slot > 0:
            return None
        made.slot = cells.slot
        try:
            for held, packed in ((made.passes, cells.passes), (made.sent, cells.sent), (made.picture, cells.picture)):
                _unpack(held, packed)
        except (zlib.error, ValueError):
            return None
        return made


class Maps:
    """The maps of a job's disks, and what becomes of them; `keep` is given what is to be kept, by disk."""

    def __init__(self, keep: Callable[[str, Cells], None], now: Callable[[], float] = time.time) -> None:
        """`now`: seconds since 1970."""
        self._keep = keep
        self._now = now
        self._maps: dict[str, DiskMap] = {}

    def begin(self, sizes: Mapping[str, int], kept: Mapping[str, Cells]) -> None:
        """Maps of disks of these sizes; those that a job had `kept` before it was resumed are gone on with."""
        for disk, size in sizes.items():
            earlier = DiskMap.of(size, kept[disk]) if disk in kept else None
            self._maps[disk] = earlier or DiskMap(size, self._now())
            if earlier is not None:
                earlier.go_on(self._now())

    def keep(self) -> None:
        """Have all of them kept as they are now."""
        for disk, each in self._maps.items():
            self._keep(disk, each.kept())

    def watched(self, mover: Mover) -> Mover:
        """`mover`, and what it copies is noted."""
        return _Watched(mover, self._maps, self._now)


class _Watched:
    """Implements `engine.ports.Mover`: a batch of a round is noted while the mover waits for the destination, not after
    it: the guest may be paused."""

    def __init__(self, mover: Mover, maps: Mapping[str, DiskMap], now: Callable[[], float]) -> None:
        self._mover = mover
        self._maps = maps
        self._now = now

    async def copy(self, disk: str, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        """See `Mover`."""
        began = self._now()
        if kind is CopyKind.DIRTY:
            asyncio.get_running_loop().call_soon(self._maps[disk].dirty, extents, began)
        report = await self._mover.copy(disk, extents, kind)
        if kind is CopyKind.BULK:
            ended = self._now()
            share = report.copied / sum(extent.length for extent in extents)
            for extent in extents:
                self._maps[disk].bulk(extent, share, began, ended)
        return report

    async def flush(self, disk: str) -> None:
        """See `Mover`."""
        await self._mover.flush(disk)

    async def set_bandwidth(self, rate: int | None) -> None:
        """See `Mover`."""
        await self._mover.set_bandwidth(rate)


def _packed(held: array[int] | array[float]) -> bytes:
    if sys.byteorder == "big":
        held = held[:]
        held.byteswap()
    return zlib.compress(held, 1)


def _unpack(into: array[int] | array[float], packed: bytes) -> None:
    """Raises `ValueError`, `zlib.error` where it is not as long as it has to be."""
    plain = zlib.decompressobj().decompress(packed, len(into) * into.itemsize + 1)
    with memoryview(into) as view:
        view.cast("B")[:] = plain
    if sys.byteorder == "big":
        into.byteswap()
