"""Proves from a disk alone that no record of the guest's writer was lost or torn.

What operation N writes, and where, is a pure function of N, the writer's start time (its epoch) and its kind. So the
highest number found on the disk tells what every place of it must hold: the last operation on it up to that number.

A record fills one block (4096 bytes; 512 on disks below 64 KiB), little endian: magic, epoch, number, block, the
guest's time and its longest gap between two writes so far (both in microseconds), geometry (positions | kind << 32),
and then, up to its end, one 64-bit check over all these, repeated: part of another record anywhere shows.

Positions are spread evenly over the disk, the last is its last block. Where there are 64 or more, the last eighth is a
zone in which records, zeroes and discards take turns. A discard promises nothing, so nothing is expected after one.
guest/writer.pl is the other half of this file: `_Epoch.operation` and `mix` must say the same as it does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

MAGIC: Final = b"BLKMIGR1"
KINDS: Final = ("idle", "random", "hot", "sequential", "zipf", "log")

_HEADER: Final = struct.Struct("<8s7Q")
_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
_CHECK_FACTORS: Final = tuple(
    factor & _MASK for factor in (-4417276706812531889, 1609587929392839161, -8796714831421723037, 2870177450012600261)
)
_READ_SIZE: Final = 1 << 20

ReadAt = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class LostRecord:
    """At byte `offset` record `expected` should be (0: zeroes), but record `found` is (None: no record, but zeroes)."""

    offset: int
    expected: int
    found: int | None


@dataclass(frozen=True, slots=True)
class RecordsReport:
    """What the disk holds of the newest epoch's records.

    `highest`: the largest record number found; `acked`: the one that it must at least be. `verified`: positions that
    hold exactly what they must. `lost`: see `LostRecord`. `torn`: offsets of blocks that hold neither a whole record
    nor zeroes. `misplaced`: offsets of whole records that belong elsewhere. `longest_gap`: the guest's own longest
    time between two completed writes, in seconds, as far as it had told the disk. A pause of the guest counts in it
    some two seconds after it ended.
    """

    highest: int
    acked: int
    verified: int
    lost: tuple[LostRecord, ...]
    torn: tuple[int, ...]
    misplaced: tuple[int, ...]
    longest_gap: float

    @property
    def sound(self) -> bool:
        """Whether there are records, and no acknowledged one is lost, torn or in a wrong place."""
        damaged = self.lost or self.torn or self.misplaced
        return self.highest > 0 and self.highest >= self.acked and not damaged


def check(read_at: ReadAt, size: int, *, acked: int = 0) -> RecordsReport:
    """Check a disk of `size` bytes, read by `read_at(offset, length)`, on which nobody writes meanwhile.

    `acked`: the largest number that the guest had acknowledged before: a disk that is older than that lost records.
    """
    layout = _find_layout(read_at, size)
    if layout is None:
        return RecordsReport(0, acked, 0, (), (), (), 0.0)
    seen = [_parse(block) for block in layout.blocks(read_at)]
    records = [found for found in seen if isinstance(found, _Record)]
    epoch = max((record.epoch for record in records), default=0)
    current = [record for record in records if record.epoch == epoch]
    highest = max((record.number for record in current), default=0)
    expected = _Epoch(epoch, layout).state_after(highest)
    verdict = _Verdict()
    for position, found in enumerate(seen):
        verdict.judge(layout, position, found, expected.get(position, _NEVER), epoch)
    gap = max((record.gap_us for record in current), default=0) / 1e6
    return RecordsReport(
        highest, acked, verdict.verified, tuple(verdict.lost), tuple(verdict.torn), tuple(verdict.misplaced), gap
    )


def mix(value: int) -> int:
    """Scramble 64 bits (the finaliser of splitmix64)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


@dataclass(frozen=True, slots=True)
class _Record:
    epoch: int
    number: int
    block: int
    gap_us: int
    geometry: int


_Content = _Record | Literal["zeroes", "torn", "foreign"]


