"""Digests of an image's contents, unit by unit, the same on both sides whatever the images are made of.

They are canonical: a unit of zeroes has the digest of zero bytes, whether it is allocated or not. What is known to be
zero is not read. Memory is flat: one buffer of `READ_AT_ONCE` bytes, and the digests of one slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from qemu_blkmig.engine.extents import Extent, joined
from qemu_blkmig.hashing import SIZES, Algorithm, hash_function
from qemu_blkmig.nbd.binding import libnbd
from qemu_blkmig.nbd.control import Cancelled, Control

UNIT = 1 << 20
"""Bytes that one digest stands for, where nothing else is asked for."""
SECTOR = 512
READ_AT_ONCE = 4 << 20
SLICE = 256 << 20
"""Bytes that one request for digests is about: it takes well under a second, so that others get their turn."""
MOST = 4096
"""Digests in one answer at most."""


class Reader(Protocol):
    """What an image is read through. Blocks."""

    def read(self, into: memoryview, offset: int) -> None:
        """Read `len(into)` bytes at `offset`. Raises `OSError` or `ConnectionLost`."""

    def zeroes(self, offset: int, length: int) -> Iterator[Extent]:
        """Ranges within the range that are known to read as zeroes, ascending. Raises as `read` does."""


def fault_of(extent: Extent, unit: int, size: int) -> str | None:
    """Why the digests of `extent`, in units of `unit`, of an image of `size` bytes cannot be told; None: they can."""
    if unit < SECTOR or unit > READ_AT_ONCE or unit & (unit - 1):
        return f"a unit of {unit} bytes is no power of two from {SECTOR} to {READ_AT_ONCE}"
    if extent.offset < 0 or extent.length <= 0 or extent.offset % unit or extent.end > size:
        return f"{extent.offset}+{extent.length} are no units of {unit} bytes within {size} bytes"
    if extent.length > MOST * unit:
        return f"{extent.length} bytes are more than {MOST} units of {unit}"
    return None


def digests_of(reader: Reader, extent: Extent, unit: int, algorithm: Algorithm, control: Control) -> bytes:
    """The digests of the units of `extent`, one after the other, the last unit maybe short; empty: all are zero.

    In `control.tally`, `copied` counts bytes read, `zeroed` those that did not need to be. `extent` and `unit` are as
    `fault_of` wants them. Raises `Cancelled`, `Refused` (no such hash here), and what the reader raises.
    """
    hashed, size = hash_function(algorithm), SIZES[algorithm]
    digests = bytearray(-(-extent.length // unit) * size)
    slot = bytearray(min(READ_AT_ONCE, extent.length))
    buffer, view = libnbd().Buffer.from_buffer(slot), memoryview(slot)
    for run in not_known_zero(reader.zeroes(extent.offset, extent.length), extent, unit, control):
        for offset in range(run.offset, run.end, READ_AT_ONCE):
            if control.cancelled:
                raise Cancelled
            length = min(READ_AT_ONCE, run.end - offset)
            reader.read(view[:length], offset)
            for start in range(0, length, unit):
                part = min(unit, length - start)
                if not buffer.is_zero(start, part):
                    place = (offset + start - extent.offset) // unit * size
                    digests[place : place + size] = hashed(view[start : start + part])
            control.tally.copied += length
    return bytes(digests) if any(digests) else b""


def differing_units(one: bytes, other: bytes, extent: Extent, unit: int, algorithm: Algorithm) -> list[Extent]:
    """The runs of units of `extent` whose digests differ, ascending, none touching another."""
    size = SIZES[algorithm]
    count = -(-extent.length // unit)
    one, other = (digests or bytes(count * size) for digests in (one, other))
    if one == other:
        return []
    found: list[Extent] = []
    for number in range(count):
        place = slice(number * size, (number + 1) * size)
        if one[place] != other[place]:
            offset = extent.offset + number * unit
            length = min(unit, extent.end - offset)
            if found and found[-1].end == offset:
                length += found[-1].length
                offset = found.pop().offset
            found.append(Extent(offset, length))
    return found


def not_known_zero(zeroes: Iterable[Extent], extent: Extent, unit: int, control: Control) -> Iterator[Extent]:
    """The runs of whole units of `extent` that `zeroes`, which may touch each other, leave; the rest is counted."""
    at = extent.offset
    for zero in joined(zeroes):
        start = -(-zero.offset // unit) * unit
        end = zero.end if zero.end == extent.end else zero.end // unit * unit
        if end <= start:
            continue
        if start > at:
            yield Extent(at, start - at)
        control.tally.zeroed += end - start
        at = end
    if at < extent.end:
        yield Extent(at, extent.end - at)
