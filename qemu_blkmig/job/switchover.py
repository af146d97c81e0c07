"""The switchover: the guest paused, the last round, RAM by QEMU's own migration, the handover.

RAM migrates while rounds go on; the last round is copied in `pre-switchover`, with the guest paused. Until the record
says "undecided" the source is the truth and everything can be undone; after it `settle` finds out who has the guest
(DESIGN.md, "Switchover").
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace

from qemu_blkmig.destination.files import boot_id
from qemu_blkmig.errors import (
    BlkmigError,
    DestinationFailed,
    GuestStateError,
    MigrationError,
    RecordFailed,
    RequestError,
    Stalled,
)
from qemu_blkmig.job.activation import activate
from qemu_blkmig.job.connected import Connected
from qemu_blkmig.job.guard import Guard
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.last_round import PATIENCE, LastRound
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.options import MigrateOptions, OnStall
from qemu_blkmig.job.place import Local
from qemu_blkmig.job.pulse import pulse
from qemu_blkmig.job.record import Owner
from qemu_blkmig.job.reporting import Stopwatch
from qemu_blkmig.job.result import Downtime
from qemu_blkmig.job.target import TargetQemu, counterpart
from qemu_blkmig.qmp.channel import Channel, Direct, Forwarded, SocketPair
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.qmp.foreign_bitmaps import Carried, copy_bitmaps, foreign_bitmaps, image_node
from qemu_blkmig.qmp.guest import is_virtualized
from qemu_blkmig.qmp.monitor import NotSent
from qemu_blkmig.qmp.ram import RamMigration
from qemu_blkmig.time_limit import time_limit

HANDOVER = 60.0
"""Seconds in which RAM's rest and device state must have crossed, at least."""
ANSWER = 1.0
"""Seconds in which a source QEMU that is well tells its run state."""
RAM_POLL = 0.5
"""Seconds between two looks at how often RAM has been passed over."""
ATTEMPTS = 3
"""Times that RAM is migrated anew when the disks were too dirty at the pause."""


