"""One disk on its way: copies ranges from the source's export into the writer.

Where there is a hash table, digests are taken of what was read, from the very buffer that is written.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from qemu_blkmig import errors
from qemu_blkmig.destination.hashtable import HashTable, NotStored
from qemu_blkmig.destination.readback import ReadBack, Sample, Verified, are_strange
from qemu_blkmig.destination.sink import Copying, CopySink, not_stored, write_error
from qemu_blkmig.destination.writers import Writer
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd.address import Address
from qemu_blkmig.nbd.connection import Connection, connect
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.nbd.plan import ALLOCATION, DEPTH, Action, Plan
from qemu_blkmig.nbd.pump import SMALL_ROOM, Limits, Pump
from qemu_blkmig.nbd.throttle import Throttle

_TOUCH_UNIT, _TOUCHED = 4 << 20, 1 << 17
"""What was written to is noted by so many bytes, or more of a large disk: so many notes are enough for any."""
_NEAR = 0.005
_MOST_TIMES = 4
_MOST_IN_FLIGHT = 32 << 20
"""A way that takes longer than `_NEAR` seconds there and back gets more requests, so many times as many, and bytes of
large ones, at most."""
_LOOK_AT_DIRTY_FROM = 1 << 20
"""Shorter dirty extents are read without asking for their block status first: a round trip costs more."""


_T = TypeVar("_T")


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
    """What blocks belongs in a worker thread, one call at a time, but for what `works_beside`."""

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
        self._touch_unit = max(_TOUCH_UNIT, -(-size // _TOUCHED))
        self._untouched = bytearray(b"\1" * -(-size // self._touch_unit)) if reads_as_zero else bytearray()
        self._table = table
        # One for all goes: memory that is given back is faulted in again.
        self._read_back = None if table is None else ReadBack(writer, table)
        self._unit = 1 if table is None else table.unit
        self._flushing = threading.RLock()
        self._unflushed = False
        self._lost: errors.DestinationWriteError | None = None
        self._sources = _connect_all(disk, size, settings)
        limits = limits_for(settings, self._sources[0].round_trip)
        self._pump = Pump(disk, self._sources, limits, throttle, unit=self._unit)

    def course(
        self, extents: Sequence[Extent], control: Control, *, bulk: bool, over: Callable[[Copying], None]
    ) -> Course:
        """A course that begins with a copy of the extents. Raises `Refused`.

        `over` is called, in the thread that runs it, with each copy that is over.
        """
        self._check(extents)
        settings = self._settings
        classify = _classifier(settings.private_layers) if bulk else _zero_or_data
        look_from = 0 if bulk else _LOOK_AT_DIRTY_FROM
        goes_on = bulk and len(extents) == 1
        reach = [Extent(extents[0].offset, self._size - extents[0].offset)] if goes_on else extents
        plan = Plan(
            self._sources[0],
            reach,
            classify,
            look_from=look_from,
            disk=self._disk,
            unit=self._unit,
            wanted=extents[0].end if goes_on else None,
        )
        zero_already = self._zero_already(reach, bulk=bulk)
        sink = CopySink(self._disk, self._writer, settings.zero_unit, zero_already, self._table)
        return Course(self, self._pump, plan, sink, control, over, extents)

    def begin(self, extents: Sequence[Extent]) -> None:
        """The extents will be written to. Raises `Refused` where they cannot be copied."""
        self._check(extents)
        self._touch(extents)
        self.wrote()

    def wrote(self) -> None:
        """Something was written that may not be stable."""
        self._unflushed = True

    @property
    def works_beside(self) -> bool:
        """Whether `flush`, and `verify` of what is not copied, may each go on in a thread of its own beside copies."""
        return self._writer.works_beside

    def flush(self) -> None:
        """Make all that was copied stable, and the hash table that tells of it. Raises `DestinationWriteError`."""
        with self._flushing:
            lost, self._lost = self._lost, None
            if lost is not None:
                raise lost
            self._unflushed = False
            try:
                self._writer.flush()
                if self._table is not None:
                    self._table.sync()
            except (OSError, errors.ConnectionLost) as error:
                self._unflushed = True
                raise self._failure(error, "flushed") from error

    def _failure(self, error: OSError | errors.ConnectionLost, verb: str) -> errors.DestinationWriteError:
        if isinstance(error, NotStored):
            return not_stored(self._disk, error)
        if isinstance(error, OSError):
            return write_error(self._disk, None, error.errno or 0, verb)
        what = f"the destination cannot be {verb}: {error}"
        return errors.DestinationWriteError(what, disk=self._disk, offset=None, errno=0)

    def verify(self, most: int, interrupted: Callable[[], bool], below: int | None = None) -> Verified:
        """Read back about `most` bytes of what was written and not read back since, past the page cache where possible.

        It is flushed before; all `below` that byte, which alone is read back if it is told, is stable already. Ends
        early when `interrupted`. Raises `Refused` where nothing is hashed, `DestinationWriteError`.
        """
        if below is None:
            self._flush_for_reading()
        elif not self.works_beside:
            below = 0
        return self._reading(lambda read_back: read_back.run(most, interrupted, below))

    def arrived(self, offset: int, most: int, interrupted: Callable[[], bool]) -> list[Extent]:
        """Of about `most` bytes from `offset` on, what lies there, stable, as one before us was to write it.

        Raises as `verify`, and `Refused` where there is no such offset.
        """
        self._check([Extent(offset, self._size - offset)])
        self._unflushed = True
        self._flush_for_reading()
        return self._reading(lambda read_back: read_back.arrived(offset, most, interrupted))

    def recognize(self, end: int) -> None:
        """Raises `Refused` if samples of what lies before `end` are not what one before us wrote there; as `verify`.

        What the source has there now is no other's: the host may have crashed when the guest had written much anew, and
        kept that, but not the hashes of it. Raises `ConnectionLost` of the source.
        """
        if not 0 <= end <= self._size:
            raise errors.Refused(f"byte {end} is beyond the {self._size} bytes", disk=self._disk)
        samples = self._reading(lambda read_back: read_back.samples(end))
        if are_strange(samples) and are_strange([self._unless_at_source(sample) for sample in samples]):
            raise errors.Refused("what lies there is not what was written, but another's", disk=self._disk)

    def _unless_at_source(self, sample: Sample) -> Sample:
        if sample.otherwise is None:
            return sample
        there = memoryview(bytearray(len(sample.otherwise)))
        error = self._sources[0].read_now(there, sample.offset)
        return sample if error or there != sample.otherwise else replace(sample, otherwise=None)

    def _flush_for_reading(self) -> None:
        with self._flushing:
            if self._unflushed:
                try:
                    self.flush()
                except errors.DestinationWriteError as error:
                    self._lost = error  # a second flush would succeed, though this one dropped what it was to keep
                    raise

    def _reading(self, read: Callable[[ReadBack], _T]) -> _T:
        if self._read_back is None:
            raise errors.Refused("nothing was hashed: there is nothing to verify by", disk=self._disk)
        try:
            return read(self._read_back)
        except (OSError, errors.ConnectionLost) as error:
            raise self._failure(error, "read back") from error

    def disconnect(self) -> None:
        """Let go of the source, and of what reads back."""
        if self._read_back is not None:
            self._read_back.close()
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

    def _zero_already(self, extents: Sequence[Extent], *, bulk: bool) -> Callable[[int, int], bool]:
        """Tells where zeroes need not be written, by what no course before this one began to write."""
        if not (bulk and self._untouched and extents):
            return lambda _offset, _length: False
        unit = self._touch_unit
        base = extents[0].offset // unit
        before = bytes(self._untouched[base : (extents[-1].end - 1) // unit + 1])

        def is_zero_already(offset: int, length: int) -> bool:
            return before.find(0, offset // unit - base, (offset + length - 1) // unit - base + 1) < 0

        return is_zero_already

    def _touch(self, extents: Sequence[Extent]) -> None:
        if not self._untouched:
            return
        for extent in extents:
            first, last = extent.offset // self._touch_unit, (extent.end - 1) // self._touch_unit
            self._untouched[first : last + 1] = bytes(last + 1 - first)


class Course:
    """Copies of one disk, one after the other without a gap: `run` begins each while the one before it drains.

    Made by `DiskMover.course`. `run` blocks, in a worker thread; all else belongs in the event loop's.
    """

    def __init__(
        self,
        mover: DiskMover,
        pump: Pump,
        plan: Plan,
        sink: CopySink,
        control: Control,
        over: Callable[[Copying], None],
        extents: Sequence[Extent],
    ) -> None:
        self._mover = mover
        self._pump = pump
        self._plan = plan
        self._sink = sink
        self._control = control
        self._over = over
        self.first = self._expect(extents)

    @property
    def copies(self) -> Sequence[Copying]:
        """Those that are not over, as far as `forget` was called for those that are."""
        return self._sink.copies

    def is_gone_on_with(self, extents: Sequence[Extent], *, bulk: bool) -> bool:
        """Whether a copy of the extents can `join` it: of the first pass, and what lies next on the disk."""
        goes_on = self._plan.goes_on_at is not None and bulk and len(extents) == 1
        return goes_on and extents[0].offset == self._plan.goes_on_at

    def join(self, extents: Sequence[Extent]) -> Copying:
        """Copy these as well. Raises `Refused`."""
        copying = self._expect(extents)
        self._plan.go_on(extents[-1].end)
        self._control.nudge()
        return copying

    def run(self) -> None:
        """Copy until nothing is left.

        Raises `SourceReadError`, `ConnectionLost`, `DestinationWriteError`, `Cancelled`, which end all copies that are
        not over; nothing is in flight any more then.
        """
        self._pump.run(self._plan, self._sink, self._control)

    def check(self) -> None:
        """Between two runs: what was carried out is accounted for."""
        if self._plan.exhausted and (owing := [each.tally for each in self.copies if each.left]):
            raise RuntimeError(f"{owing} do not account for what was to be copied")

    def forget(self, copying: Copying) -> None:
        """It is over, and was told so."""
        self._sink.forget(copying)

    def _expect(self, extents: Sequence[Extent]) -> Copying:
        self._mover.begin(extents)
        copying = Copying(extents, self._settle)
        self._sink.expect(copying)
        return copying

    def _settle(self, copying: Copying) -> None:
        self._mover.wrote()
        self._over(copying)


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
