"""The sending side: frames and records into a channel, and one disk's chunks on their way from NBD to records.

All of it blocks: it belongs in a thread, one call at a time, for one stream and all its disks.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Sequence

from qemu_blkmig.destination.mover import zero_runs
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import BlkmigError, MigrationError, Refused
from qemu_blkmig.nbd.connection import Connection
from qemu_blkmig.nbd.control import Cancelled, Control
from qemu_blkmig.nbd.plan import Action, Classify, Piece, Plan
from qemu_blkmig.nbd.pump import Lease, Limits, Pump
from qemu_blkmig.nbd.throttle import Throttle
from qemu_blkmig.stream import encode
from qemu_blkmig.stream.channel import Channel
from qemu_blkmig.stream.events import CHUNK, Kind

_ZEROES = memoryview(bytes(CHUNK))
_LOOK_AT_DIRTY_FROM = 2 * CHUNK
"""Shorter dirty extents are read without asking for their block status first: a round trip costs more."""


_BAD_TAIL_ADVICE = (
    "make both disks larger, up to a multiple of 1 MiB; or, if `qemu-blkmig load` receives and not a QEMU, say "
    "--no-for-qemu"
)


class ChunkThrottle(Throttle):
    """However low the limit: a chunk is the unit, and one always proceeds."""

    def largest_request(self, wish: int) -> int:
        """Whole chunks, at least one."""
        allowed = super().largest_request(wish)
        return max(CHUNK, allowed - allowed % CHUNK)


class StreamSender:
    """Writes one stream. A part of the section is opened by its first record and closed by `end_part`.

    `total`: bytes of all disks, of which `advance` tells how many the bulk pass has settled.
    """

    def __init__(self, channel: Channel, *, machine: str | None, footers: bool, zero_blocks: bool, total: int) -> None:
        self.channel = channel
        self.zero_blocks = zero_blocks
        self._machine = machine
        self._footer = encode.footer() if footers else b""
        self._total = total
        self._settled = 0
        self._percent = -1
        self._in_part = False
        self._completing = False

    def begin(self, control: Control) -> None:
        """The header, and the section's START."""
        self.channel.write(
            encode.header(self._machine) + encode.section(Kind.START) + encode.END_OF_PART + self._footer, control
        )

    def begin_completion(self) -> None:
        """All records from now on, and the end, are in the section's END. The part before must be closed."""
        self._completing = True

    def end_part(self, control: Control) -> None:
        """Close the part that is open, if one is; END is only closed by `finish`."""
        if self._in_part and not self._completing:
            self.channel.write(encode.END_OF_PART + self._footer, control)
            self._in_part = False

    def finish(self, control: Control) -> None:
        """100 %, the end of the section and of the stream. The channel is left open."""
        self._completing = True
        self._open(control)
        end = encode.percent(100) + encode.END_OF_PART + self._footer + encode.END_OF_STREAM
        self.channel.write(end, control)

    def zeroes(self, device: bytes, positions: range, control: Control) -> None:
        """Chunks that are zero."""
        self._open(control)
        if self.zero_blocks:
            self.channel.write(b"".join(encode.record(device, at, zero=True) for at in positions), control)
            return
        for at in positions:
            self.channel.write(encode.record(device, at, zero=False), control)
            self.channel.write(_ZEROES, control)

    def data(self, device: bytes, position: int, data: memoryview, control: Control) -> None:
        """One chunk; what a short last one lacks is padded with zeroes."""
        self._open(control)
        self.channel.write(encode.record(device, position, zero=False), control)
        self.channel.write(data, control)
        if len(data) < CHUNK:
            self.channel.write(_ZEROES[len(data) :], control)

    def advance(self, count: int, control: Control) -> None:
        """The bulk pass has settled `count` bytes more; told in whole percent, when that changes."""
        self._settled += count
        percent = min(99, self._settled * 100 // self._total)
        if percent != self._percent:
            self._percent = percent
            self._open(control)
            self.channel.write(encode.percent(percent), control)

    def _open(self, control: Control) -> None:
        if not self._in_part:
            self.channel.write(encode.section(Kind.END if self._completing else Kind.PART), control)
            self._in_part = True


class ChunkPlan(Plan):
    """The pieces of ranges that are aligned to chunks, in whole chunks; the disk's last one may be short.

    What a chunk holds some of is sent whole: it is skipped or zero only if all of it is (ENGINE.md, "Bulk" 2).
    """

    def __init__(
        self, connection: Connection, ranges: Sequence[Extent], classify: Classify, *, look_from: int, disk: str
    ) -> None:
        super().__init__(connection, ranges, classify, look_from=look_from, disk=disk)
        self._ends = {extent.end for extent in ranges}
        self._chunk: list[Piece] = []

    @property
    def exhausted(self) -> bool:
        """See `Plan`."""
        return super().exhausted and not self._chunk

    def take(self, most: Callable[[Piece], int]) -> Piece | None:
        """See `Plan`; `most` must allow for a chunk."""
        while True:
            piece = super().take(self._whole_chunks)
            if piece is None:
                return None
            self._chunk.append(piece)
            if piece.end % CHUNK and piece.end not in self._ends:
                continue
            gathered, self._chunk = self._chunk, []
            actions = {each.action for each in gathered}
            action = actions.pop() if len(actions) == 1 else Action.DATA
            whole = Piece(gathered[0].offset, piece.end - gathered[0].offset, action)
            limit = most(whole)
            if whole.length > limit:
                self.put_back(Piece(whole.offset + limit, whole.length - limit, action))
                whole = Piece(whole.offset, limit, action)
            return whole

    def _whole_chunks(self, piece: Piece) -> int:
        """How much of a piece to take: what completes a chunk that was begun, whole ones, or the part of one."""
        to_boundary = CHUNK - piece.offset % CHUNK
        if self._chunk or piece.offset % CHUNK or piece.length < CHUNK:
            return min(piece.length, to_boundary)
        return piece.length - piece.length % CHUNK


class DiskSender:
    """One disk: reads what it is told to from its export and sends it."""

    def __init__(
        self,
        name: str,
        device: str,
        connections: Sequence[Connection],
        stream: StreamSender,
        throttle: ChunkThrottle,
        *,
        limits: Limits,
        classify: Classify,
        refuse_tail: bool,
    ) -> None:
        """`device`: its name in the stream. `limits`: requests of at least a chunk.

        `refuse_tail`: a short last chunk must be zero (a real QEMU's bound).
        """
        self._name = name
        self._device = device.encode()
        self._connections = connections
        self._stream = stream
        self._classify = classify
        self._tail = connections[0].size // CHUNK * CHUNK if refuse_tail else None
        self._throttle = throttle
        self._pump = Pump(name, connections, limits, throttle)
        self.sent = 0

    @property
    def size(self) -> int:
        """Of the disk, in bytes."""
        return self._connections[0].size

    def copy(self, extents: Sequence[Extent], control: Control, *, bulk: bool) -> None:
        """Send the extents, which are aligned to chunks; the figures are in `control.tally`.

        Raises as `Pump.run` does, and what `Channel.write` raises.
        """
        classify, look_from = (self._classify, 0) if bulk else (zero_or_data, _LOOK_AT_DIRTY_FROM)
        plan = ChunkPlan(self._connections[0], extents, classify, look_from=look_from, disk=self._name)
        sink = _StreamSink(self, self._stream, control, bulk=bulk)
        self._pump.run(plan, sink, control)

    def disconnect(self) -> None:
        """Let go of the source."""
        for connection in self._connections:
            connection.close()

    def send_unread(self, piece: Piece, control: Control) -> None:
        """Chunks that are known to be zero without having been read; as data they count as if they had been."""
        if self._stream.zero_blocks:
            self.send_zeroes(piece, control)
            return
        for start in range(piece.offset, piece.end, CHUNK):
            self._wait_for_turn(control)
            chunk = Piece(start, min(CHUNK, piece.end - start), Action.ZERO)
            self._throttle.take(chunk.length)
            self.send_zeroes(chunk, control)

    def _wait_for_turn(self, control: Control) -> None:
        poller = select.poll()
        poller.register(control.wake, select.POLLIN)
        while delay := self._throttle.delay():
            poller.poll(delay * 1000)
            if control.cancelled:
                raise Cancelled

    def send_zeroes(self, piece: Piece, control: Control) -> None:
        """Chunks that are zero."""
        positions = range(piece.offset, piece.end, CHUNK)
        self._stream.zeroes(self._device, positions, control)
        self.sent += 0 if self._stream.zero_blocks else len(positions) * CHUNK

    def send(self, position: int, data: memoryview, control: Control) -> None:
        """Chunks that were read; some may turn out to be zero. They are counted in `control.tally`."""
        for start in range(0, len(data), CHUNK):
            self._send_chunk(position + start, data[start : start + CHUNK], control)

    def _send_chunk(self, position: int, chunk: memoryview, control: Control) -> None:
        if _is_zero(chunk):
            self.send_zeroes(Piece(position, len(chunk), Action.ZERO), control)
            control.tally.zeroed += len(chunk)
            return
        if position == self._tail:
            raise MigrationError(_bad_tail(self.size), disk=self._name, advice=_BAD_TAIL_ADVICE)
        self._stream.data(self._device, position, chunk, control)
        self.sent += CHUNK
        control.tally.copied += len(chunk)


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


def _bad_tail(size: int) -> str:
    return (
        f"its size, {size} bytes, is not a multiple of 1 MiB and its last {size % CHUNK} bytes are not zero: a real "
        "QEMU cannot load such a disk"
    )


def _is_zero(data: memoryview) -> bool:
    return all(zero for _, _, zero in zero_runs(data, 0, CHUNK))


def zero_or_data(zero: bool, _depth: int | None) -> Action:
    """Without a shared base."""
    return Action.ZERO if zero else Action.DATA


class _StreamSink:
    """Sends what arrives, at once; so nothing is ever under way."""

    connections: Sequence[Connection] = ()
    under_way = 0

    def __init__(self, disk: DiskSender, stream: StreamSender, control: Control, *, bulk: bool) -> None:
        self.failure: Exception | None = None
        self._disk = disk
        self._stream = stream
        self._control = control
        self._bulk = bulk

    def settle(self) -> None:
        """Nothing is under way."""

    def pass_over(self, piece: Piece) -> None:
        """A piece that needs no reading."""
        if piece.action is Action.SKIP:
            self._control.tally.skipped += piece.length
            self._attempt(lambda: self._advance(piece.length))
        else:
            self._attempt(lambda: self._zero(piece))

    def data(self, lease: Lease) -> None:
        """Chunks were read."""
        self._attempt(lambda: self._data(lease))
        lease.release()

    def _zero(self, piece: Piece) -> None:
        self._disk.send_unread(piece, self._control)
        self._control.tally.zeroed += piece.length
        self._advance(piece.length)

    def _data(self, lease: Lease) -> None:
        self._disk.send(lease.piece.offset, lease.view, self._control)
        self._advance(lease.piece.length)

    def _advance(self, count: int) -> None:
        if self._bulk:
            self._stream.advance(count, self._control)

    def _attempt(self, send: Callable[[], None]) -> None:
        if self.failure is not None:
            return
        try:
            send()
        except (BlkmigError, Cancelled) as error:
            self.failure = error
