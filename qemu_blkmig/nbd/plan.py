"""What is to be done with the ranges of one batch, found out just ahead of the copy and never for a whole disk."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qemu_blkmig import errors
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd.connection import STATUS_LIMIT, Connection, Entries

ALLOCATION = "base:allocation"
DEPTH = "qemu:allocation-depth"
WINDOW = 256 << 20
"""Bytes asked for in one lookup, at first; twice as many each time that little was found, up to `WIDEST`."""
WIDEST = 1 << 30
"""Bytes: a raw image's every run costs QEMU's main loop two lseeks."""
LITTLE = 4
"""Pieces."""
DESERT = 8
"""After so many lookups in a row that found nothing but one run each, they may grow beyond `WIDEST`."""

_ZERO = 2
_AHEAD = 64


class Action(enum.Enum):
    DATA = "data"
    ZERO = "zero"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` bytes from `offset` that share a fate.

    `mixed`: units that are to be read whole though parts of them need not be: they may hold zeroes.
    """

    offset: int
    length: int
    action: Action
    mixed: bool = False

    @property
    def end(self) -> int:
        """The first byte after the piece."""
        return self.offset + self.length

    def resized(self, length: int) -> Piece:
        """The same, of `length` bytes."""
        return Piece(self.offset, length, self.action, self.mixed)


Classify = Callable[[bool, int | None], Action]
"""From (reads as zeroes, allocation depth or None) to what is to be done."""