def _parse(block: bytes) -> _Content:
    """What a block holds; "foreign" where it never was a record's."""
    if not block.startswith(MAGIC):
        return "foreign" if block.count(0) != len(block) else "zeroes"
    _, epoch, number, place, time_us, gap_us, geometry, check_value = _HEADER.unpack_from(block)
    total = epoch + number * _GOLDEN
    for word, factor in zip((place, time_us, gap_us, geometry), _CHECK_FACTORS, strict=True):
        total += word * factor
    filling = block[_HEADER.size - 8 :]
    if check_value != mix(total & _MASK) or filling != filling[:8] * (len(filling) // 8):
        return "torn"
    return _Record(epoch, number, place, gap_us, geometry)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where positions lie: `count` of them, on a disk of `total` blocks."""

    block_size: int
    total: int
    count: int
    kind: str

    def block(self, position: int) -> int:
        return 0 if self.count == 1 else position * (self.total - 1) // (self.count - 1)

    def blocks(self, read_at: ReadAt) -> Iterator[bytes]:
        """The content of every position, in order."""
        if self.count < self.total:
            for position in range(self.count):
                yield read_at(self.block(position) * self.block_size, self.block_size)
            return
        for start in range(0, self.total * self.block_size, _READ_SIZE):
            piece = read_at(start, min(_READ_SIZE, self.total * self.block_size - start))
            for offset in range(0, len(piece), self.block_size):
                yield piece[offset : offset + self.block_size]


def _find_layout(read_at: ReadAt, size: int) -> _Layout | None:
    """The layout, told by any whole record. Record 1 lies in block 0, so that one tells unless it is damaged."""
    block_size = 512 if size < 65536 else 4096
    whole = size - size % block_size
    for start in (0, *range(block_size, whole, _READ_SIZE)):
        length = min(_READ_SIZE if start else block_size, whole - start)
        piece = read_at(start, length)
        offset = piece.find(MAGIC)
        while offset >= 0:
            found = _parse(piece[offset : offset + block_size]) if offset % block_size == 0 else "foreign"
            if isinstance(found, _Record) and found.geometry >> 32 < len(KINDS):
                return _Layout(block_size, size // block_size, found.geometry & 0xFFFFFFFF, KINDS[found.geometry >> 32])
            offset = piece.find(MAGIC, offset + 1)
    return None


@dataclass(frozen=True, slots=True)
class _Operation:
    """`number` wrote a record, zeroes or a discard to `length` positions from `first`."""

    number: int
    what: Literal["write", "zero", "discard"]
    first: int
    length: int


_NEVER: Final = (_Operation(0, "discard", 0, 0),)


class _Epoch:
    """The operations of one run of the writer; the same as writer.pl's `operation`."""

    def __init__(self, epoch: int, layout: _Layout) -> None:
        self._epoch = epoch
        self._count = layout.count
        self._zone = layout.count if layout.count < 64 else layout.count - layout.count // 8
        self._contiguous = layout.count == layout.total
        self._kind = layout.kind

    def operation(self, number: int) -> _Operation:
        draw = mix((self._epoch + number * _GOLDEN) & _MASK)
        low, high = draw & 0x7FFFFFFF, draw >> 33
        if number == 1:
            return _Operation(number, "write", 0, 1)
        if self._zone < self._count and number % 8 == 0:
            first = self._zone + low % (self._count - self._zone)
            if number % 16 == 8:
                return _Operation(number, "write", first, 1)
            length = min(1 + high % 8 if self._contiguous else 1, self._count - first)
            return _Operation(number, "discard" if number % 64 == 0 else "zero", first, length)
        return _Operation(number, "write", self._ordinary_position(number, low, high), 1)

    def _ordinary_position(self, number: int, low: int, high: int) -> int:
        if self._kind == "sequential":
            return (number - 1 - number // 8 if self._zone < self._count else number - 1) % self._zone
        if self._kind == "zipf":
            bits = high % self._zone.bit_length()
            return ((1 << bits) - 1 + low % (1 << bits)) % self._zone
        if self._kind == "log":
            half = self._zone // 2
            return low % 4 % self._zone if number % 16 == 1 else half + number % (self._zone - half)
        if self._kind == "hot" and high % 10 < 9:
            return low % (self._zone // 10 or 1)
        return low % self._zone

    def state_after(self, highest: int) -> dict[int, tuple[_Operation, ...]]:
        """By position, what it may hold when record `highest` is the last: the last operation on it, and if operation
        `highest` + 1 is a zeroing or a discard, that one too: it leaves no number that would tell whether it came.
        """
        state: dict[int, tuple[_Operation, ...]] = {}
        for number in range(highest, 0, -1):
            operation = self.operation(number)
            for position in range(operation.first, operation.first + operation.length):
                state.setdefault(position, (operation,))
            if len(state) == self._count:
                break
        following = self.operation(highest + 1)
        if following.what != "write":
            for position in range(following.first, following.first + following.length):
                state[position] = (*state.get(position, _NEVER), following)
        return state


class _Verdict:
    """Compares what was found with what may be there, position by position."""

    def __init__(self) -> None:
        self.verified = 0
        self.lost: list[LostRecord] = []
        self.torn: list[int] = []
        self.misplaced: list[int] = []

    def judge(
        self, layout: _Layout, position: int, found: _Content, allowed: tuple[_Operation, ...], epoch: int
    ) -> None:
        block = layout.block(position)
        offset = block * layout.block_size
        if isinstance(found, _Record) and found.block != block:
            self.misplaced.append(offset)
        elif found == "torn":
            self.torn.append(offset)
        elif any(operation.what == "discard" for operation in allowed):
            return
        elif any(_holds(found, operation, epoch) for operation in allowed):
            self.verified += 1
        elif found == "foreign":
            self.torn.append(offset)
        else:
            expected = allowed[0].number if allowed[0].what == "write" else 0
            number = found.number if isinstance(found, _Record) and found.epoch == epoch else None
            self.lost.append(LostRecord(offset, expected, number))


def _holds(found: _Content, operation: _Operation, epoch: int) -> bool:
    if operation.what == "zero":
        return found == "zeroes"
    return isinstance(found, _Record) and (found.epoch, found.number) == (epoch, operation.number)
