"""Extents, runs of bytes of one disk, and the algebra on them that the engine and its movers need."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """`length` bytes (> 0) from byte `offset`."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after the extent."""
        return self.offset + self.length


def clip(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
    """What of `extents` lies before byte `size`; a dirty bitmap's last granule may reach beyond the disk's end."""
    for extent in extents:
        if extent.end <= size:
            yield extent
        elif extent.offset < size:
            yield Extent(extent.offset, size - extent.offset)


def union(first: Iterable[Extent], second: Iterable[Extent]) -> Sequence[Extent]:
    """What lies in either of two ascending sequences: ascending, disjoint, neighbours joined."""
    joined: list[Extent] = []
    for extent in heapq.merge(first, second):
        if joined and extent.offset <= joined[-1].end:
            last = joined.pop()
            extent = Extent(last.offset, max(last.end, extent.end) - last.offset)
        joined.append(extent)
    return joined


def joined(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same bytes in as few extents as can be; `extents` are ascending and disjoint, and may touch each other."""
    held: Extent | None = None
    for extent in extents:
        if held is not None and held.end == extent.offset:
            held = Extent(held.offset, held.length + extent.length)
            continue
        if held is not None:
            yield held
        held = extent
    if held is not None:
        yield held


class Remainder:
    """What of some ascending, disjoint extents is not in a stream of others, which comes bit by bit, ascending too."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        self._ahead = deque(extents)
        self._left: list[Extent] = []

    def take_out(self, extents: Iterable[Extent]) -> None:
        """These are in the stream, and begin after those before them."""
        for extent in extents:
            while self._ahead and self._ahead[0].offset < extent.end:
                first = self._ahead.popleft()
                if first.offset < extent.offset:
                    self._left.append(Extent(first.offset, min(first.end, extent.offset) - first.offset))
                if first.end > extent.end:
                    self._ahead.appendleft(Extent(extent.end, first.end - extent.end))

    def rest(self) -> Sequence[Extent]:
        """What is left, now that the stream has ended."""
        return [*self._left, *self._ahead]


class Batcher:
    """Turns a stream of ascending, disjoint extents into batches, holding no more than one of them.

    Extents are rounded out to `unit` bytes, of which `volume` is a multiple, within a disk of `size` bytes, and
    neighbours are joined. A batch is ascending and disjoint too, has at most `most` extents and at most `volume`
    bytes; an extent that is longer is divided.
    """

    def __init__(self, *, most: int, volume: int, size: int, unit: int = 1) -> None:
        self._most = most
        self._volume = volume
        self._size = size
        self._unit = unit
        self._covered = 0
        self._batch: list[Extent] = []
        self._held = 0

    def feed(self, extents: Iterable[Extent]) -> Iterator[list[Extent]]:
        """Take in `extents` and give every batch that is full; iterate to the end before feeding again."""
        for extent in extents:
            for piece in _divide(self._rounded_out(extent), self._volume):
                if self._has_no_room_for(piece):
                    yield self.rest()
                self._add(piece)

    def rest(self) -> list[Extent]:
        """Give the batch begun, empty if there is none, and start a new one."""
        batch, self._batch, self._held = self._batch, [], 0
        return batch

    def _rounded_out(self, extent: Extent) -> Extent:
        """Without what the extent before it has covered; its length may be 0."""
        start = max(self._covered, extent.offset // self._unit * self._unit)
        self._covered = max(start, min(self._size, -(-extent.end // self._unit) * self._unit))
        return Extent(start, self._covered - start)

    def _has_no_room_for(self, piece: Extent) -> bool:
        if self._held + piece.length > self._volume:
            return True
        return len(self._batch) == self._most and not self._joins(piece)

    def _joins(self, piece: Extent) -> bool:
        return bool(self._batch) and self._batch[-1].end == piece.offset

    def _add(self, piece: Extent) -> None:
        if self._joins(piece):
            first = self._batch.pop()
            self._batch.append(Extent(first.offset, first.length + piece.length))
        else:
            self._batch.append(piece)
        self._held += piece.length


def _divide(extent: Extent, length: int) -> Iterator[Extent]:
    for offset in range(extent.offset, extent.end, length):
        yield Extent(offset, min(length, extent.end - offset))
