"""One disk's way from its NBD export into the stream: what is read here is written there meanwhile.

All of it blocks: it belongs in a thread, one call at a time, for one stream and all its disks.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from qemu_blkmig.destination.sink import zero_runs
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import MigrationError, Refused
from qemu_blkmig.nbd.connection import Connection
from qemu_blkmig.nbd.control import Cancelled, Control
from qemu_blkmig.nbd.plan import Action, Classify, Piece, Plan
from qemu_blkmig.nbd.pump import Driven, Lease, Limits, Pump
from qemu_blkmig.nbd.throttle import Throttle
from qemu_blkmig.stream.events import CHUNK
from qemu_blkmig.stream.sender import StreamSender

_LOOK_AT_DIRTY_FROM = 2 * CHUNK
"""Shorter dirty extents are read without asking for their block status first: a round trip costs more."""
_BAD_TAIL_ADVICE = (
    "make both disks larger, up to a multiple of 1 MiB; or, if `qemu-blkmig load` receives and not a QEMU, say "
    "--no-for-qemu"
)


class DiskSender:
    """One disk: reads what it is told to from its export and sends it, in whole chunks.

    What a chunk holds some of is sent whole: it is skipped or zero only if all of it is (ENGINE.md, "Bulk" 2).
    """

    def __init__(
        self,
        name: str,
        device: str,
        connections: Sequence[Connection],
        stream: StreamSender,
        throttle: Throttle,
        *,
        limits: Limits,
        classify: Classify,
        refuse_tail: bool,
    ) -> None:
        """`device`: its name in the stream. `limits`: requests of at least a chunk.

        `refuse_tail`: a short last chunk must be zero (a real QEMU's bound). Raises `Refused` where no request can
        hold a chunk.
        """
        self._name = name
        self._device = device.encode()
        self._connections = connections
        self._stream = stream
        self._classify = classify
        self._size = connections[0].size
        self._refuse_tail = refuse_tail
        self._throttle = throttle
        self._pump = Pump(name, connections, limits, throttle, unit=CHUNK)
        self.sent = 0

    def copy(self, extents: Sequence[Extent], control: Control, *, bulk: bool) -> None:
        """Send the extents, which must be whole chunks; the figures are in `control.tally`.

        Raises as `Pump.run` does, and what `Channel.write` raises.
        """
        for extent in extents:
            if extent.offset % CHUNK or (extent.end % CHUNK and extent.end != self._size):
                raise ValueError(f"disk {self._name}: {extent} is not made of whole chunks")
        classify, look_from = (self._classify, 0) if bulk else (zero_or_data, _LOOK_AT_DIRTY_FROM)
        plan = Plan(self._connections[0], extents, classify, look_from=look_from, disk=self._name, unit=CHUNK)

        def advance(count: int) -> None:
            if bulk:
                self._stream.advance(count, control)

        with _sending(lambda piece, data: self._send(piece, data, control, advance)) as sink:
            self._pump.run(plan, sink, control)

    def disconnect(self) -> None:
        """Let go of the source."""
        for connection in self._connections:
            connection.close()

    def _send(self, piece: Piece, data: memoryview | None, control: Control, advance: Callable[[int], None]) -> None:
        """A piece that was read, or passed over; counted in `control.tally`."""
        if data is not None:
            self._send_data(piece.offset, data, control)
        elif piece.action is Action.SKIP:
            control.tally.skipped += piece.length
        else:
            self._send_unread(piece, control)
            control.tally.zeroed += piece.length
        advance(piece.length)

    def _send_data(self, offset: int, data: memoryview, control: Control) -> None:
        chunks: list[tuple[int, memoryview | None]] = []
        copied = 0
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            is_zero = _is_zero(chunk)
            if not is_zero and len(chunk) < CHUNK and self._refuse_tail:
                raise MigrationError(_bad_tail(self._size), disk=self._name, advice=_BAD_TAIL_ADVICE)
            copied += 0 if is_zero else len(chunk)
            chunks.append((offset + start, None if is_zero else chunk))
        self._send_chunks(chunks, control)
        control.tally.copied += copied
        control.tally.zeroed += len(data) - copied

    def _send_unread(self, piece: Piece, control: Control) -> None:
        """Chunks that are known to be zero without having been read; as data they count as if they had been."""
        positions = range(piece.offset, piece.end, CHUNK)
        if self._stream.zero_blocks:
            self._send_chunks([(position, None) for position in positions], control)
            return
        for position in positions:
            self._wait_for_turn(control)
            self._throttle.take(min(CHUNK, piece.end - position))
            self._send_chunks([(position, None)], control)

    def _send_chunks(self, chunks: Sequence[tuple[int, memoryview | None]], control: Control) -> None:
        self._stream.chunks(self._device, chunks, control)
        self.sent += CHUNK * sum(data is not None or not self._stream.zero_blocks for _, data in chunks)

    def _wait_for_turn(self, control: Control) -> None:
        poller = select.poll()
        poller.register(control.wake, select.POLLIN)
        while delay := self._throttle.delay():
            poller.poll(delay * 1000)
            if control.cancelled:
                raise Cancelled


class _ThreadedSink:
    """Has what arrives sent by a thread, piece after piece; the pump reads on meanwhile, as far as it has memory."""

    def __init__(self, send: Callable[[Piece, memoryview | None], None]) -> None:
        self.failure: Exception | None = None
        self.under_way = 0
        self._send = send
        self._waiting: queue.SimpleQueue[tuple[Piece, Lease | None] | None] = queue.SimpleQueue()
        self._over: deque[Lease | None] = deque()
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._work, name="stream", daemon=True)
        self._thread.start()

    @property
    def connections(self) -> Sequence[Driven]:
        """See `Sink`."""
        return [self]

    def data(self, lease: Lease) -> None:
        """Chunks were read."""
        self._hand_over(lease.piece, lease)

    def pass_over(self, piece: Piece) -> None:
        """A piece that needs no reading."""
        self._hand_over(piece, None)

    def is_nothing(self, zeroes: Piece) -> bool:
        """All is told of."""
        return False

    def settle(self) -> None:
        """Give back the memory of what was sent."""
        while self._over:
            lease = self._over.popleft()
            self.under_way -= 1
            if lease is not None:
                lease.release()

    def register(self, poller: select.poll) -> None:
        """Let `poller` wake up when something was sent."""
        poller.register(self.descriptor, select.POLLIN)

    def drive(self) -> None:
        """The poller is awake."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)

    def close(self) -> None:
        """End the thread, which has nothing under way any more."""
        self._waiting.put(None)
        self._thread.join()
        os.close(self.descriptor)

    def _hand_over(self, piece: Piece, lease: Lease | None) -> None:
        self.under_way += 1
        self._waiting.put((piece, lease))

    def _work(self) -> None:
        while (given := self._waiting.get()) is not None:
            piece, lease = given
            if self.failure is None:
                self._attempt(piece, lease)
            self._over.append(lease)
            os.eventfd_write(self.descriptor, 1)

    def _attempt(self, piece: Piece, lease: Lease | None) -> None:
        """Whatever goes wrong is raised by the pump, in the thread that waits for it."""
        try:
            self._send(piece, lease.view if lease is not None else None)
        except Exception as error:
            self.failure = error


@contextlib.contextmanager
def _sending(send: Callable[[Piece, memoryview | None], None]) -> Iterator[_ThreadedSink]:
    sink = _ThreadedSink(send)
    try:
        yield sink
    finally:
        sink.close()


def require_loadable_tail(connection: Connection, disk: str) -> None:
    """Raise `Refused` if a real QEMU could not load the disk: its last chunk is short and not zero (FACTS.md)."""
    length = connection.size % CHUNK
    if not length:
        return
    tail = memoryview(bytearray(length))
    if error := connection.read_now(tail, connection.size - length):
        raise Refused(f"its last {length} bytes cannot be read: {os.strerror(error)}", disk=disk)
    if not _is_zero(tail):
        raise Refused(_bad_tail(connection.size), disk=disk, advice=_BAD_TAIL_ADVICE)


def zero_or_data(zero: bool, _depth: int | None) -> Action:
    """Without a shared base."""
    return Action.ZERO if zero else Action.DATA


def _bad_tail(size: int) -> str:
    return (
        f"its size, {size} bytes, is not a multiple of 1 MiB and its last {size % CHUNK} bytes are not zero: a real "
        "QEMU cannot load such a disk"
    )


def _is_zero(data: memoryview) -> bool:
    return all(zero for _, _, zero in zero_runs(data, 0, CHUNK))
