"""Which places of a disk the guest writes again and again: they are put off, as long as that fits the pause.

A place that is dirty in nearly every round is dirty again by the next one, whether it was copied or not. So it is
copied once, in the end. What is put off stays owed all the while; `engine.dirty` sees to that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from qemu_blkmig.engine.extents import Extent

CELLS = 1 << 20
"""Bytes of memory for a disk at most. On a larger disk granules that are so many apart share a cell: one of them may
be taken for as hot as the other, and is then copied a round later than it need be, no more."""
PIECE = 4096
"""Granules that are looked at together."""
ROUNDS = 4
"""The last rounds that tell how hot a place is: in how many of them it was dirty is its rank."""
LEAST_RANK = 2
"""A place must have been dirty in more than one round."""
MOST_EXTENTS = 1 << 16
"""Extents that are put off at most, on all disks together: they are held in memory."""

_AGED = bytes(value << 1 & 0xFF for value in range(256))
_DIRTIED = bytes(value | 1 for value in range(256))
_RANK = bytes((value & (1 << ROUNDS) - 1).bit_count() for value in range(256))


class Heat:
    """In which of the last rounds each granule of a disk was dirty: a bit for each round, the latest the lowest."""

    def __init__(self, size: int, granule: int) -> None:
        """Both in bytes."""
        self.granule = granule
        self._cells = bytearray(min(CELLS, -(-size // granule)))

    def begin_round(self) -> None:
        """What is noted from now on belongs to another round."""
        self._cells = self._cells.translate(_AGED)

    def note(self, extent: Extent) -> Iterable[tuple[Extent, int]]:
        """`extent` is dirty in this round; its parts in order, each with the rank that all of it has now."""
        first = extent.offset // self.granule
        if extent.offset + extent.length <= (first + 1) * self.granule:
            # By far the most common, and worth its own way: a round may have a million of them.
            cell = first % len(self._cells)
            self._cells[cell] = value = _DIRTIED[self._cells[cell]]
            return ((extent, _RANK[value]),)
        return self._parts(extent, first, -(-extent.end // self.granule))

    def _parts(self, extent: Extent, first: int, last: int) -> Iterator[tuple[Extent, int]]:
        for start in range(first, last, PIECE):
            ranks = self._note(start, min(start + PIECE, last))
            for begin, end, rank in _runs(ranks):
                offset = max(extent.offset, (start + begin) * self.granule)
                yield Extent(offset, min(extent.end, (start + end) * self.granule) - offset), rank

    def _note(self, first: int, last: int) -> bytearray:
        ranks = bytearray()
        while first < last:
            at = first % len(self._cells)
            cells = slice(at, min(len(self._cells), at + last - first))
            self._cells[cells] = self._cells[cells].translate(_DIRTIED)
            ranks += self._cells[cells].translate(_RANK)
            first += cells.stop - at
        return ranks


def _runs(ranks: bytearray) -> Iterator[tuple[int, int, int]]:
    """Runs of one value: first, one after the last, value."""
    begin = 0
    for rank, run in itertools.groupby(ranks):
        end = begin + sum(1 for _ in run)
        yield begin, end, rank
        begin = end


class Sieve:
    """Divides what a round holds into what is copied now and what is put off: the hottest, at most `room` bytes.

    Nobody knows how much of it is hot before all of it was seen. So what a round held of each rank tells the next one
    from which rank on things fit; and if that was wrong, what comes after the room is full is copied. `seen`: bytes
    by rank.
    """

    def __init__(self, room: int, before: Sequence[int] = ()) -> None:
        """`before`: what the last round's sieve has seen; empty if there was none."""
        self._room = room if before else 0
        self._extents = MOST_EXTENTS
        self._least = _least_that_fits(room, before)
        self.seen = [0] * (ROUNDS + 1)

    def sift(self, heat: Heat, extents: Iterable[Extent], put_off: list[Extent]) -> Iterator[Extent]:
        """What of `extents`, which are dirty in this round, is copied now; the rest is added to `put_off`."""
        for extent in extents:
            for part, rank in heat.note(extent):
                self.seen[rank] += part.length
                if rank < self._least or not self._extents:
                    yield part
                    continue
                kept = min(part.length, self._room // heat.granule * heat.granule)
                if kept:
                    self._room -= kept
                    self._extents -= 1
                    put_off.append(Extent(part.offset, kept))
                if kept < part.length:
                    yield Extent(part.offset + kept, part.length - kept)


def _least_that_fits(room: int, before: Sequence[int]) -> int:
    """The lowest rank that is put off."""
    total = 0
    for rank in range(len(before) - 1, LEAST_RANK - 1, -1):
        total += before[rank]
        if total > room:
            return min(ROUNDS, rank + 1)
    return LEAST_RANK
