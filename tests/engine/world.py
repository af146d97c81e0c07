"""A model world for the engine: disks, a guest that acts between any two steps, a recording, a mover, a clock.

A byte of the model stands for a sector, so a disk of eleven sectors is eleven bytes at each side. Every await of a
fake is a `step`: the next action of the drawn script happens there, and what must always hold is checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NoReturn

from qemu_blkmig.engine.device import SECTOR, DiskSpec
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.migration import BlockMigration, Phase, Tuning
from qemu_blkmig.engine.ports import CopyKind, CopyReport
from qemu_blkmig.errors import ConnectionLost, MigrationError, Refused, TopologyChanged

PIECE = 3
"""Sectors that the mover looks up, reads and writes at a time."""
GROUP = 2
"""Extents that a round gives at a time."""


class Violation(AssertionError):
    """Something that must always hold does not."""


class Injected(MigrationError):
    """A failure that the script put in."""


class Dead(Exception):
    """Nothing answers any more to an engine whose process has died."""


LIFE: contextvars.ContextVar[int | None] = contextvars.ContextVar("LIFE", default=None)
"""The life of the process that a task belongs to, if any; tasks hand it on to those that they start."""


@dataclass(frozen=True)
class Write:
    """The guest writes `value`; zero is a write of zeroes."""

    disk: int
    start: int
    length: int
    value: int


@dataclass(frozen=True)
class Discard:
    """The guest discards: what is read then is the base's content, or zeroes where there is none."""

    disk: int
    start: int
    length: int


@dataclass(frozen=True)
class Fault:
    """The call that is under way fails, if it can."""


@dataclass(frozen=True)
class Cancel:
    """The task that is in the engine is cancelled."""


@dataclass(frozen=True)
class Crash:
    """The disk's writer dies, and what it has not flushed is lost."""

    disk: int


@dataclass(frozen=True)
class WritebackError:
    """The next flush fails, once, and what it should have made stable is lost: as a failed fsync does."""


@dataclass(frozen=True)
class Damage:
    """What lies at the destination, stable, becomes something else, and the engine is told."""

    disk: int
    start: int
    length: int


class Die:
    """The process of the engine, and that of the mover, are gone between two steps."""


@dataclass(frozen=True)
class Snapshot:
    """The guest goes on to write on a new layer, where nobody records it."""


@dataclass(frozen=True)
class Nothing:
    """A step in which nothing happens."""


Action = Write | Discard | Fault | Cancel | Crash | WritebackError | Damage | Die | Snapshot | Nothing


@dataclass
class Disk:
    """Both sides of one disk. `base` is what both have beneath; `known_zero`: the destination began as zeroes.

    `unit`: sectors that copies are rounded out to. `noted`: what was to be written to a sector. `damaged`: sectors that
    a round has to mend; `mended`: those that one has, if it is flushed. `robbed`: a flush has lost what it should
    have made stable, and whoever asked for it may not have heard of it yet.
    """

    name: str
    source: bytearray
    base: bytes | None
    known_zero: bool
    destination: bytearray
    allocated: list[bool]
    unit: int = 1
    noted: dict[int, int] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)
    mended: set[int] = field(default_factory=set)
    flushed: bytearray = field(init=False)
    dead: bool = False
    death_noticed: bool = False
    robbed: bool = False

    def __post_init__(self) -> None:
        self.flushed = bytearray(self.destination)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def spec(self) -> DiskSpec:
        return DiskSpec(self.name, len(self) * SECTOR, self.unit * SECTOR)

    def lose_unflushed(self) -> None:
        self.destination[:] = self.flushed
        self.mended.clear()


