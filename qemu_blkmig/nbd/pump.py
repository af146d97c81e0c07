"""The data loop: reads the pieces of a plan with several requests in flight and hands what arrives to a sink.

One thread, one poll over the source's connections and the sink's. Memory is bounded: per connection `requests` of
`request_size` bytes, and for requests of at most `SMALL` bytes a room of their own, because small scattered extents
would otherwise wait for a round trip each. Nothing is in flight any more when `run` returns or raises.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qemu_blkmig import errors
from qemu_blkmig.nbd.connection import Connection
from qemu_blkmig.nbd.control import Cancelled, Control
from qemu_blkmig.nbd.plan import Action, Piece, Plan
from qemu_blkmig.nbd.throttle import Throttle

SMALL = 128 << 10
SMALL_ROOM = 2 << 20
"""Bytes that small requests have in flight on a connection to a near source."""
ZERO_PIECE = 64 << 20
"""Most bytes that are zeroed at once, so that a cancel is heard."""

_PATIENCE = 5.0
_THROTTLED_POLL = 0.25
_RETRY = 64 << 10
_LEAST_OF_ROOM = 8 << 10


class _Slots:
    """Buffers that stay: large ones that are given back to the system are faulted in again."""

    def __init__(self, count: int, size: int) -> None:
        self._free = [bytearray(size) for _ in range(count)]

    def take(self, _length: int) -> bytearray | None:
        return self._free.pop() if self._free else None

    def give_back(self, buffer: bytearray) -> None:
        self._free.append(buffer)


class _Room:
    """So many bytes at once, in buffers of any length; the smallest count for more, so that they are not countless."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, length: int) -> bytearray | None:
        needed = max(length, _LEAST_OF_ROOM)
        if needed > self._left:
            return None
        self._left -= needed
        return bytearray(length)

    def give_back(self, buffer: bytearray) -> None:
        self._left += max(len(buffer), _LEAST_OF_ROOM)


class Lease:
    """The bytes of one piece that was read; `release` gives their memory back."""

    def __init__(self, memory: _Slots | _Room, buffer: bytearray, piece: Piece) -> None:
        self._memory = memory
        self._buffer = buffer
        self.piece = piece
        self.view = memoryview(buffer)[: piece.length]

    def release(self) -> None:
        """Nobody reads or writes the bytes any more."""
        self._memory.give_back(self._buffer)


class Driven(Protocol):
    """What a poll loop waits for and drives: an NBD connection, or whatever else a sink waits for."""

    @property
    def descriptor(self) -> int:
        """What `register` has polled, if anything."""

    def register(self, poller: select.poll) -> object:
        """Have `poller` watch for it."""

    def drive(self) -> None:
        """Do what it is ready for, without waiting."""


class Sink(Protocol):
    """Where the pieces go. Its methods keep the first failure in `failure` instead of raising."""

    failure: Exception | None

    @property
    def connections(self) -> Sequence[Driven]:
        """What the loop has to drive for it."""

    @property
    def under_way(self) -> int:
        """Operations that were begun and are not over."""

    def data(self, lease: Lease) -> None:
        """Take over what was read; release the lease in the end."""

    def pass_over(self, piece: Piece) -> None:
        """A piece that needs no reading: ZERO or SKIP."""

    def is_nothing(self, zeroes: Piece) -> bool:
        """Whether nothing is to be done for these zeroes, so that they may be passed over at once."""

    def settle(self) -> None:
        """Take note of the operations that are over."""


@dataclass(frozen=True)
class Limits:
    """In flight on a connection at most: `requests` of `request_size` bytes, and `small` bytes of small ones."""

    requests: int
    request_size: int
    small: int = SMALL_ROOM


