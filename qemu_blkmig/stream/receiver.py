"""Brings a stream's blocks into images: the loop that reads, decodes and writes. Blocking: it belongs in a thread.

Memory is `BUFFERS` times `BUFFER`: what is being written is still in the buffer that it was read into. Two writes of
one chunk are never in flight together, so an older block cannot land after a newer one.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from qemu_blkmig.destination.sink import write_error, zero_runs
from qemu_blkmig.destination.writers import Writer
from qemu_blkmig.errors import ConnectionLost, StreamError
from qemu_blkmig.nbd.connection import Connection
from qemu_blkmig.nbd.control import Cancelled, Control
from qemu_blkmig.stream.channel import Channel
from qemu_blkmig.stream.chunkmap import ChunkMap
from qemu_blkmig.stream.events import (
    CHUNK,
    Block,
    BlockData,
    Command,
    Configuration,
    DeviceState,
    EndOfStream,
    Event,
    Passed,
    Percent,
    Section,
)
from qemu_blkmig.stream.framing import Decoder

BUFFERS = 4
BUFFER = 1 << 20
ZERO_UNIT = 64 << 10
"""Data is tested for zeroes in units of this many bytes."""
OPEN_RETURN_PATH = 1


@dataclass
class Landing:
    """Where one device's blocks go. `size`: bytes; `grow`: how to make the image larger, where its size is not known.

    `reads_as_zero`: the image is zero wherever nothing was written yet. `written`, `zeroed`: bytes so far.
    """

    device: str
    size: int
    writer: Writer
    grow: Callable[[int], None] | None
    reads_as_zero: bool
    chunks: ChunkMap = field(default_factory=ChunkMap)
    written: int = 0
    zeroed: int = 0
    in_flight: Counter[int] = field(default_factory=Counter)


class _Buffer:
    """Input, and how many writes still need it."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(BUFFER))
        self.writes = 0


