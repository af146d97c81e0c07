"""The sender's side of the format: the bytes that frame a stream which has nothing but a block section."""

from __future__ import annotations

import struct

from qemu_blkmig.stream import block, framing
from qemu_blkmig.stream.events import Kind

NUMBER = 1
"""Our block section's number."""

END_OF_PART = struct.pack(">Q", block.EOS)
END_OF_STREAM = bytes([framing.END_OF_FILE])


def header(machine: str | None) -> bytes:
    """The stream's beginning. `machine`: the machine type to be named; None: no configuration (before QEMU 2.3)."""
    begin = struct.pack(">II", framing.MAGIC, framing.STREAM_VERSION)
    if machine is None:
        return begin
    name = machine.encode()
    return begin + struct.pack(">BI", framing.CONFIGURATION, len(name)) + name


def section(kind: Kind) -> bytes:
    """The beginning of a part of the block section."""
    begin = struct.pack(">BI", kind, NUMBER)
    if kind is not Kind.START:
        return begin
    name = block.SECTION.encode()
    return begin + bytes([len(name)]) + name + struct.pack(">II", 0, block.VERSION)


def footer() -> bytes:
    """What ends a part since QEMU 2.4."""
    return struct.pack(">BI", framing.FOOTER, NUMBER)


def record(device: bytes, position: int, *, zero: bool) -> bytes:
    """The head of a chunk that begins at byte `position`; unless it is zero, `CHUNK` bytes must follow."""
    flags = block.DEVICE_BLOCK | (block.ZERO_BLOCK if zero else 0)
    return struct.pack(">QB", position | flags, len(device)) + device


def percent(number: int) -> bytes:
    """A PROGRESS record."""
    return struct.pack(">Q", number << block.FLAG_BITS | block.PROGRESS)
