"""What a whole stream holds, gathered from its events; what `inspect` shows."""

from __future__ import annotations

import msgspec

from qemu_blkmig.errors import StreamError
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.stream.channel import Channel
from qemu_blkmig.stream.chunkmap import ChunkMaps
from qemu_blkmig.stream.events import (
    CHUNK,
    Block,
    Configuration,
    DeviceState,
    EndOfPart,
    EndOfStream,
    Event,
    Percent,
    RamSkipped,
    Section,
    SectionOver,
)
from qemu_blkmig.stream.framing import Decoder

MOST_ITERATIONS = 1000
"""Iterations told one by one; those after them are only counted."""
BUFFER = 1 << 20


class Device(msgspec.Struct, frozen=True):
    """One device. `bytes`: of the payload that was sent. `end`: the first byte after its highest block.

    `chunks`: how many different ones came; `repeated`: blocks that came again for one of them.
    """

    name: str
    blocks: int
    zero_blocks: int
    bytes: int
    chunks: int
    repeated: int
    end: int


class Iteration(msgspec.Struct, frozen=True):
    """The blocks between two marks of the block section (EOS); `part`: START, PART or END."""

    part: str
    offset: int
    blocks: int
    zero_blocks: int
    percent: int | None


class Ram(msgspec.Struct, frozen=True):
    """The RAM section: its size, and pages by how they were sent."""

    size: int
    plain_pages: int
    filled_pages: int
    compressed_pages: int


class Inspection(msgspec.Struct, frozen=True):
    """A stream. `bytes`: how long it is; `end`: how it ends (end, device state, flaw).

    `iterations` lists those that have blocks; `empty_iterations` counts the others, `more_iterations` those that are
    too many to be listed. `parts`: of sections, by name. `flaw`: what is wrong, if anything is.
    """

    bytes: int
    machine: str | None
    page_bits: int | None
    capabilities: list[str]
    uuid: str | None
    footers: bool | None
    parts: dict[str, int]
    devices: list[Device]
    iterations: list[Iteration]
    empty_iterations: int
    more_iterations: int
    ram: Ram | None
    device_state_at: int | None
    end: str
    flaw: str | None


class Survey:
    """Gathers; `take` every event of a stream, then ask for the `result`."""

    def __init__(self) -> None:
        self.maps = ChunkMaps()
        self._configuration: Configuration | None = None
        self._footers: bool | None = None
        self._parts: dict[str, int] = {}
        self._section: Section | None = None
        self._iterations: list[Iteration] = []
        self._empty = 0
        self._more = 0
        self._now: tuple[int, int, int | None] = (0, 0, None)
        self._ram = Ram(0, 0, 0, 0)
        self._state_at: int | None = None
        self._end = "flaw"

    def take(self, event: Event) -> None:
        """Note an event. Raises `StreamError` where the stream is larger than any real one."""
        blocks, zero_blocks, percent = self._now
        match event:
            case Block():
                self.maps.mark(event)
                self._now = (blocks + 1, zero_blocks + event.zero, percent)
            case Percent():
                self._now = (blocks, zero_blocks, event.percent)
            case EndOfPart():
                self._end_iteration()
            case Section():
                self._section = event
                self._parts[event.name] = self._parts.get(event.name, 0) + 1
            case SectionOver():
                self._footers = event.footer
            case RamSkipped():
                self._add_ram(event)
            case Configuration():
                self._configuration = event
            case DeviceState():
                self._state_at, self._end = event.offset, "device state"
            case EndOfStream():
                self._end = "end"

    def result(self, length: int, flaw: str | None) -> Inspection:
        """What was found in the `length` bytes."""
        configuration = self._configuration
        return Inspection(
            bytes=length,
            machine=configuration.machine if configuration else None,
            page_bits=configuration.page_bits if configuration else None,
            capabilities=list(configuration.capabilities) if configuration else [],
            uuid=configuration.uuid if configuration else None,
            footers=self._footers,
            parts=self._parts,
            devices=self._devices(),
            iterations=self._iterations,
            empty_iterations=self._empty,
            more_iterations=self._more,
            ram=self._ram if "ram" in self._parts else None,
            device_state_at=self._state_at,
            end="flaw" if flaw else self._end,
            flaw=flaw,
        )

    def _devices(self) -> list[Device]:
        return [
            Device(
                name=name,
                blocks=found.blocks,
                zero_blocks=found.zero_blocks,
                bytes=(found.blocks - found.zero_blocks) * CHUNK,
                chunks=found.received,
                repeated=found.blocks - found.received,
                end=found.end,
            )
            for name, found in self.maps.devices.items()
        ]

    def _end_iteration(self) -> None:
        (blocks, zero_blocks, percent), self._now = self._now, (0, 0, None)
        if not blocks or self._section is None:
            self._empty += 1
        elif len(self._iterations) < MOST_ITERATIONS:
            part = self._section
            self._iterations.append(Iteration(part.kind.name, part.offset, blocks, zero_blocks, percent))
        else:
            self._more += 1

    def _add_ram(self, part: RamSkipped) -> None:
        self._ram = Ram(
            self._ram.size or part.size or 0,
            self._ram.plain_pages + part.plain,
            self._ram.filled_pages + part.filled,
            self._ram.compressed_pages + part.compressed,
        )


def survey(channel: Channel, control: Control, *, page_size: int) -> tuple[Survey, Inspection]:
    """Read a stream to its end, or to its flaw. Raises `ConnectionLost`, `Cancelled`."""
    gathered = Survey()
    decoder = Decoder(page_size=page_size)
    buffer = memoryview(bytearray(BUFFER))
    try:
        while count := channel.read(buffer, control):
            for event in decoder.feed(buffer[:count]):
                gathered.take(event)
        for event in decoder.close():
            gathered.take(event)
    except StreamError as error:
        return gathered, gathered.result(decoder.offset, str(error))
    return gathered, gathered.result(decoder.offset, None)
