"""What a stream is made of, as the decoder tells it. `offset` is always where in the stream it begins, in bytes."""

from __future__ import annotations

import enum
from dataclasses import dataclass

CHUNK = 1 << 20
"""Bytes of one block record's payload; the last one of a disk is as long, whatever the disk's size."""


class Kind(enum.IntEnum):
    """The parts of a section, by the byte that begins them."""

    START = 1
    PART = 2
    END = 3


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the sender is: `machine` is its machine type; the rest is told only where it differs from the usual."""

    offset: int
    machine: str
    page_bits: int | None
    capabilities: tuple[str, ...]
    uuid: str | None


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a section begins."""

    offset: int
    kind: Kind
    number: int
    name: str
    version: int


@dataclass(frozen=True, slots=True)
class SectionOver:
    """The part of the section has ended; `footer`: with a footer (QEMU 2.4 or newer, unless told otherwise)."""

    offset: int
    name: str
    footer: bool


@dataclass(frozen=True, slots=True)
class Block:
    """A chunk of a disk, from byte `position` of it; unless it is `zero`, a `CHUNK` of `BlockData` follows."""

    offset: int
    device: str
    position: int
    zero: bool


@dataclass(frozen=True, slots=True)
class BlockData:
    """The next bytes of the last `Block`; `data` is part of what was fed, and valid only until the next feeding."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class Percent:
    """How much of its disks the sender has read."""

    offset: int
    percent: int


@dataclass(frozen=True, slots=True)
class EndOfPart:
    """The block section's own mark (EOS) at the end of each part."""

    offset: int


@dataclass(frozen=True, slots=True)
class RamSkipped:
    """What a part of the RAM section held: pages, by how they were sent, and the RAM's size where it is told."""

    offset: int
    plain: int
    filled: int
    compressed: int
    size: int | None


@dataclass(frozen=True, slots=True)
class Command:
    """A command to the receiving QEMU."""

    offset: int
    number: int
    data: bytes


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Device state begins: from here to its end the stream cannot be told apart."""

    offset: int


@dataclass(frozen=True, slots=True)
class EndOfStream:
    """The sender has said that all was sent. Not told for a stream with device state."""

    offset: int


@dataclass(frozen=True, slots=True)
class Passed:
    """Bytes of everything but the block section, in order, untouched; told only on request. See `BlockData.data`."""

    data: memoryview


Event = (
    Configuration
    | Section
    | SectionOver
    | Block
    | BlockData
    | Percent
    | EndOfPart
    | RamSkipped
    | Command
    | DeviceState
    | EndOfStream
    | Passed
)