class Receiver:
    """One stream on its way into `landings` (by device). With `forward`, the rest of it is passed on there.

    `on_progress(percent)` is called in the receiver's thread.
    """

    def __init__(
        self,
        source: Channel,
        landings: Mapping[str, Landing],
        control: Control,
        *,
        page_size: int,
        forward: Channel | None = None,
        on_progress: Callable[[int], None],
    ) -> None:
        self._source = source
        self._landings = landings
        self._control = control
        self._forward = forward
        self._on_progress = on_progress
        self._decoder = Decoder(page_size=page_size, pass_on=forward is not None)
        self._buffers = [_Buffer() for _ in range(BUFFERS)]
        self._buffer = self._buffers[0]
        self._events = self._read()
        self._connections: list[Connection] = [
            connection for landing in landings.values() for connection in landing.writer.connections
        ]
        self._failure: Exception | None = None
        self._answers_over = False
        self._landing: Landing | None = None
        self._position = 0
        self._fresh = False
        self.has_block_section = False
        self.machine: str | None = None
        self.end: DeviceState | EndOfStream | None = None

    def receive_disks(self) -> None:
        """Read until all of the disks is in the images (not yet flushed); not a byte after that is passed on yet.

        Raises `StreamError`, `DestinationWriteError`, `ConnectionLost`, `Cancelled`; nothing is being written then.
        """
        try:
            for event in self._events:
                self._take(event)
                if self.end is not None:
                    break
            self._drain()
        except BaseException:
            self._let_writes_end()
            raise
        if not self.has_block_section:
            raise StreamError(
                "the stream has no block section: its sender was not told to migrate disks (blk=true, inc=true)",
                offset=self.end.offset if self.end else 0,
            )

    def pass_rest(self) -> None:
        """Read the rest of the stream, device state, to its end, and pass it on if there is somewhere to.

        The writers may be closed by then. Raises `StreamError`, `ConnectionLost`, `Cancelled`.
        """
        self._landings, self._connections = {}, []
        for event in self._events:
            if isinstance(event, Passed) and self._forward is not None:
                self._forward.write([event.data], self._control)

    def _read(self) -> Iterator[Event]:
        while True:
            self._buffer = self._free_buffer()
            self._wait_for_input()
            count = self._source.read(self._buffer.view, self._control)
            if not count:
                break
            yield from self._decoder.feed(self._buffer.view[:count])
        yield from self._decoder.close()

    def _take(self, event: Event) -> None:
        match event:
            case BlockData():
                self._store(event.data)
            case Block():
                self._begin(event)
            case Passed():
                if self._forward is not None:
                    self._forward.write([event.data], self._control)
            case Percent():
                self._on_progress(event.percent)
            case Section():
                self.has_block_section |= event.name == "block"
            case Configuration():
                self.machine = event.machine
            case DeviceState() | EndOfStream():
                self.end = event
            case Command():
                self._refuse_return_path(event)
        if self._failure is not None:
            raise self._failure

    def _refuse_return_path(self, command: Command) -> None:
        """A source with a return path waits for answers that only a QEMU behind us, on a socket, can give."""
        answers = self._forward is not None and self._forward.is_socket and self._source.is_socket
        if command.number == OPEN_RETURN_PATH and not answers and self._source.is_socket:
            raise StreamError(
                "the source waits for answers on a return path: turn its capability return-path off",
                offset=command.offset,
            )

    def _begin(self, block: Block) -> None:
        landing = self._landings.get(block.device)
        if landing is None:
            known = ", ".join(repr(name) for name in self._landings)
            raise StreamError(f"a block of device {block.device!r}, expected {known}", offset=block.offset)
        if block.position + (CHUNK if landing.grow is not None else 1) > landing.size:
            self._grow(landing, block)
        chunks = _chunks(block.position, CHUNK)
        if any(landing.in_flight[chunk] for chunk in chunks):
            self._drain()
        self._fresh = landing.reads_as_zero and all(landing.chunks.state(chunk) == 0 for chunk in chunks)
        landing.chunks.mark(block)
        if landing.reads_as_zero and block.position % CHUNK:
            landing.reads_as_zero = False
        self._landing, self._position = landing, block.position
        if block.zero:
            self._zero(landing, block.position, min(CHUNK, landing.size - block.position))

    def _grow(self, landing: Landing, block: Block) -> None:
        if landing.grow is None:
            raise StreamError(
                f"a block at {block.position}, beyond the image's {landing.size} bytes",
                offset=block.offset, disk=block.device,
            )  # fmt: skip
        try:
            landing.grow(block.position + CHUNK)
        except OSError as error:
            raise StreamError(
                f"a block at {block.position}, up to which the image cannot grow: {error.strerror}",
                offset=block.offset, disk=block.device,
            ) from error  # fmt: skip
        landing.size = block.position + CHUNK

    def _store(self, data: memoryview) -> None:
        """What lies beyond the disk's end in its last chunk is padding."""
        landing, position = self._landing, self._position
        if landing is None:
            raise RuntimeError("data without a block")
        self._position += len(data)
        data = data[: max(0, landing.size - position)]
        for start, end, zero in zero_runs(data, position, ZERO_UNIT):
            if zero:
                self._zero(landing, position + start, end - start)
            else:
                self._write(landing, position + start, data[start:end])

    def _zero(self, landing: Landing, position: int, length: int) -> None:
        landing.zeroed += length
        if not self._fresh:
            landing.writer.zero(position, length, self._begun(landing, position, length, None))

    def _write(self, landing: Landing, position: int, data: memoryview) -> None:
        landing.written += len(data)
        landing.writer.write(data, position, self._begun(landing, position, len(data), self._buffer))

    def _begun(self, landing: Landing, position: int, length: int, buffer: _Buffer | None) -> Callable[[int], None]:
        """Note that a write has begun; the result notes that it is over."""
        chunks = _chunks(position, length)
        landing.in_flight.update(chunks)
        if buffer is not None:
            buffer.writes += 1

        def done(error: int) -> None:
            landing.in_flight.subtract(chunks)
            for chunk in chunks:
                if not landing.in_flight[chunk]:
                    del landing.in_flight[chunk]
            if buffer is not None:
                buffer.writes -= 1
            if error and self._failure is None:
                self._failure = write_error(landing.device, position, error)

        return done

    def _free_buffer(self) -> _Buffer:
        while True:
            for buffer in self._buffers:
                if not buffer.writes:
                    return buffer
            self._poll(None)

    def _drain(self) -> None:
        """Wait until nothing is being written. Raises the first failure."""
        while any(landing.in_flight for landing in self._landings.values()):
            self._poll(None)
        if self._failure is not None:
            raise self._failure

    def _let_writes_end(self) -> None:
        """After a failure, of a write perhaps: buffers must outlive the writes that use them."""
        while self._writes_are_under_way():
            alive = [connection for connection in self._connections if not connection.lost]
            if not alive:
                return
            poller = select.poll()
            for connection in alive:
                connection.register(poller)
            poller.poll()
            for connection in alive:
                with contextlib.suppress(ConnectionLost):
                    connection.drive()

    def _writes_are_under_way(self) -> bool:
        """Those of a connection that is gone are over, and nothing would wake up who waits for them."""
        for landing in self._landings.values():
            landing.writer.settle()
        return any(landing.in_flight for landing in self._landings.values())

    def _wait_for_input(self) -> None:
        """Return when the source has something to read; meanwhile writes go on, and answers go back."""
        if self._source.is_file:
            self._settle()
            return
        while not self._poll(self._source):
            pass

    def _poll(self, source: Channel | None) -> bool:
        """Wait for anything; whether `source` has something to read."""
        poller = select.poll()
        poller.register(self._control.wake, select.POLLIN)
        for connection in self._connections:
            if connection.lost:
                raise connection.loss("the image's NBD server is gone")
            connection.register(poller)
        if source is not None:
            source.register(poller)
        answering = self._forward if self._forward is not None and self._forward.is_socket else None
        answering = None if self._answers_over else answering
        if answering is not None:
            poller.register(answering.descriptor, select.POLLIN)
        ready = dict(poller.poll())
        if self._control.cancelled:
            raise Cancelled
        if answering is not None and answering.descriptor in ready:
            self._return_answers(answering)
        self._settle()
        return source is not None and source.has_input(ready)

    def _settle(self) -> None:
        for connection in self._connections:
            connection.drive()
        for landing in self._landings.values():
            landing.writer.settle()
        if self._failure is not None:
            raise self._failure

    def _return_answers(self, answering: Channel) -> None:
        """What the destination QEMU says on the return path goes to the source, if that listens; its end, too.

        It closes the connection once it has loaded everything, before the source does.
        """
        answer = bytearray(4096)
        count = answering.read(memoryview(answer), self._control)
        if not count and self.end is None:
            raise ConnectionLost(f"{answering.where} closed the connection")
        self._answers_over = not count
        if not self._source.is_socket:
            return
        if count:
            self._source.write([bytes(answer[:count])], self._control)
        else:
            self._source.end_writing()


def _chunks(position: int, length: int) -> range:
    """Of which chunks the range holds some; of two where a sender does not align its blocks."""
    return range(position // CHUNK, (position + length - 1) // CHUNK + 1)


def grower(descriptor: int) -> Callable[[int], None]:
    """Makes a raw image file larger."""
    return lambda size: os.ftruncate(descriptor, size)