class World:
    """Everything around the engine, and the engine itself."""

    def __init__(self, disks: Sequence[Disk], granularity: int, tuning: Tuning, compare: bool = False) -> None:
        self.disks = list(disks)
        self.tuning = tuning
        self.paused = False
        self.topology_changed = False
        self.writeback_error = False
        self.restore_failed = False
        self.cancelled = False
        self.life = 0
        self.interrupted = False
        self.told: list[dict[str, int]] = []
        self.stop_failed = False
        self.may_stop_recording = False
        self.violation: Violation | None = None
        self.script: deque[Action] = deque()
        self.operation: asyncio.Task[object] | None = None
        self.unfinished: list[tuple[int, range]] = []
        self.log = FakeLog(self, granularity)
        self.clock = FakeClock(self)
        self._compare = compare
        self.begin()

    def begin(self) -> None:
        """A new process, with an engine and a mover."""
        self.mover = FakeMover(self)
        self.engine = BlockMigration(
            [disk.spec for disk in self.disks],
            self.log,
            self.mover,
            FakeGuest(self),
            self.clock,
            self.tuning,
            compare=FakeComparer(self) if self._compare else None,
            on_stable=self.note_stable,
        )

    def note_stable(self, disk: str, stable: int) -> None:
        """The journal; what comes from a process that is dead never gets into it."""
        if LIFE.get() in (None, self.life):
            self.told.append({**self.stable(), disk: stable})

    def stable(self, lag: int = 0) -> dict[str, int]:
        """What the journal holds, without its last `lag` entries."""
        return self.told[-1 - lag] if len(self.told) > lag else {}

    def known(self) -> dict[str, list[Extent]]:
        """What is read back, once it is flushed: units beyond `stable` that hold what was to be written there."""
        if self._compare:
            return {}
        found: dict[str, list[Extent]] = {}
        for disk in self.disks:
            disk.flushed[:] = disk.destination
            first = self.stable().get(disk.name, 0) // SECTOR
            units = [range(at, min(at + disk.unit, len(disk))) for at in range(first, len(disk), disk.unit)]
            found[disk.name] = [
                Extent(unit.start * SECTOR, len(unit) * SECTOR)
                for unit in units
                if all(disk.noted.get(sector) == disk.destination[sector] for sector in unit)
            ]
        return found

    def die(self) -> None:
        """The process is gone, wherever it was: nothing that it still tries has an effect."""
        self.life += 1

    def survive(self, lost: int, lag: int) -> None:
        """What is left after a death, and a new process over it.

        Of what was written and not flushed the sectors in the bit mask `lost` are gone; of the journal the last `lag`
        entries. QEMU and its recording live on. What was found amiss is for whoever verifies to find again.
        """
        for disk in self.disks:
            for sector in disk.damaged:
                disk.destination[sector] = disk.flushed[sector] = disk.source[sector]
            disk.damaged.clear()
            disk.mended.clear()
            for sector in range(len(disk)):
                if lost >> sector & 1:
                    disk.destination[sector] = disk.flushed[sector]
            disk.known_zero = disk.dead = disk.death_noticed = disk.robbed = False
        self.told = [self.stable(lag)]
        self.writeback_error = self.paused = self.restore_failed = self.stop_failed = False
        self.log = self.log.left_behind()
        self.interrupted = self.log.started
        if not self.interrupted:
            for disk in self.disks:
                disk.noted.clear()
        self.begin()

    def index(self, name: str) -> int:
        return next(index for index, disk in enumerate(self.disks) if disk.name == name)

    def fail(self, what: str) -> NoReturn:
        """Remember the violation as well as raise it: the engine may take it for an error of a port."""
        self._require_life()
        self.violation = self.violation or Violation(what)
        raise self.violation

    async def step(self, fault: Exception | None = None) -> None:
        """One point between two steps of the engine. Raises `fault` if the script says so."""
        self._require_life()
        self.check()
        await self.unwatched_step(fault)

    async def unwatched_step(self, fault: Exception | None = None) -> None:
        """The same, where something has just been lost that the engine cannot know of before the call fails."""
        self._require_life()
        self.finish_writes()
        action = self.script.popleft() if self.script else Nothing()
        self.act(action)
        await asyncio.sleep(0)
        self._require_life()
        if fault is not None and isinstance(action, Fault):
            raise fault

    def _require_life(self) -> None:
        if LIFE.get() not in (None, self.life):
            raise Dead

    def act(self, action: Action) -> None:
        match action:
            case Write(index, start, length, value):
                self._write(index, start, length, value)
            case Discard(index, start, length):
                self._write(index, start, length, None)
            case Cancel() if self.operation is not None:
                self.cancelled = True
                self.operation.cancel()
            case Crash(index):
                disk = self.disks[index % len(self.disks)]
                disk.lose_unflushed()
                disk.dead, disk.death_noticed = True, False
            case WritebackError():
                self.writeback_error = True
            case Damage(index, start, length) if self.log.started:
                self._damage(self.disks[index % len(self.disks)], start, length)
            case Die():
                self.die()
            case Snapshot():
                self.topology_changed = True

    def _write(self, index: int, start: int, length: int, value: int | None) -> None:
        if self.paused:
            return
        index %= len(self.disks)
        disk = self.disks[index]
        start %= len(disk)
        sectors = range(start, min(len(disk), start + length))
        for sector in sectors:
            below = disk.base[sector] if disk.base is not None else 0
            disk.source[sector] = below if value is None else value
            disk.allocated[sector] = value is not None
        self.unfinished.append((index, sectors))

    def _damage(self, disk: Disk, start: int, length: int) -> None:
        start %= len(disk)
        sectors = range(start, min(len(disk), start + length))
        with contextlib.suppress(MigrationError):
            self.engine.owe(disk.name, [Extent(start * SECTOR, len(sectors) * SECTOR)])
            for sector in sectors:
                disk.destination[sector] = disk.flushed[sector] = 55
            disk.damaged.update(sectors)
            disk.mended.difference_update(sectors)

    def finish_writes(self) -> None:
        """Writes complete, and only then become dirty, a step after their data has reached the disk."""
        for index, sectors in self.unfinished:
            self.log.mark(index, sectors)
        self.unfinished.clear()

    def pause(self) -> None:
        """As `stop` does: requests under way are drained first."""
        self.finish_writes()
        self.paused = True

    def check(self) -> None:
        """No write is lost (DESIGN.md, invariant 1)."""
        figures = self.engine.figures()
        if self.topology_changed or figures.phase is Phase.CANCELLED or self.log.stopped:
            return
        for index, disk in enumerate(self.disks):
            if disk.damaged and not figures.disks[index].dirty:
                self.fail(f"sectors {disk.damaged} of {disk.name} are damaged, and nobody owes them")
            if disk.source == disk.destination or disk.dead or disk.robbed:
                continue
            safe = set(range(figures.disks[index].bulk_done // SECTOR, len(disk)))
            safe |= self.mover.in_flight(index) | self.log.owed(index) | disk.damaged
            safe.update(sector for at, sectors in self.unfinished if at == index for sector in sectors)
            for sector in range(len(disk)):
                if disk.source[sector] != disk.destination[sector] and sector not in safe:
                    self.fail(f"sector {sector} of {disk.name} differs, and nobody will copy it")

    def check_equal(self) -> None:
        """What a switchover stands on."""
        for disk in self.disks:
            if disk.source != disk.destination or disk.source != disk.flushed:
                self.fail(f"{disk.name} switched over: {disk.source!r}, {disk.destination!r}, {disk.flushed!r}")


class FakeLog:
    """The recording: a set of granules for each disk, and the rounds that are owed."""

    def __init__(self, world: World, granularity: int) -> None:
        self._world = world
        self.granularity = granularity
        self.started = False
        self.stopped = False
        self.recording: list[set[int]] = [set() for _ in world.disks]
        self.rounds: list[FakeRound] = []
        self.orphans: list[list[set[int]]] = []

    def left_behind(self) -> FakeLog:
        """The same recording as who comes next finds it: rounds that nobody holds any more are orphans."""
        log = type(self)(self._world, self.granularity)
        log.started, log.stopped, log.recording = self.started, self.stopped, self.recording
        log.orphans = [*self.orphans, *(round_.granules for round_ in self.rounds)]
        return log

    def mark(self, index: int, sectors: Iterable[int]) -> None:
        if self.started and not self._world.topology_changed:
            self.recording[index].update(sector // self.granularity for sector in sectors)

    def owed(self, index: int) -> set[int]:
        return self.recorded(index).union(*(self._sectors(round_.granules[index]) for round_ in self.rounds))

    def recorded(self, index: int) -> set[int]:
        return self._sectors(self.recording[index])

    def _sectors(self, granules: Iterable[int]) -> set[int]:
        return {
            sector
            for granule in granules
            for sector in range(granule * self.granularity, (granule + 1) * self.granularity)
        }

    def count(self, granules: Sequence[set[int]]) -> dict[str, int]:
        """As QEMU counts: whole granules, even beyond the disk's end."""
        unit = self.granularity * SECTOR
        return {disk.name: len(granules[index]) * unit for index, disk in enumerate(self._world.disks)}

    async def start(self) -> None:
        await self._world.step(Injected("start"))
        self.started, self.stopped = True, False
        await self._world.step(Injected("start, too late"))

    async def reattach(self) -> None:
        await self._world.step(Injected("reattach"))
        if not self.started:
            raise Refused("nothing is recorded")
        while self.orphans:
            for recording, granules in zip(self.recording, self.orphans.pop(), strict=True):
                recording |= granules
            await self._world.step(Injected("reattach, half way"))

    async def pending(self) -> Mapping[str, int]:
        await self._world.step(Injected("pending"))
        return self.count(self.recording)

    async def harvest(self) -> FakeRound:
        await self._world.step(Injected("harvest"))
        if self._world.topology_changed:
            raise TopologyChanged("a snapshot was taken")
        round_ = self.take()
        await self._world.step()
        return round_

    def take(self) -> FakeRound:
        if not self.started:
            self._world.fail("harvest of what is not recorded")
        round_ = FakeRound(self._world, self.recording)
        self.recording = [set() for _ in self._world.disks]
        self.rounds.append(round_)
        return round_

    async def stand_ready(self) -> None:
        await self._world.step(Injected("stand_ready"))

    async def verify_topology(self) -> Mapping[str, int]:
        await self._world.step(Injected("verify_topology"))
        if self._world.topology_changed:
            raise TopologyChanged("a snapshot was taken")
        return self.count(self.recording)

    async def stop(self) -> None:
        if not self._world.may_stop_recording:
            self._world.fail("the recording is stopped before the switchover is final")
        try:
            await self._world.step(Injected("stop"))
        except Injected:
            self._world.stop_failed = True
            raise
        self.started, self.stopped = False, True
        self.recording = [set() for _ in self._world.disks]
        self.rounds.clear()


class FakeRound:
    """A round that has been harvested, owed until it is retired or restored."""

    def __init__(self, world: World, granules: list[set[int]]) -> None:
        self._world = world
        self.granules = granules

    @property
    def dirty(self) -> Mapping[str, int]:
        return self._world.log.count(self.granules)

    async def extents(self, disk: str) -> AsyncIterator[Sequence[Extent]]:
        unit = self._world.log.granularity * SECTOR
        granules = sorted(self.granules[self._world.index(disk)])
        for at in range(0, len(granules), GROUP):
            await self._world.step(Injected("extents"))
            yield [Extent(granule * unit, unit) for granule in granules[at : at + GROUP]]

    async def retire(self) -> None:
        await self._world.step(Injected("retire"))
        self.forget()
        await self._world.step()

    async def restore(self) -> None:
        try:
            await self._world.step(Injected("restore"))
        except Injected:
            self._world.restore_failed = True
            raise
        if self in self._world.log.rounds:
            for recording, granules in zip(self._world.log.recording, self.granules, strict=True):
                recording |= granules
            self.forget()
        await self._world.step()

    def forget(self) -> None:
        if self in self._world.log.rounds:
            self._world.log.rounds.remove(self)


class FakeMover:
    """Moves bytes in pieces, each looked up, read in two halves, and written in two halves."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._flying: list[tuple[int, set[int]]] = []
        self.bandwidth: int | None = 1

    def in_flight(self, index: int) -> set[int]:
        return {sector for at, sectors in self._flying if at == index for sector in sectors}

    @property
    def idle(self) -> bool:
        return not self._flying

    async def copy(self, disk: str, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        index = self._world.index(disk)
        self._check_request(index, extents, kind)
        flight = (index, {s for e in extents for s in range(e.offset // SECTOR, e.end // SECTOR)})
        self._flying.append(flight)
        began = self._world.clock.now()
        tally = {"copied": 0, "zeroed": 0, "skipped": 0}
        try:
            for extent in extents:
                piece = self._piece(extent)
                for start in range(extent.offset // SECTOR, extent.end // SECTOR, piece):
                    await self.copy_piece(index, range(start, min(start + piece, extent.end // SECTOR)), kind, tally)
        finally:
            self._flying.remove(flight)
        return CopyReport(**tally, seconds=self._world.clock.now() - began)

    def _piece(self, extent: Extent) -> int:
        """Sectors; every other range is copied in one go, and overtakes the one before it."""
        return PIECE if extent.offset // self._world.tuning.chunk_size % 2 == 0 else extent.length // SECTOR

    def _check_request(self, index: int, extents: Sequence[Extent], kind: CopyKind) -> None:
        """Invariants 2, 3 and 6, and what the port promises."""
        world, tuning = self._world, self._world.tuning
        if not world.log.started:
            world.fail("a read before the recording has started")
        bounded = kind is not CopyKind.BULK or tuning.stride is None
        if len(extents) > tuning.batch or (bounded and sum(each.length for each in extents) > tuning.range_size):
            world.fail(f"a request of {len(extents)} extents")
        unit = world.disks[index].unit * SECTOR
        if any(e.offset % unit or (e.end % unit and e.end != world.disks[index].spec.size) for e in extents):
            world.fail(f"not whole units of {unit} bytes: {extents}")
        if any(before.end >= after.offset for before, after in pairwise(extents)):
            world.fail(f"not coalesced, ascending and disjoint: {extents}")
        if not extents or extents[-1].end > world.disks[index].spec.size:
            world.fail(f"empty or beyond the end: {extents}")
        chunks = {offset // tuning.chunk_size for e in extents for offset in range(e.offset, e.end, SECTOR)}
        if chunks & {sector * SECTOR // tuning.chunk_size for sector in self.in_flight(index)}:
            world.fail("two copies of one chunk in flight")

    async def copy_piece(self, index: int, sectors: range, kind: CopyKind, tally: dict[str, int]) -> None:
        disk = self._world.disks[index]
        await self.step(disk)
        fates = [self.fate(disk, sector, kind) for sector in sectors]
        await self.step(disk)
        self._world.clock.time += 0.001 * len(sectors)
        half = len(sectors) // 2
        data = disk.source[sectors.start : sectors.start + half]
        await self.step(disk)
        data += disk.source[sectors.start + half : sectors.stop]
        await self.step(disk)
        for at, (sector, fate) in enumerate(zip(sectors, fates, strict=True)):
            if at == half:
                await self.step(disk)
            if fate == "copied":
                disk.destination[sector] = disk.noted[sector] = data[at]
            elif fate == "zeroed" and not (disk.known_zero and kind is CopyKind.BULK):
                disk.destination[sector] = disk.noted[sector] = 0
            if kind is CopyKind.DIRTY:
                disk.mended.add(sector)
            tally[fate] += SECTOR
        await self.step(disk)

    def fate(self, disk: Disk, sector: int, kind: CopyKind) -> str:
        if kind is CopyKind.BULK and disk.base is not None and not disk.allocated[sector]:
            return "skipped"
        return "copied" if disk.source[sector] else "zeroed"

    async def flush(self, disk: str) -> None:
        model = self._world.disks[self._world.index(disk)]
        model.robbed = False
        await self.step(model, may_fail=False)
        if self._world.writeback_error:
            self._world.writeback_error = False
            model.lose_unflushed()
            model.robbed = True
            await self._world.unwatched_step()
            raise Injected("flush")
        there, mended = bytes(model.destination), set(model.mended)
        await self.step(model, may_fail=False)
        await self.step(model, may_fail=False)
        model.flushed[:] = there
        mended &= model.mended
        model.damaged -= mended
        model.mended -= mended

    async def set_bandwidth(self, rate: int | None) -> None:
        await self._world.step(Injected("set_bandwidth"))
        self.bandwidth = rate

    async def step(self, disk: Disk, may_fail: bool = True) -> None:
        await self._world.step(Injected("mover") if may_fail else None)
        if disk.dead:
            disk.death_noticed = True
            raise ConnectionLost("the writer died", disk=disk.name)


class FakeComparer:
    """Compares units of two sectors, of which it reads one side after the other."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def differing(self, disk: str, extent: Extent) -> Sequence[Extent]:
        world, found = self._world, []
        model = world.disks[world.index(disk)]
        if not world.log.started:
            world.fail("a comparison before the recording has started")
        for start in range(extent.offset // SECTOR, extent.end // SECTOR, 2):
            end = min(start + 2, extent.end // SECTOR)
            await world.mover.step(model)
            ours = model.source[start:end]
            await world.mover.step(model)
            if ours != model.destination[start:end]:
                found.append(Extent(start * SECTOR, (end - start) * SECTOR))
        await world.mover.step(model)
        return found


class FakeGuest:
    """Knows whether the guest is paused."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def is_paused(self) -> bool:
        await self._world.step(Injected("is_paused"))
        return self._world.paused


class FakeClock:
    """Time that passes while pieces are copied, and in a sleep. At the script's end it asks the engine to stop."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.time = 0.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds
        await self._world.step()
        if not self._world.script:
            self._world.engine.request_stop()
