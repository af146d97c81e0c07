"""The switchover of a domain: libvirt moves it, and a gate keeps the end of its stream until the disks are equal.

RAM migrates, by libvirt's own call, while rounds go on. Once the guest stands still the last round is copied; libvirt
waits for the destination, which waits for what the gate withholds. Until the record says "undecided" the gate is
closed: dropping the stream, or our end, makes libvirt give the guest back at the source by itself (FACTS.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from qemu_blkmig.errors import BlkmigError, LibvirtFailed, Refused, Stalled
from qemu_blkmig.job.arrangement import Arrangement, renewed
from qemu_blkmig.job.beforehand import Beforehand
from qemu_blkmig.job.connected import Connected
from qemu_blkmig.job.ends import Ends
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.last_round import PATIENCE, LastRound
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import OnStall
from qemu_blkmig.job.passage import Passage, not_migrated
from qemu_blkmig.job.place import Local
from qemu_blkmig.job.pulse import pulse
from qemu_blkmig.job.record import Owner
from qemu_blkmig.job.reporting import Stopwatch
from qemu_blkmig.job.result import Downtime
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.qmp.features import probe
from qemu_blkmig.qmp.guest import migration_away
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.virt.connection import LibvirtError, libvirt, virsh
from qemu_blkmig.virt.domain import gives_devices_back
from qemu_blkmig.virt.migration import starts_of

HANDOVER = 60.0
"""Seconds in which libvirt must have handed over, at least, once the gate is open."""
ATTEMPTS = 3
"""Times that RAM is migrated anew when the disks were too dirty at the pause."""
BEHIND = 1.0
"""Seconds of reading back that may be left when libvirt begins."""
REACHED = 1.0
"""Seconds that a guest which is paused may wait for the gate to be connected to the destination's QEMU."""
RAM_POLL = 0.5
"""Seconds between two looks at how often RAM has been passed over."""
AT_THE_PAUSE = ("pre-switchover", "device", "completed")
"""What QEMU says of its migration from when it has paused the guest (MIGRATION events)."""
DISKS_TAKEN = AT_THE_PAUSE[1:]
"""The same, from when it has taken the guest's disks from it: libvirt lets it go on from the first at once."""
ENDING = 60.0
"""Seconds more in which libvirt must have ended what it was told to call off, once another attempt is to begin."""
STALE = "somebody has paused or resumed the guest while libvirt moved it, which would undo that"


