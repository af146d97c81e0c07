"""Reads back what was written, and holds it against the hashes of what had been read from the source."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from qemu_blkmig.destination.hashtable import HashTable, Run
from qemu_blkmig.destination.writers import Read, Writer
from qemu_blkmig.engine.extents import Extent, Remainder, union

MOST_DIFFER = 1024
"""Extents that are told to differ at once."""
_AT_ONCE = 2 << 20
"""Bytes that are read at once, while as many are hashed."""
_SAMPLES = 128
_STRANGE, _MANY = 0.75, 8
"""The part of the samples, and their number, from which on they are another's: what was on its way when one before us
was killed is not as it was to be written either, and that may be all the data of a small disk's log."""


@dataclass(frozen=True, slots=True)
class Verified:
    """`checked`: bytes read back now. `left`: bytes still to be read back, or to be copied again before.

    `differ`: of what was checked, what is not as it was written; at most about `MOST_DIFFER` extents.
    """

    checked: int
    left: int
    differ: list[Extent]


@dataclass(frozen=True, slots=True)
class Sample:
    """A unit that was written, at byte `offset`. `holds_data`: that was data, not zeroes. `otherwise`: what lies there,
    where that is something else.
    """

    holds_data: bool
    offset: int
    otherwise: bytes | None


def are_strange(samples: Sequence[Sample]) -> bool:
    """Whether what lies there is not what was written, of data or of zeroes.

    A part of it may have been changed, and is found later; what is another's has another's data, or none.
    """
    read = Counter(each.holds_data for each in samples)
    strange = Counter(each.holds_data for each in samples if each.otherwise is not None)
    return any(strange[kind] >= max(_MANY, _STRANGE * count) for kind, count in read.items())


