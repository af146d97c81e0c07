"""Streams for the tests: captured ones, and ones built by hand from the format's description alone (ENGINE.md)."""

from __future__ import annotations

import itertools
import lzma
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from qemu_blkmig.stream.events import CHUNK, Block, BlockData, Event, Passed
from qemu_blkmig.stream.framing import Decoder

FIXTURES = Path(__file__).parent / "fixtures"
CAPTURED = sorted(path.stem for path in FIXTURES.glob("*.xz"))

EOS = struct.pack(">Q", 2)
RAM_EOS = struct.pack(">Q", 0x10)
BLOCK_START = b"\x01" + struct.pack(">I", 1) + b"\x05block" + struct.pack(">II", 0, 1)
BLOCK_PART = b"\x02" + struct.pack(">I", 1)
BLOCK_END = b"\x03" + struct.pack(">I", 1)
RAM_PART = b"\x02" + struct.pack(">I", 2)
FOOTER_1 = b"\x7e" + struct.pack(">I", 1)
FOOTER_2 = b"\x7e" + struct.pack(">I", 2)
HEADER = b"QEVM" + struct.pack(">I", 3)
PC = b"\x07" + struct.pack(">I", 2) + b"pc"


def captured(name: str) -> bytes:
    return lzma.decompress((FIXTURES / f"{name}.xz").read_bytes())


def captured_chunk(chunk: int) -> bytes:
    """What chunk `chunk` of every captured disk holds (scripts/capture-streams, `fill`)."""
    sector = bytes(512) if chunk in (1, 3) else (b"chunk %d of this disk. " % chunk * 4)[:64] + bytes(448)
    return sector * (CHUNK // 512)


def block(device: bytes, position: int, data: bytes | None) -> bytes:
    """A record of the block section; `data` None: zero-flagged."""
    flags = 0x01 if data is not None else 0x09
    return struct.pack(">QB", position | flags, len(device)) + device + (data or b"")


def ram_start(version: int = 4) -> bytes:
    return b"\x01" + struct.pack(">I", 2) + b"\x03ram" + struct.pack(">II", 0, version)


def disks_only(*parts: Iterable[bytes], footers: bool = True, configuration: bytes = PC) -> bytes:
    """A stream with nothing but a block section: its `parts`, each of records; the last one is its END."""
    footer = FOOTER_1 if footers else b""
    stream = HEADER + configuration + BLOCK_START + EOS + footer
    for number, records in enumerate(parts, 1):
        begin = BLOCK_END if number == len(parts) else BLOCK_PART
        stream += begin + b"".join(records) + EOS + footer
    return stream + b"\0"


def decode(stream: bytes, cuts: Sequence[int] = (), *, pass_on: bool = False, page_size: int = 4096) -> list[Event]:
    """All events of `stream`, fed in pieces that end at `cuts`; what they hold is kept as bytes of its own."""
    decoder = Decoder(pass_on=pass_on, page_size=page_size)
    events: list[Event] = []
    edges = [0, *sorted(cuts), len(stream)]
    for begin, end in itertools.pairwise(edges):
        events += [_kept(event) for event in decoder.feed(stream[begin:end])]
    return events + [_kept(event) for event in decoder.close()]


def _kept(event: Event) -> Event:
    match event:
        case BlockData():
            return BlockData(memoryview(bytes(event.data)))
        case Passed():
            return Passed(memoryview(bytes(event.data)))
    return event


def without_pieces(events: Iterable[Event]) -> list[Event]:
    """The events that do not depend on how the stream was cut."""
    return [event for event in events if not isinstance(event, BlockData | Passed)]


def passed(events: Iterable[Event]) -> bytes:
    return b"".join(bytes(event.data) for event in events if isinstance(event, Passed))


def disks(events: Iterable[Event]) -> dict[str, dict[int, bytes]]:
    """What the blocks hold, by device and position; the last one wins."""
    found: dict[str, dict[int, bytes]] = {}
    at: Block | None = None
    for event in events:
        if isinstance(event, Block):
            at = event
            found.setdefault(event.device, {})[event.position] = bytes(CHUNK) if event.zero else b""
        elif isinstance(event, BlockData) and at is not None:
            found[at.device][at.position] += bytes(event.data)
    return found
