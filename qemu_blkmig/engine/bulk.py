"""The bulk phase: one pass over the disks, from sector 0 to the end, that can be taken up again where it failed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qemu_blkmig.engine.carrier import Carrier
from qemu_blkmig.engine.device import Device
from qemu_blkmig.engine.extents import Batcher, Extent, Remainder
from qemu_blkmig.engine.ports import Comparer, CopyKind, CopyReport
from qemu_blkmig.engine.stride import Stride

AHEAD = 3
"""Ranges that may be under way or not flushed yet: one is flushed, one copied, the next one asked for already."""
UNSTABLE_PART, UNSTABLE = 32, 4 << 20
"""Of a disk no more than this part is under way or not flushed, but so many bytes: a kill has it to copy again."""

Settle = Callable[[float], None]
"""Counts a range that has arrived, so many seconds after the one before it."""


@dataclass(frozen=True)
class BulkPass:
    """Copies range after range; no more is known of a disk than where its cursor stands.

    `room`: most bytes of a disk that may be under way, or not flushed yet, at once (less of a small one), or `AHEAD`
    ranges where that is more; each range is flushed while the next ones are copied, so that a long way never runs dry.
    0: one range after the other, and a flush, for which everything waits, after `interval` bytes (told for a disk's
    size).

    A range is of at most `range_size` bytes, unless a `stride`, which is made for each disk, tells. With a `comparer`
    the destination holds an older copy, and just what differs is sent: as DIRTY, because nothing may be skipped there
    and nothing is known to be zero. At most `batch` extents go into one request.

    What a disk is known to have beyond its cursor is left out: all chunks of `chunk_size` bytes as far as that reaches
    are one range.

    Copied is not yet stable: no bitmap remembers what the pass has written. So a range is done only once a flush has
    succeeded that began after the range was reported, and what cannot be flushed is copied again. `on_stable` is told,
    each time, the disk and how far it is stable.
    """

    carrier: Carrier
    range_size: int
    batch: int
    room: int
    interval: Callable[[int], int]
    on_stable: Callable[[str, int], None]
    comparer: Comparer | None
    chunk_size: int
    stride: Callable[[], Stride] | None = None

    async def run(self, devices: Sequence[Device]) -> None:
        """Copy what the pass has not yet copied of the disks, and flush it; raises what the mover raises.

        Returns or raises once nothing is under way. A disk may be begun when all of the one before it is asked for.
        """
        left = deque(DiskPass(self, device) for device in devices if not device.bulk_done)
        begun: list[DiskPass] = []
        try:
            while left or begun:
                for each in begun:
                    each.begin()
                while left and (not begun or (len(begun) == 1 and begun[0].is_draining)):
                    begun.append(left.popleft())
                    begun[-1].begin()
                tasks = [task for each in begun for task in each.awaited]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for each in begun:
                    each.take_note()
                begun = [each for each in begun if not each.is_done]
        except BaseException as error:
            cancellation = error if isinstance(error, asyncio.CancelledError) else None
            for each in begun:
                cancellation = await each.give_up(error, hurried=cancellation is not None) or cancellation
            if cancellation is not None and cancellation is not error:
                raise cancellation from error
            raise


@dataclass(frozen=True)
class _Flight:
    """A range that is under way; `alone`: no other may be beside it."""

    extent: Extent
    began: float
    task: asyncio.Task[Settle]
    alone: bool


class DiskPass:
    """The pass over one disk. Ranges are counted in their order, whichever arrives first: the cursor leaves no gap."""

    def __init__(self, way: BulkPass, device: Device) -> None:
        self._way = way
        self._device = device
        self._carrier = way.carrier
        self._interval = way.interval(device.size)
        self._stride = way.stride() if way.stride is not None else None
        self._room = min(way.room, max(device.size // UNSTABLE_PART, UNSTABLE))
        self._next = device.cursor
        self._flights: deque[_Flight] = deque()
        self._flush: asyncio.Task[int] | None = None
        self._arrived = 0.0

    @property
    def is_done(self) -> bool:
        """Whether all of the disk is brought over, and stable."""
        return self._device.bulk_done

    @property
    def is_draining(self) -> bool:
        """Whether all that is left is under way, or to be flushed, while something else may begin."""
        return bool(self._way.room) and self._next == self._device.size

    @property
    def awaited(self) -> Sequence[asyncio.Task[Any]]:
        """What there is to take note of once one of them is over."""
        flush = [self._flush] if self._flush is not None else []
        return [*(flight.task for flight in [*self._flights][:1]), *flush]

    def take_note(self) -> None:
        """Of what is over; raises what it raised."""
        self._note_flush()
        self._settle()

    def begin(self) -> None:
        """Begin all that may begin now. Raises MigrationError when halted."""
        while self._next < self._device.size and self._has_room():
            self._carrier.check_halted(self._device)
            reach = self._known_reach()
            extent = Extent(self._next, reach or min(self._length(), self._device.size - self._next))
            task = asyncio.create_task(self._bring_unknown(extent) if reach else self._bring(extent))
            self._flights.append(_Flight(extent, self._carrier.now(), task, bool(reach)))
            self._next = extent.end
        if self._flush is None and self._is_flush_due():
            self._flush = asyncio.create_task(self._secure())

    def _known_reach(self) -> int:
        """Bytes from the next one to the end of the last chunk that is known to be there, if in part; else 0."""
        known, chunk = self._device.known, self._way.chunk_size
        end = -(-known[-1].end // chunk) * chunk if known else 0
        return max(0, min(self._device.size, end) - self._next)

    def _length(self) -> int:
        if self._stride is None:
            return min(self._way.range_size, self._interval)
        return self._stride.length(self._device.size, self._interval)

    def _has_room(self) -> bool:
        if self._flights and self._flights[-1].alone:
            return False
        if not self._way.room:
            return not (self._flights or self._flush or self._is_flush_due())
        length = self._length()
        return self._next + length - self._device.stable <= max(self._room, AHEAD * length)

    def _is_flush_due(self) -> bool:
        device = self._device
        if self._way.room:
            return device.cursor > device.stable
        unflushed = device.cursor - device.stable
        return not self._flights and (unflushed >= self._interval or 0 < unflushed == device.size - device.stable)

    async def _bring(self, extent: Extent) -> Settle:
        device, way = self._device, self._way
        if way.comparer is None:
            report = await self._carrier.bring(device, [extent], CopyKind.BULK)
            return lambda seconds: self._carrier.settle(device, [extent], CopyKind.BULK, report, seconds)
        sent = 0
        for batch in self._batches(await way.comparer.differing(device.name, extent)):
            await self._carrier.copy(device, batch, CopyKind.DIRTY)
            sent += sum(each.length for each in batch)
        return lambda _seconds: self._carrier.compared(device, extent, max(0, extent.length - sent))

    async def _bring_unknown(self, extent: Extent) -> Settle:
        """What of the range is not known to be there."""
        device, left = self._device, Remainder([extent])
        left.take_out(device.known)
        copied = zeroed = skipped = 0
        seconds = 0.0
        for batch in self._batches(left.rest()):
            report = await self._carrier.bring(device, batch, CopyKind.BULK)
            copied += report.copied
            zeroed += report.zeroed
            skipped += report.skipped
            seconds += report.seconds
        whole = CopyReport(copied, zeroed, skipped, seconds)
        return lambda since_last: self._carrier.settle(device, [extent], CopyKind.BULK, whole, since_last)

    def _batches(self, extents: Sequence[Extent]) -> Iterator[Sequence[Extent]]:
        batcher = Batcher(
            most=self._way.batch, volume=self._way.range_size, size=self._device.size, unit=self._device.unit
        )
        yield from filter(None, (*batcher.feed(extents), batcher.rest()))

    def _settle(self) -> None:
        """Count what has arrived; raises what the first range raised that has not."""
        while self._flights and self._flights[0].task.done():
            settle = self._flights[0].task.result()
            flight, now = self._flights.popleft(), self._carrier.now()
            seconds, self._arrived = now - max(flight.began, self._arrived), now
            settle(seconds)
            if self._stride is not None and not flight.alone:
                self._stride.took(flight.extent.length, seconds)

    async def _secure(self) -> int:
        """How far the disk is stable: what arrives while the flush goes on is for the next one."""
        reported = self._device.cursor
        await self._carrier.flush(self._device)
        return reported

    def _note_flush(self) -> None:
        """Take note of a flush that is over; raises what it raised.

        After a failure never again: a second fsync succeeds though the first one dropped the data, of ranges that
        were under way, too.
        """
        if self._flush is None or not self._flush.done():
            return
        flush, self._flush = self._flush, None
        try:
            stable = flush.result()
        except BaseException:
            self._device.unsecured()
            raise
        self._device.secured(stable)
        self._way.on_stable(self._device.name, stable)

    async def give_up(self, error: BaseException, *, hurried: bool) -> asyncio.CancelledError | None:
        """After `error`, of this disk or another: end what is under way, and learn what of it is certain.

        `hurried`: the caller was cancelled. Returns the cancellation that has come meanwhile.
        """
        cancellation = await self._end_flights(hurried=hurried)
        doubtful = not hurried or any(_failed(flight.task) for flight in self._flights)
        try:
            self._note_flush()
            if doubtful and not (hurried or cancellation or self._carrier.halted):
                await self._secure_after()
                doubtful = False
        except asyncio.CancelledError as another:
            cancellation = another
        except Exception as flaw:
            error.add_note(f"the flush failed as well ({flaw!r}): the pass goes on at byte {self._device.cursor}")
        if doubtful and not self._carrier.halted:
            self._device.unsecured()
        return cancellation

    async def _end_flights(self, *, hurried: bool) -> asyncio.CancelledError | None:
        """Nothing is under way any more; the cancellation that came meanwhile. A flush goes on unless `hurried`."""
        cancellation: asyncio.CancelledError | None = None
        for flight in self._flights:
            flight.task.cancel()
        flush = [self._flush] if self._flush is not None else []
        tasks: list[asyncio.Task[Any]] = [*(flight.task for flight in self._flights), *flush]
        while waiting := [task for task in tasks if not task.done()]:
            if self._flush is not None and (hurried or cancellation is not None):
                self._flush.cancel()
            try:
                await asyncio.wait(waiting)
            except asyncio.CancelledError as another:
                cancellation = another
        return cancellation

    async def _secure_after(self) -> None:
        """Learn whether the writer still has what it reported: one that died may have taken unflushed data along."""
        if self._device.cursor == self._device.stable:
            return
        try:
            stable = await self._secure()
        except BaseException:
            self._device.unsecured()
            raise
        self._device.secured(stable)
        self._way.on_stable(self._device.name, stable)


def _failed(task: asyncio.Task[Settle]) -> bool:
    return not task.cancelled() and task.exception() is not None