class ReadBack:
    """One go at what a table says was written through `writer`. Raises `OSError`, `ConnectionLost`."""

    def __init__(self, writer: Writer, table: HashTable) -> None:
        self._writer = writer
        self._table = table
        self._ahead = [memoryview(bytearray(_AT_ONCE)) for _ in range(2)]
        self._buffer = memoryview(bytearray(_AT_ONCE))
        self._zeroes = bytes(table.unit)
        self._reads: Read = writer.read
        # All that is asked of the writer is asked in this one thread.
        self._reader = ThreadPoolExecutor(max_workers=1)

    def close(self) -> None:
        """Let go of the thread that reads, when nothing is read any more."""
        self._reader.shutdown(wait=False)

    def run(self, most: int, interrupted: Callable[[], bool], below: int | None = None) -> Verified:
        """Read back about `most` bytes, at least some; fewer once `interrupted`, or when too much differs.

        `below`: nothing that lies behind that byte.
        """
        checked = 0
        differ: list[Extent] = []
        with closing(self._judged(_gather(self._table.unread(_AT_ONCE, below), most))) as judged:
            for extent, bad in judged:
                self._table.goes_on(extent.end)
                differ += bad
                checked += extent.length
                if interrupted() or len(differ) >= MOST_DIFFER:
                    break
        return Verified(checked, self._table.left, differ)

    def arrived(self, offset: int, most: int, interrupted: Callable[[], bool]) -> list[Extent]:
        """Of about `most` bytes from `offset` on, what lies there as it was to be written; fewer once `interrupted`."""
        found: Sequence[Extent] = ()
        with closing(self._judged(_gather(self._table.unread_from(offset, _AT_ONCE), most))) as judged:
            for extent, bad in judged:
                left = Remainder([extent])
                left.take_out(bad)
                found = union(found, left.rest())
                if interrupted() or len(found) >= MOST_DIFFER:
                    break
        return list(found[:MOST_DIFFER])

    def samples(self, end: int) -> list[Sample]:
        """Of what was written before byte `end`, data and zeroes, from all over."""
        runs = list(self._table.samples(end, _SAMPLES, random.Random()))
        self._expect(runs)
        nothing = self._table.digest(memoryview(self._zeroes))
        return [Sample(run.digests not in (None, nothing), run.extent.offset, self._otherwise(run)) for run in runs]

    def _otherwise(self, run: Run) -> bytes | None:
        """What lies where a unit was written, if that is something else."""
        if not list(self._judge(run, self._read_of(run))):
            return None
        return bytes(self._read(self._buffer, run.extent))

    def _judged(self, runs: Sequence[Run]) -> Generator[tuple[Extent, Sequence[Extent]], None, None]:
        """Each run's extent, and what of it is amiss; the table knows it by then."""
        self._expect(runs)
        with closing(self._reading_ahead(runs)) as read_ahead:
            for run, read in read_ahead:
                bad = union(self._judge(run, read), ())
                for extent in bad:
                    self._table.amiss(extent)
                self._table.good(run.extent)
                yield run.extent, bad

    def _expect(self, runs: Sequence[Run]) -> None:
        extents = [run.extent for run in runs if run.digests is not None]
        self._reads = self._reader.submit(self._writer.reading, extents).result()

    def _reading_ahead(self, runs: Sequence[Run]) -> Generator[tuple[Run, memoryview | None], None, None]:
        """Each run, and what was read of it; meanwhile the next one is read, and nothing any more when this is over."""
        following: Future[memoryview] | None = None
        try:
            for number, run in enumerate(runs):
                under_way, following = following or self._begin(run, number), None
                read = under_way.result() if under_way is not None else None
                if number + 1 < len(runs):
                    following = self._begin(runs[number + 1], number + 1)
                yield run, read
        finally:
            if following is not None:
                following.exception()

    def _begin(self, run: Run, number: int) -> Future[memoryview] | None:
        """Begin to read a run of data."""
        if run.digests is None:
            return None
        return self._reader.submit(self._fill, self._ahead[number % len(self._ahead)], run.extent)

    def _read_of(self, run: Run) -> memoryview | None:
        return self._read(self._buffer, run.extent) if run.digests is not None else None

    def _read(self, buffer: memoryview, extent: Extent) -> memoryview:
        return self._reader.submit(self._fill, buffer, extent).result()

    def _fill(self, buffer: memoryview, extent: Extent) -> memoryview:
        """Read an extent of at most `_AT_ONCE` bytes."""
        view = buffer[: extent.length]
        self._reads(view, extent.offset)
        return view

    def _judge(self, run: Run, read: memoryview | None) -> Iterator[Extent]:
        if read is None or run.digests is None:
            return self._nonzero_units(run.extent)
        return self._changed_units(run.extent.offset, read, run.digests)

    def _changed_units(self, offset: int, read: memoryview, digests: bytes) -> Iterator[Extent]:
        digest, size = self._table.digest, self._table.digest_size
        for number, (at, unit) in enumerate(self._units(offset, read)):
            if digest(unit) != digests[number * size : (number + 1) * size]:
                yield Extent(at, len(unit))

    def _nonzero_units(self, extent: Extent) -> Iterator[Extent]:
        """Where the image itself knows of no zeroes, by a hole say, it is read."""
        unit, known, done = self._table.unit, extent.offset, extent.offset
        holes = self._reader.submit(lambda: list(self._writer.zeroes(extent.offset, extent.length))).result()
        for hole in (*holes, Extent(extent.end, 0)):
            if hole.offset > known:
                start, end = known // unit * unit, min(extent.end, -(-hole.offset // unit) * unit)
                yield from self._unlike_zeroes(max(done, start), end)
                done = end
            known = hole.end

    def _unlike_zeroes(self, start: int, end: int) -> Iterator[Extent]:
        for at in range(start, end, _AT_ONCE):
            read = self._read(self._buffer, Extent(at, min(_AT_ONCE, end - at)))
            for place, unit in self._units(at, read):
                if bytes(unit) != self._zeroes[: len(unit)]:
                    yield Extent(place, len(unit))

    def _units(self, offset: int, read: memoryview) -> Iterator[tuple[int, memoryview]]:
        """(offset, bytes) of the units of what was read at `offset`."""
        for start in range(0, len(read), self._table.unit):
            yield offset + start, read[start : start + self._table.unit]


def _gather(unread: Iterator[Run], most: int) -> list[Run]:
    runs, gathered = [], 0
    for run in unread:
        runs.append(run)
        gathered += run.extent.length
        if gathered >= most:
            break
    return runs
