"""The state machine over the phases of a block migration; what the coordinator calls.

    CREATED --setup--> RECORDING --bulk--> BULK --its end--> DIRTY <--round--+
       +----resume--------^                                    |             |
                                                               +--complete--> COMPLETING --> COMPLETED --finish-->
                                                                 <--error--      <--round, if the handover failed--
                                                                                 <--owe, if something is amiss-----

From any phase `cancel` leads to CANCELLED. FAILED, from which only `cancel` leads, means that a round could not be
put back into the recording: what is owed is no longer known.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from qemu_blkmig.engine.bulk import BulkPass
from qemu_blkmig.engine.carrier import Carrier
from qemu_blkmig.engine.completion import Completion
from qemu_blkmig.engine.convergence import Pace, Policy, Verdict
from qemu_blkmig.engine.device import SECTOR, Device, DiskSpec
from qemu_blkmig.engine.dirty import DirtyRounds
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.forecast import Outlook, time_to_converge
from qemu_blkmig.engine.outlast import outlast
from qemu_blkmig.engine.ports import Clock, Comparer, DirtyLog, Guest, Mover
from qemu_blkmig.engine.standby import Standby
from qemu_blkmig.engine.stride import Stride, flush_interval
from qemu_blkmig.errors import MigrationError

log = logging.getLogger(__name__)

PAUSE_IN_STEP = 0.05
"""Seconds between two looks at what is dirty while RAM migrates."""


async def nothing() -> None:
    """What is done beside something where there is nothing to be done."""


@dataclass(frozen=True)
class Tuning:
    """`chunk_size`, `range_size`: bytes; `range_size` is what one copy request holds at most. `batch`: its extents.
    `flushes`: how often the bulk pass over a disk is flushed at most, about; oftener on a very large one. `granule`:
    bytes that are dirty together, as far as anybody knows. `stride`: seconds that a range of the bulk pass is to take,
    whose length is `range_size` where this is None. `room`: see `BulkPass`.

    Raises ValueError when a size is not positive, or not a multiple of the unit below it (512 bytes, a chunk).
    """

    chunk_size: int = 1 << 20
    range_size: int = 128 << 20
    batch: int = 4096
    flushes: int = 32
    granule: int = 64 << 10
    stride: float | None = None
    room: int = 0

    def __post_init__(self) -> None:
        if self.chunk_size <= 0 or self.chunk_size % SECTOR:
            raise ValueError(f"chunk size {self.chunk_size} is not a positive multiple of {SECTOR}")
        if self.range_size <= 0 or self.range_size % self.chunk_size:
            raise ValueError(f"range size {self.range_size} is not a positive multiple of {self.chunk_size}")
        if self.granule <= 0 or self.granule % SECTOR:
            raise ValueError(f"granule size {self.granule} is not a positive multiple of {SECTOR}")
        if self.batch <= 0 or self.flushes <= 0:
            raise ValueError(f"batch of {self.batch} extents, {self.flushes} flushes")


class Phase(enum.Enum):
    """Where the migration stands; see the module."""

    CREATED = "created"
    RECORDING = "recording"
    BULK = "bulk"
    DIRTY = "dirty"
    COMPLETING = "completing"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True)
class DiskFigures:
    """Bytes, of one disk.

    `copied`, `zeroed`, `skipped`: in all phases; `copied_dirty`: the part of `copied` that dirty rounds had.
    `bulk_done`: what the bulk pass has settled. `dirty`: what is owed beyond it, harvested, found amiss or, as last
    seen, recorded. `rounds`: dirty rounds in which something of this disk was brought over. `resumed`: what had been
    brought over by the bulk pass before it was resumed, and is not counted again. `put_off`: the part of `dirty` that
    rounds have left to later ones because the guest writes it all the time. `stable`: what the bulk pass has brought
    over and flushed, from sector 0 on.
    """

    name: str
    size: int
    copied: int
    zeroed: int
    skipped: int
    rounds: int
    bulk_done: int
    dirty: int
    copied_dirty: int
    resumed: int = 0
    put_off: int = 0
    stable: int = 0


@dataclass(frozen=True)
class Figures:
    """The migration at one moment.

    `percent`: of the bytes of all disks, what has *arrived* in the bulk pass, and 100 only when both sides are equal;
    in the bulk pass it never falls. `total`, `pending`: bytes; pending is what the bulk pass has not settled and what
    is dirty, each with what of it is in flight. `round`: the dirty round under way or the last one, 0 before the first.
    `speed`: payload, bytes a second. `dirty_rate`: bytes a second that the guest dirties. `predicted`: seconds that
    the final round would take now. `converges_in`: seconds until it is predicted to fit the downtime; None if it is
    predicted not to, too. `confidence`: what such predictions were worth in the last rounds, from 0 to 1. The last five
    are None until something tells them.
    """

    phase: Phase
    percent: int
    total: int
    pending: int
    disks: tuple[DiskFigures, ...]
    round: int
    speed: float | None
    dirty_rate: float | None
    predicted: float | None
    converges_in: float | None = None
    confidence: float | None = None


class BlockMigration:
    """Migrates `disks` in their order. One operation at a time; only `refresh`, `figures`, `limit`, `owe`,
    `request_stop` and `cancel` may be called while another is under way.

    `mover` must fail at least one call for a disk whose writer died before it may work on it again with another
    writer: only so does the engine learn that what was not flushed may be lost. `on_change` is called in the event
    loop with every new `Figures`; what it raises is logged. With `compare` the bulk pass sends just what differs.
    `on_stable` is told, by disk, how many bytes of the bulk pass have been flushed, each time they were.

    Raises ValueError when there is no disk, or two of one name.
    """

    def __init__(
        self,
        disks: Sequence[DiskSpec],
        log: DirtyLog,
        mover: Mover,
        guest: Guest,
        clock: Clock,
        tuning: Tuning = Tuning(),
        on_change: Callable[[Figures], None] | None = None,
        compare: Comparer | None = None,
        on_stable: Callable[[str, int], None] = lambda _disk, _stable: None,
    ) -> None:
        if not disks or len({disk.name for disk in disks}) < len(disks):
            raise ValueError(f"disks must be there, and differ in name: {[disk.name for disk in disks]}")
        self._log = log
        self._mover = mover
        self._clock = clock
        self._on_change = on_change
        self._on_stable = on_stable
        self._devices = [Device(disk, tuning.granule) for disk in disks]
        self._total = sum(disk.size for disk in disks)
        self._pace = Pace()
        self._carrier = Carrier(mover, clock, self._pace, self._publish)
        self._bulk = BulkPass(
            self._carrier,
            tuning.range_size,
            tuning.batch,
            tuning.room if compare is None else 0,
            lambda size: flush_interval(size, tuning.flushes, tuning.chunk_size),
            self._note_stable,
            compare,
            tuning.chunk_size,
            _stride(tuning) if compare is None else None,
        )
        self._rounds = DirtyRounds(
            self._devices,
            log,
            self._carrier,
            clock,
            self._pace,
            batch=tuning.batch,
            volume=tuning.range_size,
            on_change=self._publish,
        )
        self._completion = Completion(self._devices, mover, guest, self._carrier, self._rounds)
        self._busy = asyncio.Lock()
        self._under_way = ""
        self._stop = asyncio.Event()
        self._recording = False
        self._phase = Phase.CREATED
        self._percent = 0
        self._policy: Policy | None = None
        self._figures = self._draw_figures()

    async def setup(self) -> None:
        """Start recording what the guest writes. After an error nothing is recorded, and it may be called again."""
        async with self._alone("setup", Phase.CREATED):
            await self._rounds.start()
            self._recording = True
            self._enter(Phase.RECORDING)

    async def resume(self, stable: Mapping[str, int], known: Mapping[str, Sequence[Extent]] | None = None) -> None:
        """Take up the migration that another engine has begun, and left, in place of `setup`.

        `stable`: by disk, what that one's `on_stable` was told last; a disk that is not in it is copied anew. `known`:
        by disk, extents (ascending, disjoint, whole units) beyond that of which it is certain that they are stable at
        the destination as that one's bulk pass has read them. Raises `Refused` when the recording is not there any
        more, and then, as after any error, nothing has changed, and it may be called again. Raises ValueError when
        `stable` or `known` does not fit the disks.
        """
        async with self._alone("the resumption", Phase.CREATED):
            starts = [device.checked_start(stable.get(device.name, 0)) for device in self._devices]
            beyond = [
                device.checked_known((known or {}).get(device.name, ()), start)
                for device, start in zip(self._devices, starts, strict=True)
            ]
            await self._rounds.reattach()
            for device, start, there in zip(self._devices, starts, beyond, strict=True):
                device.resume(start, there)
            self._recording = True
            self._enter(Phase.RECORDING)

    async def bulk(self) -> None:
        """Copy all disks once, from sector 0, and flush them; called again, it goes on where it failed.

        Raises MigrationError before `setup` and when cancelled, and what the mover raises.
        """
        async with self._alone("the bulk pass", Phase.RECORDING, Phase.BULK, Phase.DIRTY):
            if self._phase is Phase.DIRTY:
                return
            self._enter(Phase.BULK)
            try:
                await self._bulk.run(self._devices)
            finally:
                self._publish()
            self._enter(Phase.DIRTY)

    async def round(self, policy: Policy | None = None) -> int:
        """Bring over what the guest has written since the last round; returns the bytes that this was.

        By `policy` some of it may be put off; without one nothing is, and what was is brought over.

        On any error, and when cancelled, all of it is owed again. Raises MigrationError unless the bulk pass is done,
        and what the log and the mover raise; with a note, and phase FAILED, if the round could not be put back.
        """
        async with self._alone("a dirty round", Phase.DIRTY, Phase.COMPLETED):
            return await self._round(policy)

    async def refresh(self) -> Figures:
        """Ask the log what is dirty now, and return the figures that this makes. Raises what the log raises."""
        if self._recording:
            await self._rounds.look()
        return self._figures

    async def converge(self, policy: Policy) -> Verdict:
        """Run rounds until the final one is predicted to fit, but at most `policy.max_rounds`.

        The first verdict needs a round, for the writes that came during the bulk pass and to have measured one.
        When nothing is dirty it always fits: no further round could make it cheaper. Raises as `round` does.
        """
        self.aim(policy)
        async with self._alone("convergence", Phase.DIRTY, Phase.COMPLETED):
            rounds = 0
            if not self._rounds.begun:
                await self._round(policy)
                rounds = 1
            while not self._fits(await self.refresh(), policy):
                if policy.max_rounds is not None and rounds >= policy.max_rounds:
                    return Verdict.STALLED
                await self._round(policy)
                rounds += 1
            return Verdict.FITS

    def aim(self, policy: Policy) -> None:
        """What the figures tell of convergence is meant for `policy`, until rounds are run by another one."""
        self._policy = policy

    async def keep_in_step(self, policy: Policy) -> None:
        """While RAM migrates: a round whenever one is due by `Pace.due_in_step`, and whenever something is amiss.

        Runs until cancelled (a round under way is then owed again) or until `request_stop`. Raises as `round` does.
        """
        self.aim(policy)
        async with self._alone("keeping in step", Phase.DIRTY, Phase.COMPLETED):
            try:
                while not self._stop.is_set() and not self._carrier.halted:
                    await self.refresh()
                    await self._log.stand_ready()
                    due = self._pace.due_in_step(self._expected(), self._left_off(), policy.downtime)
                    if due or any(device.amiss for device in self._devices):
                        await self._round(policy)
                    else:
                        await self._sleep_until(self._stop, PAUSE_IN_STEP)
            finally:
                self._stop.clear()

    def owe(self, disk: str, extents: Sequence[Extent]) -> None:
        """The extents (ascending, disjoint) are not at the destination as they were copied: the next round copies
        them again. After `complete` the phase is DIRTY again.

        What a round that fails has not mended stays owed. Raises MigrationError when nothing is recorded: what is
        copied then may be torn; ValueError when there is no such disk, or the extents do not lie in it.
        """
        if not self._recording:
            raise MigrationError(f"nothing can be copied again: {self._standing()}", disk=disk)
        device = next((device for device in self._devices if device.name == disk), None)
        if device is None or any(not 0 <= each.offset < each.end <= device.size for each in extents):
            raise ValueError(f"disk {disk}: there is no {extents}")
        device.found_amiss(extents)
        self._enter(Phase.DIRTY if self._phase is Phase.COMPLETED else self._phase)

    async def stand_by(self, policy: Policy, until: asyncio.Event) -> None:
        """Until `until` is set: keep the disks so far in step that the switchover may come at any time, for days.

        Rounds and looks come as seldom as `engine.standby` finds they may; `until` ends a pause at once, and a round
        under way is run to its end. Raises as `round` does.
        """
        self.aim(policy)
        async with self._alone("standing by", Phase.DIRTY, Phase.COMPLETED):
            standby = Standby(self._clock.now())
            if not self._rounds.begun:
                # For the writes that came during the bulk pass, and to have measured a round.
                await self._round(policy)
            while not until.is_set():
                figures = await self.refresh()
                # What is put off is not brought over before the end: it takes its part of the downtime away.
                fresh = self._pace.final_round(max(0, self._expected() - self._left_off()), len(self._devices))
                downtime = policy.downtime - (self._pace.copying(self._left_off()) or 0.0)
                if standby.due(fresh, _dirty(figures), downtime, self._clock.now()):
                    began = self._clock.now()
                    await self._round(policy)
                    figures, now = await self.refresh(), self._clock.now()
                    pause = standby.rest(now - began, figures.predicted, policy.downtime, now)
                else:
                    slope = (figures.dirty_rate or 0.0) / figures.speed if figures.speed else 0.0
                    pause = standby.pause(fresh or 0.0, slope, downtime)
                await self._sleep_until(until, pause)

    async def _sleep_until(self, until: asyncio.Event, seconds: float) -> None:
        waits = {asyncio.ensure_future(self._clock.sleep(seconds)), asyncio.ensure_future(until.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def request_stop(self) -> None:
        """Let `keep_in_step` return at once, or after the round under way; if it does not run yet, its next call."""
        self._stop.set()

    async def limit(self, rate: int | None) -> None:
        """Limit payload to `rate` bytes a second (None: no limit) from now on; may be called in any operation.

        Not in the switchover, nor after it: nothing slows that down. Raises what the mover raises.
        """
        if self._phase not in (Phase.COMPLETING, Phase.COMPLETED):
            await self._mover.set_bandwidth(rate)

    async def complete(self, beside: Callable[[], Awaitable[None]] = nothing) -> None:
        """With the guest paused: bring over the rest, until both sides are equal and the destination is stable.

        `beside` is done, and what it raises is raised, while the source is asked whether that is so; once more if more
        was to be brought over.
        Recording goes on, because the handover may still fail: then rounds may be run again. Raises MigrationError
        unless the bulk pass is done on every disk, nothing is in flight and the guest is paused; TopologyChanged; and
        what the ports raise. After an error all is owed that was, and the phase is DIRTY again; the bandwidth limit,
        which is off now, is the caller's to set anew.
        """
        async with self._alone("the switchover", Phase.DIRTY, Phase.COMPLETED):
            self._stop.clear()
            self._enter(Phase.COMPLETING)
            try:
                await self._completion.run(beside)
            except BaseException:
                self._enter(self._phase_after_error())
                raise
            self._enter(Phase.COMPLETED)

    async def finish(self) -> None:
        """Stop recording, now that the handover is final. May be called again if that raised."""
        async with self._alone("the end of the recording", Phase.COMPLETED):
            await self._stop_recording(Phase.COMPLETED)

    async def cancel(self) -> None:
        """Stop for good: wait for what is in flight, then drop the recording. The guest does not notice.

        May be called in any phase and repeatedly. An operation that another task is in ends with the batch in flight,
        by MigrationError (`keep_in_step` just returns); who is in a hurry cancels that task first. After `finish`
        there is nothing to cancel. Raises what the log raises; all that is left to do then is to cancel again.
        """
        self._carrier.halt()
        async with self._busy:
            if self._phase is Phase.COMPLETED and not self._recording:
                return
            await self._stop_recording(Phase.CANCELLED)

    def figures(self) -> Figures:
        """The figures as they stand; from any thread, at any time."""
        return self._figures

    @asynccontextmanager
    async def _alone(self, what: str, *phases: Phase) -> AsyncIterator[None]:
        """Guard an operation: nothing else is under way, no cancel was asked for, and the phase is one of `phases`."""
        if self._busy.locked():
            raise MigrationError(f"{what} is refused: {self._under_way or 'a cancel'} is under way")
        async with self._busy:
            if self._carrier.halted:
                raise MigrationError(f"{what} is refused: the migration is cancelled")
            if self._phase not in phases:
                raise MigrationError(f"{what} is refused: {self._standing()}")
            self._under_way = what
            try:
                yield
            finally:
                self._under_way = ""

    def _standing(self) -> str:
        done = sum(device.stable for device in self._devices)
        return f"the phase is {self._phase.value!r}, the bulk pass has brought over {done} of {self._total} bytes"

    async def _round(self, policy: Policy | None) -> int:
        self._enter(Phase.DIRTY)
        try:
            return await self._rounds.run(self._pace.room(policy, len(self._devices)) if policy else 0)
        except BaseException:
            self._enter(self._phase_after_error())
            raise

    def _phase_after_error(self) -> Phase:
        return Phase.FAILED if self._rounds.unrestored else Phase.DIRTY

    async def _stop_recording(self, phase: Phase) -> None:
        stopping = await outlast(self._log.stop())
        stopping.result()
        self._recording = False
        self._enter(phase)
        stopping.raise_cancellation()

    def _fits(self, figures: Figures, policy: Policy) -> bool:
        if not _dirty(figures):
            return True
        return figures.predicted is not None and figures.predicted <= policy.downtime

    def _enter(self, phase: Phase) -> None:
        if phase is not self._phase:
            log.info("%s", phase.value)
            self._phase = phase
        self._publish()

    def _note_stable(self, disk: str, stable: int) -> None:
        self._on_stable(disk, stable)
        self._publish()

    def _publish(self) -> None:
        figures = self._draw_figures()
        if figures == self._figures:
            return
        self._figures = figures
        if self._on_change is None:
            return
        try:
            self._on_change(figures)
        except Exception:
            log.exception("whoever watches the figures failed")

    def _draw_figures(self) -> Figures:
        disks = tuple(_draw_disk(device) for device in self._devices)
        dirty = sum(disk.dirty for disk in disks)
        done = sum(disk.bulk_done for disk in disks)
        bulk_over = all(device.bulk_done for device in self._devices)
        return Figures(
            phase=self._phase,
            percent=self._draw_percent(done),
            total=self._total,
            pending=self._total - done + dirty,
            disks=disks,
            round=self._rounds.begun,
            speed=self._pace.speed,
            dirty_rate=self._pace.dirtying.value,
            predicted=self._pace.final_round(self._expected(), len(disks)) if bulk_over else None,
            converges_in=self._draw_convergence(),
            confidence=self._rounds.forecasts.confidence,
        )

    def _expected(self) -> int:
        """Bytes that are dirty, as far as they can be told."""
        return sum(device.expected(self._rounds.again) for device in self._devices)

    def _left_off(self) -> int:
        return sum(device.left_off for device in self._devices)

    def _draw_convergence(self) -> float | None:
        speed, dirtying = self._pace.speed, self._pace.dirtying.value
        if self._policy is None or speed is None or dirtying is None:
            return None
        return time_to_converge(
            Outlook(
                bulk=self._total - sum(device.cursor for device in self._devices),
                dirty=self._expected(),
                speed=speed,
                dirtying=dirtying,
                overhead=len(self._devices) * self._pace.flush.value + self._pace.overhead.value,
                downtime=self._policy.downtime,
            )
        )

    def _draw_percent(self, done: int) -> int:
        if self._phase is Phase.COMPLETED:
            return 100
        self._percent = max(self._percent, min(99, done * 100 // self._total))
        return self._percent


def _dirty(figures: Figures) -> int:
    return sum(disk.dirty for disk in figures.disks)


def _draw_disk(device: Device) -> DiskFigures:
    return DiskFigures(
        name=device.name,
        size=device.size,
        copied=device.copied,
        zeroed=device.zeroed,
        skipped=device.skipped,
        rounds=device.rounds,
        bulk_done=device.cursor,
        dirty=device.dirty,
        copied_dirty=device.copied_dirty,
        resumed=device.resumed,
        put_off=device.left_off,
        stable=device.stable,
    )


def _stride(tuning: Tuning) -> Callable[[], Stride] | None:
    seconds = tuning.stride
    return None if seconds is None else lambda: Stride(seconds, tuning.chunk_size)
