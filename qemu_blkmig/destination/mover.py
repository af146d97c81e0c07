"""One disk on its way: copies ranges from the source's export into the writer.

Where there is a hash table, digests are taken of what was read, from the very buffer that is written.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_blkmig import errors
from qemu_blkmig.destination.hashtable import HashTable
from qemu_blkmig.destination.readback import ReadBack, Verified
from qemu_blkmig.destination.writers import Writer
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd.address import Address
from qemu_blkmig.nbd.binding import libnbd
from qemu_blkmig.nbd.connection import Connection, connect
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.nbd.plan import ALLOCATION, DEPTH, Action, Piece, Plan
from qemu_blkmig.nbd.pump import SMALL_ROOM, Lease, Limits, Pump
from qemu_blkmig.nbd.throttle import Throttle

_ZERO_UNIT_OF_MIXED = 4096
_TOUCH_UNIT = 4 << 20
_NEAR = 0.005
_MOST_TIMES = 4
_MOST_IN_FLIGHT = 32 << 20
"""A way that takes longer than `_NEAR` seconds there and back gets more requests, so many times as many, and bytes of
large ones, at most."""
_LOOK_AT_DIRTY_FROM = 1 << 20
"""Shorter dirty extents are read without asking for their block status first: a round trip costs more."""


@dataclass(frozen=True)
class Settings:
    """How a disk is read; see `protocol.Open`."""

    source: str | Path | Address
    export: str
    connections: int
    requests: int
    request_size: int
    zero_unit: int
    private_layers: int | None


class DiskMover:
    """Blocking: every method belongs in a worker thread, one at a time."""

    def __init__(
        self,
        disk: str,
        size: int,
        settings: Settings,
        writer: Writer,
        throttle: Throttle,
        *,
        reads_as_zero: bool,
        table: HashTable | None = None,
    ) -> None:
        """Connect to the source.

        With a `table`, extents must be whole units of it. Raises `ConnectionLost` when it cannot be reached, `Refused`
        when its size or what it tells does not fit.
        """
        self._disk = disk
        self._size = size
        self._writer = writer
        self._settings = settings
        self._untouched = bytearray(b"\1" * -(-size // _TOUCH_UNIT)) if reads_as_zero else bytearray()
        self._table = table
        # One for all goes: memory that is given back is faulted in again.
        self._read_back = None if table is None else ReadBack(writer, table)
        self._unit = 1 if table is None else table.unit
        self._unflushed = False
        self._lost: errors.DestinationWriteError | None = None
        self._sources = _connect_all(disk, size, settings)
        limits = limits_for(settings, self._sources[0].round_trip)
        self._pump = Pump(disk, self._sources, limits, throttle, unit=self._unit)

    def copy(self, extents: Sequence[Extent], control: Control, *, bulk: bool) -> float:
        """Copy the extents and tell the seconds it took; the figures are in `control.tally`.

        Raises `Refused`, `SourceReadError`, `ConnectionLost`, `DestinationWriteError`, `Cancelled`; nothing is in
        flight any more then.
        """
        self._check(extents)
        began = time.monotonic()
        classify = _classifier(self._settings.private_layers) if bulk else _zero_or_data
        look_from = 0 if bulk else _LOOK_AT_DIRTY_FROM
        plan = Plan(self._sources[0], extents, classify, look_from=look_from, disk=self._disk, unit=self._unit)
        is_zero_already = self._is_zero_already(extents, bulk=bulk)
        sink = _CopySink(self._disk, self._writer, self._settings.zero_unit, control, is_zero_already, self._table)
        self._touch(extents)
        self._unflushed = True
        self._pump.run(plan, sink, control)
        tally = control.tally
        owed = sum(extent.length for extent in extents)
        if tally.copied + tally.zeroed + tally.skipped != owed:
            raise RuntimeError(f"disk {self._disk}: {tally} does not account for {owed} bytes")
        return time.monotonic() - began

    def flush(self) -> None:
        """Make all that was copied stable, and the hash table that tells of it. Raises `DestinationWriteError`."""
        lost, self._lost = self._lost, None
        if lost is not None:
            raise lost
        try:
            self._writer.flush()
            if self._table is not None:
                self._table.sync()
        except OSError as error:
            raise write_error(self._disk, None, error.errno or 0, "flushed") from error
        except errors.ConnectionLost as error:
            what = f"the destination cannot be flushed: {error}"
            raise errors.DestinationWriteError(what, disk=self._disk, offset=None, errno=0) from error
        self._unflushed = False

    def verify(self, most: int, interrupted: Callable[[], bool]) -> Verified:
        """Read back about `most` bytes of what was written and not read back since, past the page cache where possible.

        Ends early when `interrupted`. Raises `Refused` where nothing is hashed, `DestinationWriteError`.
        """
        if self._read_back is None:
            raise errors.Refused("nothing was hashed: there is nothing to verify by", disk=self._disk)
        if self._unflushed:
            try:
                self.flush()
            except errors.DestinationWriteError as error:
                self._lost = error  # a second flush would succeed, though this one has dropped what it was to keep
                raise
        try:
            return self._read_back.run(most, interrupted)
        except OSError as error:
            raise write_error(self._disk, None, error.errno or 0, "read back") from error
        except errors.ConnectionLost as error:
            what = f"the destination cannot be read back: {error}"
            raise errors.DestinationWriteError(what, disk=self._disk, offset=None, errno=0) from error

    def disconnect(self) -> None:
        """Let go of the source."""
        for connection in self._sources:
            connection.close()

    def _check(self, extents: Sequence[Extent]) -> None:
        end = 0
        for extent in extents:
            if extent.length <= 0 or extent.offset < end or extent.end > self._size:
                what = f"extent {extent.offset}+{extent.length} is out of order or beyond the {self._size} bytes"
                raise errors.Refused(what, disk=self._disk)
            end = extent.end
            if extent.offset % self._unit or (end % self._unit and end != self._size):
                what = f"extent {extent.offset}+{extent.length} does not hold whole units of {self._unit} bytes"
                raise errors.Refused(what, disk=self._disk)

    def _is_zero_already(self, extents: Sequence[Extent], *, bulk: bool) -> Callable[[int, int], bool]:
        """Tells where zeroes need not be written, by what no copy before this one began to write."""
        if not (bulk and self._untouched and extents):
            return lambda _offset, _length: False
        base = extents[0].offset // _TOUCH_UNIT
        before = bytes(self._untouched[base : (extents[-1].end - 1) // _TOUCH_UNIT + 1])

        def is_zero_already(offset: int, length: int) -> bool:
            return before.find(0, offset // _TOUCH_UNIT - base, (offset + length - 1) // _TOUCH_UNIT - base + 1) < 0

        return is_zero_already

    def _touch(self, extents: Sequence[Extent]) -> None:
        if not self._untouched:
            return
        for extent in extents:
            first, last = extent.offset // _TOUCH_UNIT, (extent.end - 1) // _TOUCH_UNIT
            self._untouched[first : last + 1] = bytes(last + 1 - first)


def write_error(disk: str, offset: int | None, number: int, verb: str = "written") -> errors.DestinationWriteError:
    """The error that tells what the destination did not take, and why."""
    place = "" if offset is None else f" at offset {offset}"
    what = f"the destination cannot be {verb}{place}: {os.strerror(number)}"
    return errors.DestinationWriteError(what, disk=disk, offset=offset, errno=number)


def zero_runs(view: memoryview, offset: int, unit: int) -> Iterator[tuple[int, int, bool]]:
    """(start, end, is zero) of the runs of `view`, which lies at `offset` of the disk, in aligned units."""
    buffer = libnbd().Buffer.from_buffer(view)
    start, was_zero = 0, False
    at, length = 0, len(view)
    while at < length:
        end = min(length, at + unit - (offset + at) % unit)
        zero = bool(buffer.is_zero(at, end - at))
        if at and zero is not was_zero:
            yield start, at, was_zero
            start = at
        was_zero, at = zero, end
    if length:
        yield start, length, was_zero


class _CopySink:
    """Writes what arrives, zeroes found in it as zeroes, and notes in `table` what it writes."""

    def __init__(
        self,
        disk: str,
        writer: Writer,
        zero_unit: int,
        control: Control,
        is_zero_already: Callable[[int, int], bool],
        table: HashTable | None,
    ) -> None:
        self.failure: Exception | None = None
        self.under_way = 0
        self._disk = disk
        self._writer = writer
        self._zero_unit = zero_unit
        self._tally = control.tally
        self._is_zero_already = is_zero_already
        self._table = table

    @property
    def connections(self) -> Sequence[Connection]:
        return self._writer.connections

    def settle(self) -> None:
        self._writer.settle()

    def pass_over(self, piece: Piece) -> None:
        if piece.action is Action.SKIP:
            self._tally.skipped += piece.length
            return
        if not self._is_zero_already(piece.offset, piece.length):
            self._note_down(lambda table: table.zeroed(piece.offset, piece.length))
        self._zero(piece.offset, piece.length, lambda: None)

    def is_nothing(self, zeroes: Piece) -> bool:
        return self._is_zero_already(zeroes.offset, zeroes.length)

    def data(self, lease: Lease) -> None:
        offset = lease.piece.offset
        self._note_down(lambda table: table.wrote(offset, lease.view))
        zero_unit = min(self._zero_unit, _ZERO_UNIT_OF_MIXED) if lease.piece.mixed else self._zero_unit
        runs = list(zero_runs(lease.view, offset, zero_unit))
        left = len(runs)

        def run_over() -> None:
            nonlocal left
            left -= 1
            if not left:
                lease.release()

        for start, end, zero in runs:
            if zero:
                self._zero(offset + start, end - start, run_over)
            else:
                self._write(lease.view[start:end], offset + start, run_over)

    def _zero(self, offset: int, length: int, then: Callable[[], None]) -> None:
        if self._is_zero_already(offset, length):
            self._tally.zeroed += length
            then()
            return

        def done(error: int) -> None:
            self.under_way -= 1
            self._note(error, offset)
            self._tally.zeroed += 0 if error else length
            then()

        self.under_way += 1
        self._writer.zero(offset, length, done)

    def _write(self, data: memoryview, offset: int, then: Callable[[], None]) -> None:
        def done(error: int) -> None:
            self.under_way -= 1
            self._note(error, offset)
            self._tally.copied += 0 if error else len(data)
            then()

        self.under_way += 1
        self._writer.write(data, offset, done)

    def _note_down(self, note: Callable[[HashTable], None]) -> None:
        """Before the bytes go: whatever becomes of them, the table does not vouch for what was there before."""
        if self._table is None:
            return
        try:
            note(self._table)
        except OSError as error:
            what = f"the hashes of what is written cannot be stored: {error.strerror}"
            number = error.errno or 0
            lost = errors.DestinationWriteError(what, disk=self._disk, offset=None, errno=number)
            self.failure = self.failure or lost

    def _note(self, error: int, offset: int) -> None:
        if error and self.failure is None:
            self.failure = write_error(self._disk, offset, error)


def limits_for(settings: Settings, round_trip: float) -> Limits:
    """What is to be in flight on a connection, so that a long way is full; `round_trip` in seconds."""
    times = min(_MOST_TIMES, math.ceil(round_trip / _NEAR))
    room = _MOST_IN_FLIGHT // (settings.connections * settings.request_size)
    requests = max(settings.requests, min(settings.requests * times, room))
    return Limits(requests, settings.request_size, small=SMALL_ROOM * max(1, times))


def _connect_all(disk: str, size: int, settings: Settings) -> list[Connection]:
    contexts = [ALLOCATION] if settings.private_layers is None else [ALLOCATION, DEPTH]
    made: list[Connection] = []
    try:
        for _ in range(settings.connections):
            made.append(connect(settings.source, settings.export, contexts=contexts))
        if made[0].size != size:
            raise errors.Refused(f"the source has {made[0].size} bytes, the destination {size}", disk=disk)
        if settings.private_layers is not None and DEPTH not in made[0].contexts:
            raise errors.Refused("the source's export does not tell allocation depths (shared base)", disk=disk)
    except BaseException:
        for connection in made:
            connection.close()
        raise
    return made


def _classifier(private_layers: int | None) -> Callable[[bool, int | None], Action]:
    if private_layers is None:
        return _zero_or_data

    def classify(zero: bool, depth: int | None) -> Action:
        if depth is not None and not 1 <= depth <= private_layers:
            return Action.SKIP
        return _zero_or_data(zero, depth)

    return classify


def _zero_or_data(zero: bool, _depth: int | None) -> Action:
    return Action.ZERO if zero else Action.DATA