class ManagedSwitchover:
    """Takes a domain, whose disks are in step, over to the destination.

    `converge` makes ready for another attempt, when the disks were too dirty at the pause. Only within `attempts`.
    """

    def __init__(
        self,
        life: Lifecycle,
        options: ManagedOptions,
        interrupts: Interrupts,
        watch: Stopwatch,
        connected: Connected,
        ends: Ends,
        arrangement: Arrangement,
        disks: Sequence[Disk],
        converge: Callable[[], Awaitable[None]],
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
        self._engine = connected.engine
        self._guard = connected.guard
        self._ends = ends
        self._arrangement = arrangement
        self._disks = disks
        self._converge = converge
        self._last = LastRound(life, options, watch, connected)
        self._last.may_last |= not options.live
        self._moving = self._hurried = self._is_over = False
        self._ending: asyncio.Task[None] | None = None
        taken = options.live and not (options.on_stall is OnStall.THROTTLE or options.switchover.waits)
        # A guest is not to lose its fast network device for a while only to see that it can.
        may = not gives_devices_back(ends.domain.xml)
        self._beforehand = Beforehand(
            connected.engine.figures, disks, self, connected.guard.end, self._reporter.note, taken=taken, may=may
        )
        """libvirt's first attempt, which begins with the disks' first pass."""

    @contextlib.asynccontextmanager
    async def attempts(self) -> AsyncIterator[None]:
        """Inside, the first attempt may begin before `run`; in the end one that was taken is waited for no more."""
        try:
            async with self._beforehand:
                yield
        finally:
            if self._ending is not None:
                self._ending.cancel()
                await asyncio.gather(self._ending, return_exceptions=True)

    async def run(self) -> Downtime | None:
        """Switch over; how long the guest stood still, where that can be told."""
        await self._last.aim()
        may_be_inactive = (await probe(self._life.source)).set_active
        for attempt in itertools.count(1):
            await self._last.catch_up(within=BEHIND)
            async with self._under_way(attempt) as passage:
                with self._watch.phase("ram"):
                    paused = await self._last.keep_in_step(
                        self._come_to(passage, AT_THE_PAUSE), self._beside(passage), self._has_paused
                    )
                self._watch.paused(paused)
                self._watch.step("round under way")
                stale = self._is_stale(passage)
                await self._reached(passage)
                async with self._pulse():
                    if may_be_inactive:
                        await self._activate(passage)
                        self._watch.step("disks activated")
                    if not stale and await self._last.fits(paused):
                        self._watch.step("what is dirty counted")
                        with self._watch.phase("switchover"):
                            await self._last.complete()
                        self._watch.step("last round")
                        await self._last.verify()
                        return await self._hand_over(passage, paused)
            await (self._again(passage, STALE) if stale else self._too_dirty(passage, attempt))
        raise AssertionError("counting has ended")

    async def _begin(self, attempt: int, *, live: bool) -> Passage:
        """What is refused by now, a connection or a place to listen at, can be mended: the copies are kept."""
        try:
            await self._take_run_state(live=live)
            there, told = await renewed(
                self._arrangement, self._options, self._ends.domain, self._ends.source, self._life.agent
            )
            for warning in told:
                self._reporter.note(warning)
            self._arrangement = there
            passage = await Passage.begin(self._life, self._options, self._ends, there, attempt, live=live)
        except (Refused, LibvirtError) as error:
            raise LibvirtFailed(f"libvirt's migration could not begin: {error}", advice=error.advice) from error
        self._guard.resumes_are_libvirts = passage.found_running
        return passage

    async def begin_beforehand(self) -> Passage:
        """See `Attempts`."""
        await self._let_last_end()
        try:
            return await self._begin(0, live=True)
        except BlkmigError:
            await self._give_run_state_back()
            raise

    async def call_off(self, passage: Passage) -> None:
        """See `Attempts`."""
        await self.end(passage)
        await self._leave(passage)

    async def end(self, passage: Passage) -> None:
        """See `Attempts`."""
        await passage.end()
        if passage.migration.ended:
            await self._put_right(passage)

    async def _put_right(self, passage: Passage) -> None:
        """libvirt has ended an attempt: the guest is to run, or not, as it would have without that."""
        await self._pause_again(passage)
        await self._let_go_on(passage)

    async def _pause_again(self, passage: Passage) -> None:
        """A guest that somebody has paused meanwhile, and libvirt has let go on."""
        if passage.found_running and self._is_stale(passage) and self._job.record.owner is not Owner.DESTINATION:
            try:
                await self._ends.source.call(self._ends.handle.suspend)
            except BlkmigError as error:
                self._reporter.note(
                    f"somebody had paused the guest, which libvirt let go on and did not pause: {error}"
                )
                return
            # Whose resume came to libvirt meanwhile was told that it runs already.
            self._reporter.note(f"somebody had paused the guest: it is paused again ({self._virsh('resume')})")

    def _virsh(self, command: str) -> str:
        return virsh(self._options.source_uri, command, self._ends.domain.name)

    async def _let_go_on(self, passage: Passage) -> None:
        """A guest that libvirt was told to pause for its migration, and has paused only when that had failed: it does
        not take that for a part of it then, and lets it be paused.
        """
        record = self._job.record
        ours = record.told_to_pause and record.owner is Owner.SOURCE
        if not ours or not passage.found_running or self._is_stale(passage):
            return
        try:
            # Calls are made one after another: what was told before is done by now.
            state, _ = await self._ends.source.call(self._ends.handle.state)
            if state == libvirt().VIR_DOMAIN_PAUSED:
                await self._ends.source.call(self._ends.handle.resume)
        except BlkmigError as error:
            self._reporter.note(f"whether the guest goes on after a pause of ours cannot be told: {error}")
            return
        record.told_to_pause = False

    async def _leave(self, passage: Passage) -> None:
        """Give the guest's run state back after an attempt; if libvirt has not ended that yet, when it has."""
        if passage.migration.ended:
            await self._give_run_state_back()
            return
        self._reporter.note("libvirt has not ended yet what was called off; another attempt begins when it has")
        self._ending = asyncio.create_task(self._leave_late(passage))

    async def _leave_late(self, passage: Passage) -> None:
        await passage.migration.failed()
        await self._put_right(passage)
        await self._give_run_state_back()

    async def _let_last_end(self) -> None:
        """Return once no attempt before is under way. Raises `LibvirtFailed` where one still is."""
        if self._ending is None:
            return
        await asyncio.wait({self._ending}, timeout=ENDING)
        if not self._ending.done():
            failed = LibvirtFailed(
                "libvirt has not ended the migration that was called off, and cannot begin another",
                advice=f"see what keeps it, here and at the destination ({self._virsh('domjobinfo')})",
            )
            failed.busy = True
            raise failed
        ending, self._ending = self._ending, None
        ending.result()

    async def why_failed(self, passage: Passage) -> LibvirtFailed:
        """See `Attempts`."""
        if passage.gate.failure is not None:
            return LibvirtFailed(f"the way of the guest's RAM to the destination broke: {passage.gate.failure}")
        return not_migrated(await passage.migration.failed(), passage.other_xml)

    async def is_overtaken(self, passage: Passage) -> bool:
        """See `Attempts`."""
        return self._is_stale(passage) or await self._has_paused()

    def _is_stale(self, passage: Passage) -> bool:
        """Whether somebody has paused or resumed the guest since it began: libvirt would undo that."""
        return self._job.record.was_running is not passage.found_running

    async def _has_paused(self) -> bool:
        """Whether QEMU has paused the guest for its migration."""
        return await migration_away(self._life.source) in AT_THE_PAUSE

    @contextlib.asynccontextmanager
    async def _under_way(self, attempt: int) -> AsyncIterator[Passage]:
        """libvirt's migration with the gate closed; unless it was opened, it is called off in the end."""
        passage = await self._beforehand.take()
        if passage is None:
            await self._let_last_end()
            passage = await self._begin(attempt, live=self._options.live and not self._hurried)
        self._is_over = False
        try:
            yield passage
        except (BlkmigError, asyncio.CancelledError) as error:
            raise await self._reason(error, passage) from error
        finally:
            self._moving, self._is_over = False, True
            await self.end(passage)

    async def _reason(self, error: BaseException, passage: Passage) -> BaseException:
        """What is behind an error of ours: the end of the connection to the destination, or of libvirt's migration."""
        never_reached = passage.gate.failure is not None and not passage.gate.passed
        if isinstance(error, LibvirtFailed) and never_reached:
            # libvirt knows only that we hung up.
            return await self.why_failed(passage)
        if isinstance(error, asyncio.CancelledError | LibvirtFailed):
            return error
        if (gone := await self._life.why_destination_gone()) is not None:
            return gone
        ended = passage.migration.ended and self._job.record.owner is Owner.SOURCE
        return await self.why_failed(passage) if passage.gate.failure is not None or ended else error

    async def _come_to(self, passage: Passage, statuses: Sequence[str]) -> None:
        """Return when QEMU's migration is in one of them. Raises `LibvirtFailed` when it never will be."""
        while await passage.status() not in statuses:
            # libvirt takes a guest that is paused before for one that is to stay so.
            if not self._moving and self._hurried:
                await self._suspend()
            self._moving = True

    async def _activate(self, passage: Passage) -> None:
        """Have the source's disks active again, whose exports would give no block status otherwise.

        QEMU inactivates them when it goes on from the pause. 7.2 answers all the same, 10.0 does not (both seen); it
        takes them anew if the guest is given back. Raises `LibvirtFailed`, and what `Monitor.execute` raises.
        """
        try:
            async with time_limit(PATIENCE):
                await self._come_to(passage, DISKS_TAKEN)
        except TimeoutError:
            raise LibvirtFailed(f"libvirt did not go on with the paused guest within {PATIENCE:.0f} s") from None
        # Not those that stay where they are, on shared storage: the destination opens them.
        for disk in self._disks:
            await self._life.source.execute("blockdev-set-active", {"active": True, "node-name": disk.node})

    async def _beside(self, passage: Passage) -> None:
        """Let RAM cross once nearly everything was read back.

        It may be dirtied faster than it crosses: --max-rounds bounds its passes as it does the disks' rounds.
        """
        options = self._options
        await self._last.caught_up()

        async def allow(seconds: float) -> None:
            with contextlib.suppress(BlkmigError):
                await self._ends.source.call(self._ends.handle.migrateSetMaxDowntime, max(1, round(seconds * 1000)))
            passage.gate.admit()

        await self._last.loosen(allow, passage.migration.passes)
        if options.on_stall is OnStall.WAIT or options.max_rounds is None:
            return
        while await passage.migration.passes() <= options.max_rounds:
            await self._clock.sleep(RAM_POLL)
        text = f"after {options.max_rounds} passes RAM is still dirtied faster than it crosses"
        if options.on_stall in (OnStall.ABORT, OnStall.THROTTLE):
            raise Stalled(text, advice="raise --downtime or --bandwidth, or choose --on-stall pause or wait")
        self._reporter.note(f"{text}; the guest is paused until it has (--on-stall pause)")
        await self._suspend()

    async def _reached(self, passage: Passage) -> None:
        """What a guest has of RAM may all wait in sockets before the gate is connected: it is paused already then.

        Raises `LibvirtFailed`.
        """
        with contextlib.suppress(TimeoutError):
            async with time_limit(REACHED):
                while not passage.gate.passed and passage.gate.failure is None:
                    await self._clock.sleep(REACHED / 100)
        if passage.gate.failure is not None:
            raise await self.why_failed(passage)
        if not passage.gate.passed:
            where = self._options.migrate_uri or "through ssh"
            raise LibvirtFailed(
                f"nothing at the destination has taken the guest's RAM ({where}): a firewall may be in the way"
            )

    async def hurry(self) -> None:
        """The guest may stand still for as long as it takes, and does from now on if its RAM is on the way."""
        self._last.may_last = self._hurried = True
        if self._moving:
            await self._suspend()

    async def _suspend(self) -> None:
        """libvirt resumes it at the destination, or here when nothing comes of it (as virsh's --timeout-suspend)."""
        self._guard.ignore_pauses()
        self._job.record.told_to_pause = True
        await self._job.save()
        # Once an attempt is over nobody would have the guest go on, and the next one leaves it paused for good.
        if not self._is_over:
            await self._ends.source.call(self._ends.handle.suspend)

    async def _too_dirty(self, passage: Passage, attempt: int) -> None:
        options = self._options
        text = "when RAM was ready the disks were too dirty for --downtime, the guest was given back"
        if attempt >= ATTEMPTS and options.on_stall in (OnStall.ABORT, OnStall.THROTTLE):
            raise Stalled(f"{text}, {ATTEMPTS} times", advice="raise --downtime, or choose --on-stall pause or wait")
        await self._again(passage, text)

    async def _again(self, passage: Passage, why: str) -> None:
        self._reporter.note(f"{why}: trying again")
        await self._leave(passage)
        await self._converge()

    async def _hand_over(self, passage: Passage, paused: float) -> Downtime | None:
        record = self._job.record
        with self._watch.phase("handover"), self._interrupts.deferred():
            await self._carriage.close()
            self._watch.step("images closed")
            disks_took = self._clock.now() - paused
            await self._guard.stand_down()
            async with starts_of(self._ends.target, self._ends.domain.uuid, self._clock.now) as started:
                await self._job.undecided(PATIENCE)
                self._watch.step("record synced")
                try:
                    await self._cross(passage)
                    record.owner = Owner.DESTINATION
                    await self._job.save()
                except (BlkmigError, TimeoutError, OSError) as error:
                    if (await self._life.settle()).owner is not Owner.DESTINATION:
                        raise
                    self._reporter.note(f"the handover had trouble, but the guest arrived: {error}")
                arrived = started() or self._clock.now()
        if not record.was_running or self._options.suspend:
            return None
        verify = self._watch.phases.get("verify", 0.0)
        total = arrived - paused
        ram = max(0.0, total - disks_took)
        steps = self._watch.steps | {"RAM, devices, start": max(0.0, total - sum(self._watch.steps.values()))}
        return Downtime(total, disk=disks_took - verify, verify=verify, ram=ram, steps=steps)

    async def _cross(self, passage: Passage) -> None:
        """Let libvirt hand over. Raises `LibvirtFailed` when that takes too long, and as `DomainMigration.wait`."""
        limit = max(HANDOVER, 20 * self._steering.downtime)
        passage.gate.open()
        try:
            async with time_limit(limit):
                await passage.migration.wait()
        except TimeoutError:
            raise LibvirtFailed(f"libvirt had not handed the guest over within {limit:.0f} s") from None

    async def _take_run_state(self, *, live: bool) -> None:
        """Before any pause: the record says that a migration is ours, and the watchdog is armed.

        Raises `GuestStateError` when somebody else migrates the guest.
        """
        await self._guest.check_still_here()
        await self._guest.check_awake()
        if not live:
            self._guard.ignore_pauses()
        self._job.record.run_state_taken = True
        self._job.record.migrating = True
        await self._job.save()
        # From when the record says so nobody disarms it (`Lifecycle.disarm`).
        await self._life.watchdog.arm(PATIENCE)

    async def _give_run_state_back(self) -> None:
        """Until the next attempt nothing is ours but the disks' copies."""
        self._job.record.run_state_taken = self._job.record.migrating = False
        try:
            await self._job.save()
            await self._guard.libvirt_has_ended()
        finally:
            self._life.disarm()

    def _pulse(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Another host must answer all the while."""
        return contextlib.nullcontext() if isinstance(self._options.place, Local) else pulse(self._life.agent)
