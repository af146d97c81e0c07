"""The records of the "block" section, and what they are made of on the wire (ENGINE.md, "Wire format")."""

from __future__ import annotations

from qemu_blkmig.errors import StreamError
from qemu_blkmig.stream.cursor import Cursor, Steps
from qemu_blkmig.stream.events import CHUNK, Block, BlockData, EndOfPart, Percent

SECTION = "block"
VERSION = 1

DEVICE_BLOCK = 0x01
EOS = 0x02
PROGRESS = 0x04
ZERO_BLOCK = 0x08

FLAG_BITS = 9
MOST = (1 << 63) - 1
"""Bytes of the largest disk that a QEMU or a file can have."""
_FLAGS = (1 << FLAG_BITS) - 1


def records(cursor: Cursor) -> Steps[None]:
    """The records of one part, up to its EOS. Raises `StreamError`."""
    while True:
        start = cursor.offset
        word = yield from cursor.number(8, "a record of the block section")
        flags, value = word & _FLAGS, word >> FLAG_BITS
        if flags in (DEVICE_BLOCK, DEVICE_BLOCK | ZERO_BLOCK):
            device = yield from cursor.string(1, "a device's name")
            zero = bool(flags & ZERO_BLOCK)
            position = value << FLAG_BITS
            if position > MOST - CHUNK:
                raise StreamError(f"a block of device {device!r} at {position}: no disk is that large", offset=start)
            yield Block(start, device, position, zero)
            if not zero:
                yield from _payload(cursor, device, position)
        elif flags == PROGRESS and value <= 100:
            yield Percent(start, value)
        elif word == EOS:
            yield EndOfPart(start)
            return
        else:
            raise StreamError(
                f"the word {word:#018x} (flags {flags:#x}) is no record of the block section", offset=start
            )


def _payload(cursor: Cursor, device: str, position: int) -> Steps[None]:
    for piece in cursor.pieces(CHUNK, f"the data of device {device!r} at {position}"):
        yield BlockData(piece) if isinstance(piece, memoryview) else piece