class Pump:
    """The source side of one disk, for one copy after the other."""

    def __init__(self, disk: str, connections: Sequence[Connection], limits: Limits, throttle: Throttle,
        *, unit: int = 1,
    ) -> None:  # fmt: skip
        """Data is read in pieces of whole units of `unit` bytes. Raises `Refused` where a request is too small."""
        self._disk = disk
        self._connections = list(connections)
        self._request_size = min([limits.request_size, *(each.request_limit for each in connections)])
        self._unit = unit
        if self._request_size % unit:
            what = f"a request of {self._request_size} bytes does not hold whole units of {unit} bytes"
            raise errors.Refused(what, disk=disk)
        self._throttle = throttle
        self._large = _Slots(limits.requests * len(connections), self._request_size)
        self._small = _Room(limits.small * len(connections))
        self._busy = [0] * len(connections)
        self._arrived: list[tuple[tuple[Lease, int], int]] = []
        self._failed: list[Lease] = []
        self._failure: Exception | None = None

    @property
    def request_size(self) -> int:
        """Bytes of the largest request that is made."""
        return self._request_size

    def run(self, plan: Plan, sink: Sink, control: Control) -> None:
        """Carry out the plan.

        Raises `SourceReadError` with the exact offset, `ConnectionLost`, `Cancelled`, or the sink's failure.
        """
        self._failure = None
        draining_since: float | None = None
        while True:
            stopping = self._failure or sink.failure or control.cancelled or self._failed
            if not stopping:
                self._guarded_submit(plan, sink, control)
            elif draining_since is None:
                draining_since = time.monotonic()
            if not (any(self._busy) or plan.under_way or sink.under_way):
                if self._failed and not (self._failure or sink.failure or control.cancelled):
                    self._repair(sink)
                    draining_since = None
                elif stopping or plan.exhausted:
                    break
            reading = any(self._busy) or plan.under_way
            if reading and draining_since is not None and time.monotonic() - draining_since > _PATIENCE:
                self._abandon_reads()
            self._poll(plan, sink, control, draining=draining_since is not None)
            self._collect(sink, unwanted=draining_since is not None and not self._failed)
        self._finish(sink, control)

    def _guarded_submit(self, plan: Plan, sink: Sink, control: Control) -> None:
        try:
            self._submit(plan, sink, control)
        except (errors.ConnectionLost, errors.SourceReadError) as error:
            self._failure = error

    def _submit(self, plan: Plan, sink: Sink, control: Control) -> None:
        while not (control.cancelled or sink.failure):
            plan.look_ahead()
            piece = plan.take(lambda piece: self._cut(piece, sink))
            if piece is None:
                return
            if piece.action is not Action.DATA:
                sink.pass_over(piece)
            elif not self._begin(piece):
                plan.put_back(piece)
                return

    def _cut(self, piece: Piece, sink: Sink) -> int:
        if piece.action is Action.SKIP:
            return piece.length
        if piece.action is Action.ZERO:
            return piece.length if sink.is_nothing(piece) else ZERO_PIECE - piece.offset % ZERO_PIECE
        wish = self._throttle.largest_request(self._request_size)
        size = max(self._unit, wish // self._unit * self._unit)
        return size - piece.offset % size

    def _begin(self, piece: Piece) -> bool:
        memory = self._small if piece.length <= SMALL else self._large
        if self._throttle.delay() or (buffer := memory.take(piece.length)) is None:
            return False
        index = min(range(len(self._busy)), key=self._busy.__getitem__)
        lease = Lease(memory, buffer, piece)
        try:
            self._connections[index].read(lease.view, piece.offset, self._arrived, (lease, index))
        except errors.ConnectionLost:
            lease.release()
            raise
        self._busy[index] += 1
        self._throttle.take(piece.length)
        return True

    def _poll(self, plan: Plan, sink: Sink, control: Control, *, draining: bool) -> None:
        connections: list[Driven] = [*self._connections, *sink.connections]
        poller = select.poll()
        for connection in connections:
            connection.register(poller)
        if not control.cancelled:
            poller.register(control.wake, select.POLLIN)
        ready = {descriptor for descriptor, _events in poller.poll(self._timeout(plan, sink, draining=draining) * 1000)}
        if control.wake in ready:
            control.nudged()
        for connection in connections:
            if connection.descriptor in ready:
                connection.drive()

    def _timeout(self, plan: Plan, sink: Sink, *, draining: bool) -> float:
        if any(self._busy) or plan.under_way or sink.under_way:
            delay = 0.0 if draining else self._throttle.delay()
            return min(delay, _THROTTLED_POLL) if delay else 1.0
        return 0.0 if draining else min(self._throttle.delay(), _THROTTLED_POLL)

    def _collect(self, sink: Sink, *, unwanted: bool) -> None:
        arrived, self._arrived[:] = list(self._arrived), []
        for (lease, index), error in arrived:
            self._busy[index] -= 1
            if unwanted:
                lease.release()
            elif not error:
                sink.data(lease)
            elif self._connections[index].lost or error in (errno.ENOTCONN, errno.ESHUTDOWN):
                lease.release()
                self._failure = self._failure or self._connections[index].loss()
            else:
                self._failed.append(lease)
        sink.settle()
        if any(connection.lost for connection in self._connections) and not self._failure:
            self._failure = next(each for each in self._connections if each.lost).loss()

    def _repair(self, sink: Sink) -> None:
        """Read once more, in small pieces, what could not be read; the first byte that cannot be ends the copy."""
        for lease in sorted(self._failed, key=lambda lease: lease.piece.offset):
            self._failed.remove(lease)
            try:
                self._read_again(lease)
            except (errors.ConnectionLost, errors.SourceReadError) as error:
                lease.release()
                self._failure = error
                return
            sink.data(lease)

    def _read_again(self, lease: Lease) -> None:
        connection = self._connections[0]
        unit = max(512, connection.minimum_block)
        for start in range(0, lease.piece.length, _RETRY):
            view = lease.view[start : start + _RETRY]
            if connection.read_now(view, lease.piece.offset + start):
                self._read_sectors(connection, view, lease.piece.offset + start, unit)

    def _read_sectors(self, connection: Connection, view: memoryview, offset: int, unit: int) -> None:
        for start in range(0, len(view), unit):
            error = connection.read_now(view[start : start + unit], offset + start)
            if error:
                at = offset + start
                what = f"the source cannot be read at offset {at}: {os.strerror(error)}"
                raise errors.SourceReadError(what, disk=self._disk, offset=at)

    def _abandon_reads(self) -> None:
        """The source does not answer: give its connections up. Reads change nothing, writes are waited for."""
        for connection in self._connections:
            connection.drop()

    def _finish(self, sink: Sink, control: Control) -> None:
        for lease in self._failed:
            lease.release()
        self._failed.clear()
        if control.cancelled:
            raise Cancelled
        failure: Any = self._failure or sink.failure
        if failure is not None:
            raise failure
