"""The decoder's place in its input: takes exact pieces out of bytes that come as they come, and does no I/O.

A parser is a generator that yields events, and None when it needs more input. Nothing is kept but the piece that is
being taken; where bytes are passed on, also the few of them of which it is not known yet whether they are to be.
"""

from __future__ import annotations

import enum
from collections.abc import Generator
from typing import TypeVar

from qemu_blkmig.errors import StreamError
from qemu_blkmig.stream.events import Event, Passed

_T = TypeVar("_T")
Steps = Generator[Event | None, None, _T]


class Fate(enum.Enum):
    """What becomes of the bytes that are taken, besides being parsed."""

    DROP = 0
    PASS = 1
    UNDECIDED = 2


class Cursor:
    """`offset` counts from the stream's beginning. With `pass_on`, bytes whose fate is PASS become `Passed` events."""

    def __init__(self, *, pass_on: bool) -> None:
        self._pass_on = pass_on
        self._view = memoryview(b"")
        self._at = 0
        self._base = 0
        self._told = 0
        self._fate = Fate.PASS if pass_on else Fate.DROP
        self._undecided = bytearray()
        self._ended = False

    @property
    def offset(self) -> int:
        """How many bytes were taken."""
        return self._base + self._at

    def give(self, data: memoryview) -> None:
        """The next input; the last one must have been used up."""
        if self._at < len(self._view):
            raise RuntimeError("the last input was not iterated to its end")
        self._base += len(self._view)
        self._view, self._at, self._told = data, 0, 0

    def end(self) -> None:
        """There is no more input."""
        self.give(memoryview(b""))
        self._ended = True

    def take(self, count: int, expected: str) -> Steps[bytes]:
        """Exactly `count` bytes, copied; raises `StreamError` where the stream ends before."""
        at = self._at
        if at + count <= len(self._view):
            self._at = at + count
            return bytes(self._view[at : at + count])
        start = self.offset
        taken = bytearray()
        while len(taken) < count:
            piece = self._some(count - len(taken))
            taken += piece
            if not piece:
                yield from self._more(start, expected)
        return bytes(taken)

    def number(self, size: int, expected: str) -> Steps[int]:
        """A big-endian number of `size` bytes."""
        at = self._at
        if at + size <= len(self._view):
            self._at = at + size
            return int.from_bytes(self._view[at : at + size], "big")
        return int.from_bytes((yield from self.take(size, expected)), "big")

    def string(self, size: int, expected: str) -> Steps[str]:
        """A name that is told after its length, a number of `size` bytes; at most 255 bytes."""
        start = self.offset
        length = yield from self.number(size, f"the length of {expected}")
        if length > 255:
            raise StreamError(f"{expected} of {length} bytes is longer than any QEMU's", offset=start)
        text = yield from self.take(length, expected)
        return text.decode("utf-8", "backslashreplace")

    def pieces(self, count: int, expected: str) -> Generator[Event | memoryview | None, None, None]:
        """`count` bytes, uncopied, in pieces as they came."""
        start = self.offset
        while count:
            piece = self._some(count)
            count -= len(piece)
            if piece:
                yield piece
            else:
                yield from self._more(start, expected)

    def skip(self, count: int, expected: str) -> Steps[None]:
        """Take `count` bytes and forget them."""
        at = self._at
        if at + count <= len(self._view):
            self._at = at + count
            return
        start = self.offset
        while count:
            skipped = len(self._some(count))
            count -= skipped
            if not skipped:
                yield from self._more(start, expected)

    def skip_all(self) -> Steps[None]:
        """Take everything up to the stream's end."""
        while not (yield from self.at_end()):
            self._at = len(self._view)

    def at_end(self) -> Steps[bool]:
        """Whether the stream has ended here."""
        while self._at == len(self._view):
            yield from self._tell()
            if self._ended:
                return True
            yield None
        return False

    def hesitate(self) -> Steps[None]:
        """From here on it is not known whether what is taken is to be passed on; `decide` tells."""
        yield from self._tell()
        if self._pass_on:
            self._fate = Fate.UNDECIDED

    def decide(self, fate: Fate) -> Steps[None]:
        """What becomes of the bytes taken since `hesitate`, and from now on."""
        if not self._pass_on:
            return
        if self._undecided and fate is Fate.PASS:
            yield Passed(memoryview(bytes(self._undecided)))
        self._undecided.clear()
        self._fate = fate
        if fate is Fate.DROP:
            self._told = self._at

    def _some(self, count: int) -> memoryview:
        piece = self._view[self._at : self._at + count]
        self._at += len(piece)
        return piece

    def _more(self, start: int, expected: str) -> Steps[None]:
        yield from self._tell()
        if self._ended:
            raise StreamError(f"the stream ends at byte {self.offset} within {expected}", offset=start)
        yield None

    def _tell(self) -> Steps[None]:
        taken, self._told = self._view[self._told : self._at], self._at
        if not taken:
            return
        if self._fate is Fate.PASS:
            yield Passed(taken)
        elif self._fate is Fate.UNDECIDED:
            self._undecided += taken