class Plan:
    """The pieces of `ranges` in order; ranges shorter than `look_from` are data without a lookup.

    Pieces are whole units of `unit` bytes, as the ranges are (but where a range ends with the disk): a unit of which
    parts have different fates is data.

    Lookups are asynchronous: `look_ahead` starts one, `take` gives what is known. Both belong in a poll loop that
    drives `connection`.

    With `wanted` the ranges are just what may be looked up: taken is what lies before `wanted`, and what `go_on` adds
    to it. Pieces end there.
    """

    def __init__(
        self, connection: Connection, ranges: Sequence[Extent], classify: Classify, *, look_from: int, disk: str,
        unit: int = 1, wanted: int | None = None,
    ) -> None:  # fmt: skip
        self._ends = None if wanted is None else deque([wanted])
        self._taken = ranges[0].offset if ranges else 0
        self._last = wanted
        self._connection = connection
        self._unknown = deque(ranges)
        self._classify = classify
        self._look_from = look_from if ALLOCATION in connection.contexts or DEPTH in connection.contexts else 1 << 63
        self._disk = disk
        self._unit = unit
        self._window = WINDOW
        self._uniform = 0
        self._begun: Piece | None = None
        self._known: deque[Piece] = deque()
        self._asked: Extent | None = None
        self._answers: list[tuple[Any, int]] = []

    @property
    def under_way(self) -> bool:
        """Whether a lookup has not been answered yet."""
        return self._asked is not None and not self._answers

    @property
    def exhausted(self) -> bool:
        """Whether `take` has given everything."""
        if self._last is not None:
            return self._taken >= self._last
        return not (self._unknown or self._known or self._asked)

    @property
    def goes_on_at(self) -> int | None:
        """What is wanted ends here, and `go_on` may add to it; None: there is nothing to add."""
        return self._last

    def go_on(self, wanted: int) -> None:
        """What lies before `wanted` may be taken, too; may be called from another thread."""
        if self._ends is not None:
            self._ends.append(wanted)
            self._last = wanted

    def look_ahead(self) -> None:
        """Take in an answered lookup, and start the next unless enough is known.

        Raises `ConnectionLost`, and `SourceReadError` where the source gives no block status.
        """
        if self._answers:
            self._take_in()
        while self._unknown and self._asked is None and len(self._known) < _AHEAD:
            self._look_at(self._unknown.popleft())

    def take(self, most: Callable[[Piece], int]) -> Piece | None:
        """The next piece, cut to at most `most(piece)` bytes; None when nothing is known right now."""
        if not self._known:
            return None
        piece = self._known.popleft()
        while self._known and _continues(piece, self._known[0]):
            piece = piece.resized(piece.length + self._known.popleft().length)
        if (end := self._end_for(piece)) <= piece.offset:
            self._known.appendleft(piece)
            return None
        piece = self._cut(piece, end - piece.offset)
        piece = self._cut(piece, most(piece))
        self._taken = piece.end
        return piece

    def put_back(self, piece: Piece) -> None:
        """Return a piece that cannot be begun now."""
        self._known.appendleft(piece)
        self._taken = piece.offset

    def _end_for(self, piece: Piece) -> int:
        """Where the piece has to end; no further than where it begins if it is not wanted yet."""
        if self._ends is None:
            return piece.end
        while len(self._ends) > 1 and self._ends[0] <= piece.offset:
            self._ends.popleft()
        return self._ends[0]

    def _cut(self, piece: Piece, limit: int) -> Piece:
        """At most the first `limit` bytes of the piece; the rest is put back."""
        if piece.length <= limit:
            return piece
        self._known.appendleft(Piece(piece.offset + limit, piece.length - limit, piece.action, piece.mixed))
        return piece.resized(limit)

    def _look_at(self, extent: Extent) -> None:
        # What is left when an answer came short may end a unit that was begun.
        if extent.length < self._look_from and self._begun is None:
            self._known.append(Piece(extent.offset, extent.length, Action.DATA))
            return
        # Answers may be short, and the next window then begins anywhere: it ends with a unit all the same.
        window = self._window - (extent.offset + self._window) % self._unit
        asked = Extent(extent.offset, min(window, extent.length))
        if extent.length > asked.length:
            self._unknown.appendleft(Extent(asked.end, extent.length - asked.length))
        self._answers = []
        self._connection.status(asked.offset, asked.length, self._answers)
        self._asked = asked

    def _take_in(self) -> None:
        asked = self._asked
        if asked is None:
            return
        answer, error = self._answers.pop()
        covered, known = asked.offset, len(self._known)
        if not error:
            for length, flags in _merged(answer, asked.length, self._connection.contexts):
                action = self._classify(*flags)
                self._learn(covered, length, action, asked.end)
                covered += length
        if covered == asked.offset:
            what = f"the source gives no block status at offset {covered} (errno {error})"
            raise errors.SourceReadError(what, disk=self._disk, offset=covered)
        self._asked = None
        self._window = self._next_window(len(self._known) - known if covered >= asked.end else None)
        if covered < asked.end:
            self._unknown.appendleft(Extent(covered, asked.end - covered))

    def _next_window(self, found: int | None) -> int:
        """Bytes of the next lookup; `found`: the last one's pieces, None if its answer came short."""
        if found is None or found > LITTLE or DEPTH in self._connection.contexts:
            self._uniform = 0
            return WINDOW
        self._uniform = self._uniform + 1 if found <= 1 else 0
        return min(2 * self._window, STATUS_LIMIT if self._uniform >= DESERT else WIDEST)

    def _learn(self, offset: int, length: int, action: Action, end: int) -> None:
        """Round a run out to units; `end` is where the last unit of its range ends."""
        if self._begun is not None:
            begun = self._begun
            taken = min(length, min(begun.offset // self._unit * self._unit + self._unit, end) - begun.end)
            self._begun = Piece(
                begun.offset,
                begun.length + taken,
                begun.action if action is begun.action else Action.DATA,
                begun.mixed or action is not begun.action,
            )
            offset, length = offset + taken, length - taken
            if self._begun.end % self._unit == 0 or self._begun.end == end:
                self._known.append(self._begun)
                self._begun = None
        whole = length if offset + length == end else length // self._unit * self._unit
        if whole:
            self._known.append(Piece(offset, whole, action))
        if length > whole:
            self._begun = Piece(offset + whole, length - whole, action)


def _continues(piece: Piece, other: Piece) -> bool:
    return other.action is piece.action and other.mixed is piece.mixed and other.offset == piece.end


def _merged(
    answer: dict[str, Entries], length: int, contexts: frozenset[str]
) -> Iterator[tuple[int, tuple[bool, int | None]]]:
    """(length, (zero, depth)) of the runs that every negotiated context tells of, clipped to `length` in all."""
    sources = [answer.get(name, []) for name in (ALLOCATION, DEPTH)]
    if DEPTH not in contexts:
        sources[1] = [(length, -1)]
    if ALLOCATION not in contexts:
        sources[0] = [(length, 0)]
    allocation, depth = (_nonempty(source) for source in sources)
    a, d = next(allocation, None), next(depth, None)
    while a and d and length:
        run = min(a[0], d[0], length)
        length -= run
        yield run, (bool(a[1] & _ZERO), None if d[1] < 0 else d[1])
        a = (a[0] - run, a[1]) if a[0] > run else next(allocation, None)
        d = (d[0] - run, d[1]) if d[0] > run else next(depth, None)


def _nonempty(entries: Entries) -> Iterator[tuple[int, int]]:
    return (entry for entry in entries if entry[0])