class Switchover:
    """Takes the guest, whose disks are in step, over to the destination, or pauses it here for good.

    `again` makes ready for another attempt, when the disks were too dirty at the pause: a new destination QEMU, and
    rounds until the last one would fit; it returns what guards that.
    """

    def __init__(
        self,
        life: Lifecycle,
        options: MigrateOptions,
        interrupts: Interrupts,
        watch: Stopwatch,
        connected: Connected,
        disks: Sequence[Disk],
        again: Callable[[], Awaitable[Guard]],
    ) -> None:
        self._life = life
        self._job = life.job
        self._options = options
        self._reporter = life.reporter
        self._steering = life.steering
        self._interrupts = interrupts
        self._clock = watch.clock
        self._watch = watch
        self._carriage = connected.carriage
        self._guest = connected.guest
        self._log = connected.log
        self._engine = connected.engine
        self._guard = connected.guard
        self._disks = disks
        self._again = again
        self._last = LastRound(life, options, watch, connected)
        self._ram: RamMigration | None = None

    async def run(self) -> Downtime | None:
        """Switch over; how long the guest stood still, where that can be told."""
        await self._last.aim()
        self._steering.on_change(self._follow)
        return await (self._pause_here() if self._options.pause_only else self._switch_over())

    async def _follow(self) -> None:
        """What was changed of downtime and bandwidth holds for RAM while it migrates."""
        if self._ram is not None:
            await self._ram.adjust(downtime=self._last.left_for_ram(), bandwidth=await self._bandwidth_of_ram())

    async def _pause_here(self) -> Downtime | None:
        await self._last.catch_up()
        await self._take_run_state(migrating=False)
        self._guard.ignore_pauses()
        with self._watch.phase("switchover"):
            paused = self._clock.now()
            self._watch.paused(paused)
            await self._guest.pause()
            self._watch.step("pausing")
            await self._last.complete()
            self._watch.step("last round")
        await self._last.verify()
        await self._carriage.close()
        self._watch.step("images closed")
        await self._check_still_paused()
        await self._engine.finish()
        self._watch.step("recording ended")
        took = self._clock.now() - paused
        return self._downtime(took, took)

    async def _check_still_paused(self) -> None:
        """Nobody but us knows that the guest is to stay paused: a `cont` makes both sides differ."""
        dirty = sum(disk.dirty for disk in (await self._engine.refresh()).disks)
        if dirty or not await self._guest.is_paused():
            raise MigrationError(
                f"the guest was resumed by somebody else after its last round ({dirty} bytes are dirty since)"
            )

    async def _switch_over(self) -> Downtime | None:
        for attempt in itertools.count(1):
            await self._last.catch_up()
            carried = await self._carried_bitmaps()
            if carried:
                await self._log.stand_down()
            ram = RamMigration(self._life.source, self._target().monitor, carried, self._channel(attempt))
            async with self._called_off_on_error(ram):
                with self._watch.phase("ram"):
                    paused = await self._migrate_ram(ram)
                self._watch.paused(paused)
                self._watch.step("round under way")
                async with self._pulse():
                    if await self._last.fits(paused):
                        self._watch.step("what is dirty counted")
                        with self._watch.phase("switchover"):
                            await self._last.complete()
                        self._watch.step("last round")
                        await self._last.verify()
                        break
                # The destination QEMU exits when its stream breaks off; that is no failure now.
                await self._guard.stand_down()
                await ram.cancel()
            await self._too_dirty(attempt)
        return await self._hand_over(ram, paused)

    async def _carried_bitmaps(self) -> list[Carried]:
        """The dirty bitmaps of others that are there now, and can go with the guest."""
        if not self._options.selection.keep_bitmaps:
            return []
        candidates = (await self._target().inventory()).disks
        images = {disk.name: image_node(counterpart(disk, candidates)) for disk in self._disks}
        able = []
        for bitmaps in await foreign_bitmaps(self._life.source, self._disks):
            if bitmaps.lost is not None:
                continue
            if images[bitmaps.disk] is not None:
                able.append(bitmaps)
            else:
                lost = "the destination's node has no name of its own (node-name=...)"
                self._reporter.note(replace(bitmaps, lost=lost).tell())
        nodes = {name: node for name, node in images.items() if node is not None}
        return await copy_bitmaps(self._life.source, able, nodes, self._job.record.prefix)

    def _channel(self, attempt: int) -> Channel:
        """RAM's way; through another host's connection by a fresh path."""
        target = self._options.target
        if target.ram_uri is not None:
            return Direct(target.ram_uri)
        if isinstance(target.place, Local):
            return SocketPair()
        return Forwarded(f"{self._life.agent.there.runtime}/ram-{attempt}", self._life.host.reach)

    @contextlib.asynccontextmanager
    async def _called_off_on_error(self, ram: RamMigration) -> AsyncIterator[None]:
        """Call the migration of RAM off on any error: the guest and the QEMUs' settings are given back.

        The destination QEMU ends when its stream breaks off, so the reason is asked for before.
        """
        try:
            yield
        except BaseException as error:
            reason = await self._guard.explain(error) if isinstance(error, BlkmigError) else error
            await self._guard.stand_down()
            with contextlib.suppress(BlkmigError):
                await ram.cancel()
            raise reason from error

    async def _migrate_ram(self, ram: RamMigration) -> float:
        """QEMU's own migration up to the pause, while the disks are kept in step; when the pause began."""
        await self._take_run_state(migrating=True)
        await self._target().claim()
        await self._start(ram)
        self._ram = ram
        try:
            await ram.wait_set_up()
            return await self._last.keep_in_step(ram.wait_paused(), self._bound_ram(ram))
        finally:
            self._ram = None

    async def _start(self, ram: RamMigration) -> None:
        """Start QEMU's migration; one that somebody else has begun in the meantime is not taken for ours."""
        try:
            await ram.start(downtime=self._last.left_for_ram(), bandwidth=await self._bandwidth_of_ram())
        except BaseException as error:
            if not ram.begun:
                self._job.record.migrating = False
                await self._job.save()
            if isinstance(error, RequestError):
                await self._guest.check_still_here()
            raise

    async def _bandwidth_of_ram(self) -> int | None:
        """The user's limit, but none where the guest is emulated: see docs/decisions/009-ram-under-tcg.md."""
        limit = self._steering.rate
        if limit is None or await is_virtualized(self._life.source):
            return limit
        self._reporter.note("--bandwidth does not limit RAM here: QEMU may damage an emulated (TCG) guest that way")
        return None

    async def _bound_ram(self, ram: RamMigration) -> None:
        """RAM may be dirtied faster than it crosses: --max-rounds bounds its passes as it does the disks' rounds."""
        options = self._options
        await self._last.loosen(ram.allow, ram.passes)
        if options.on_stall is OnStall.WAIT or options.max_rounds is None:
            return
        while await ram.passes() <= options.max_rounds:
            await self._clock.sleep(RAM_POLL)
        text = f"after {options.max_rounds} passes RAM is still dirtied faster than it crosses"
        if options.on_stall in (OnStall.ABORT, OnStall.THROTTLE):
            raise Stalled(text, advice="raise --downtime or --bandwidth, or choose --on-stall pause or wait")
        self._reporter.note(f"{text}; the guest is paused until it has (--on-stall pause)")
        self._guard.ignore_pauses()
        await self._guest.pause()

    async def _too_dirty(self, attempt: int) -> None:
        options = self._options
        text = "when RAM was ready the disks were too dirty for --downtime, the guest was given back"
        if options.target.launch is None:
            raise Stalled(
                f"{text}; the destination QEMU cannot wait a second time",
                advice="start it anew and try again, with a higher --downtime or --on-stall pause",
            )
        if attempt >= ATTEMPTS and options.on_stall in (OnStall.ABORT, OnStall.THROTTLE):
            raise Stalled(f"{text}, {ATTEMPTS} times", advice="raise --downtime, or choose --on-stall pause or wait")
        self._reporter.note(f"{text}: trying again")
        self._job.record.run_state_taken = self._job.record.migrating = False
        await self._job.save()
        self._life.disarm()
        await self._life.drop_target()
        self._guard = await self._again()

    async def _hand_over(self, ram: RamMigration, paused: float) -> Downtime | None:
        target, record = self._target(), self._job.record
        resumed: float | None = None
        with self._watch.phase("handover"), self._interrupts.deferred(), target.monitor.events("RESUME") as starts:
            async with self._pulse():
                await self._carriage.close()
            self._watch.step("images closed")
            await self._life.exports.stop()
            self._watch.step("exports ended")
            disks_took = self._clock.now() - paused
            await self._guard.stand_down()
            await self._job.undecided(PATIENCE)
            self._watch.step("record synced")
            try:
                await self._cross(ram)
                self._watch.step("RAM and devices")
                await self._activate(target)
                record.owner = Owner.DESTINATION
                await self._job.save()
                with contextlib.suppress(TimeoutError):
                    resumed = (await starts.get(timeout=5)).seconds if record.was_running else None
                self._watch.step("guest started")
                arrived = self._clock.now()
            except (BlkmigError, TimeoutError, OSError) as error:
                if (await self._life.settle()).owner is not Owner.DESTINATION:
                    raise
                self._reporter.note(f"the handover had trouble, but the guest arrived: {error}")
        if resumed is None or ram.paused_at is None:
            return None
        # Another host's clock says nothing beside ours; then it is as long as we have seen it.
        one_clock = self._life.agent.there.boot_id == boot_id()
        total = resumed - ram.paused_at if one_clock else arrived - paused
        return self._downtime(total, disks_took)

    async def _cross(self, ram: RamMigration) -> None:
        """RAM's rest and device state. Raises `DestinationFailed` when that takes too long, and as `ram` does."""
        limit = max(HANDOVER, 20 * self._steering.downtime)
        try:
            async with time_limit(limit), self._pulse():
                await ram.proceed()
                await ram.wait_completed()
        except TimeoutError:
            raise DestinationFailed(f"the destination had not taken the guest within {limit:.0f} s") from None

    def _downtime(self, total: float, until_closed: float) -> Downtime:
        verify = self._watch.phases.get("verify", 0.0)
        ram = max(0.0, total - until_closed)
        return Downtime(total, disk=until_closed - verify, verify=verify, ram=ram, steps=self._watch.steps)

    async def _activate(self, target: TargetQemu) -> None:
        """The proof of success: the guest starts, or, if it is to stay paused, the images are held for writing."""
        await self._check_source_stands_still()
        if self._job.record.was_running:
            self._job.record.started_there = True
            # This host's end would be the source QEMU's end, too: there is nothing to be told apart after it.
            try:
                await self._job.save(synced=False, within=PATIENCE)
            except RecordFailed:
                self._job.record.started_there = False
                raise
            try:
                await target.start_guest()
            except (RequestError, NotSent) as error:
                self._job.record.started_there = False
                await self._job.save(synced=False)
                raise await target.describe(error) from error
        else:
            await activate(target.monitor, target.idle, self._job.record.images)

    async def _check_source_stands_still(self) -> None:
        """Once its RAM is across, QEMU lets anybody resume the guest here again. Raises `GuestStateError` if so.

        A source QEMU that is gone, or hangs, is no reason to keep the guest from the destination.
        """
        still = True
        with contextlib.suppress(BlkmigError, TimeoutError):
            async with time_limit(ANSWER):
                still = await self._guest.is_paused()
        if not still:
            raise GuestStateError("the guest was resumed at the source by somebody else after its RAM was across")

    async def _take_run_state(self, *, migrating: bool) -> None:
        """Before any pause: the watchdog is armed, and the record says that the pause, and a migration, are ours.

        Raises `GuestStateError` when somebody else migrates the guest.
        """
        await self._life.watchdog.arm(PATIENCE)
        await self._guest.check_still_here()
        await self._guest.check_awake()
        self._job.record.run_state_taken = True
        self._job.record.migrating = migrating
        await self._job.save()

    def _pulse(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Another host must answer all the while."""
        place = self._options.target.place
        return contextlib.nullcontext() if isinstance(place, Local) else pulse(self._life.agent)

    def _target(self) -> TargetQemu:
        if self._life.target is None:
            raise GuestStateError("there is no destination QEMU")
        return self._life.target
