"""`copy`: a point-in-time consistent copy of a running guest's disks, or of an image file; the guest stays here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from qemu_blkmig.engine.convergence import Policy, Verdict
from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import BlkmigError, Stalled
from qemu_blkmig.job.adapting import Adapting
from qemu_blkmig.job.beginning import Beginning
from qemu_blkmig.job.carriage import Carriage
from qemu_blkmig.job.certificates_tried import require_data
from qemu_blkmig.job.connected import begin, connect
from qemu_blkmig.job.copy_images import OpenWay, Way, copy_image
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.options import CopyOptions, SaveOptions, Verify
from qemu_blkmig.job.plan import Planner
from qemu_blkmig.job.record import Job
from qemu_blkmig.job.reporting import Reporter, Stopwatch
from qemu_blkmig.job.result import Downtime, Result, remarks
from qemu_blkmig.job.sharing import Sharing
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.qmp.agent import GuestAgent
from qemu_blkmig.qmp.guest import QemuGuest
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.units import show_seconds

FREEZE = 5.0
"""Seconds in which a guest agent must freeze; one that hangs is given up on."""
THAW_TRIES = 3


async def copy(
    options: CopyOptions,
    reporter: Reporter,
    interrupts: Interrupts,
    clock: Clock,
    suspended: Job | None = None,
    beginning: Beginning | None = None,
) -> Result:
    """Copy disks, or go on with the suspended job; `beginning`: of the way to the destination.

    Raises a `BlkmigError` that tells the state of things; the guest runs on whatever happens.
    """

    async def to_images(life: Lifecycle) -> Way:
        agent = await life.start_agent(options.target.place)
        await require_data(agent, options.transfer.data, options.target.place, life.reporter.note)
        planner = Planner(
            agent,
            options.selection,
            Path(options.target.place.directory),
            life.reporter.note,
            life.job.record.identities,
        )
        return Way(
            planner,
            lambda plan: Carriage(
                life.job,
                plan,
                life.host,
                agent,
                options.transfer,
                life.reporter,
                options.verify,
                life.journal.stable,
            ),
        )

    steering = Steering(options.downtime, options.transfer.bandwidth)
    async with Lifecycle(reporter, interrupts, steering, suspended, beginning) as life:
        life.job.record.copy = options
        if options.image is not None:
            return await life.conduct(copy_image(life, options, to_images, clock))
        return await life.conduct(GuestCopy(life, options, to_images, clock).whole())


class GuestCopy:
    """The copy of a running guest's disks: bulk and rounds while it runs, the last round with it frozen and paused."""

    def __init__(
        self,
        life: Lifecycle,
        options: CopyOptions | SaveOptions,
        open_way: OpenWay,
        clock: Clock,
    ) -> None:
        self._life = life
        self._job = life.job
        self._options = options
        self._open_way = open_way
        self._reporter = life.reporter
        self._clock = clock
        self._watch = Stopwatch(clock, life.reporter)
        self._consistency = "crash"
        self._warnings: list[str] = []

    async def whole(self) -> Result:
        """All phases."""
        with self._watch.phase("prepare"):
            await self._prepare()
        sharing = Sharing(
            self._job.record.job,
            self._options.transfer,
            self._life.steering,
            self._reporter,
            self._carriage.payload,
        )
        adapting = Adapting(self._life, self._plan.disks, self._clock, wanted=self._options.transfer.adaptive)
        async with sharing, self._verification.in_background():
            async with adapting:
                with self._watch.phase("bulk"):
                    await begin(self._life, self._carriage, self._engine)
                    with self._verification.beside_pass():
                        await self._engine.bulk()
            sharing.bulk_over()
            await self._converge()
            downtime = await self._last_round()
            # The guest may run again meanwhile: what is to be copied again is copied in another last round.
            while not await self._read_back():
                downtime = await self._last_round()
        await self._carriage.close()
        await self._engine.finish()
        return self._result(downtime)

    async def _prepare(self) -> None:
        options, life = self._options, self._life
        source = await life.connect_source(str(options.source))
        way = await self._open_way(life)
        self._plan = await way.planner.plan(source, None, self._job.record.prefix, with_ram=False)
        self._plan.require()
        for warning in self._plan.warnings:
            self._reporter.note(warning)
        self._guest = QemuGuest(source)
        self._job.record.was_running = not await self._guest.is_paused()
        self._carriage = way.carriage(self._plan)
        await self._carriage.prepare()
        self._connected = await connect(life, self._plan, self._carriage, self._guest, options, self._clock)
        self._guard, self._engine = self._connected.guard, self._connected.engine
        self._verification = self._connected.verification

    async def _converge(self) -> None:
        policy = Policy(downtime=self._life.steering.downtime, max_rounds=self._options.max_rounds)

        async def follow() -> None:
            policy.downtime = self._life.steering.downtime

        self._life.steering.on_change(follow)
        with self._watch.phase("dirty"):
            verdict = await self._engine.converge(policy)
        predicted = self._engine.figures().predicted or 0.0
        if verdict is Verdict.STALLED and predicted > self._options.freeze_limit:
            raise Stalled(
                f"the last round is predicted to take {show_seconds(predicted)}, longer than the guest may be paused "
                f"({show_seconds(self._options.freeze_limit)})",
                advice="raise --freeze-limit or --bandwidth, or copy when the guest writes less",
            )

    async def _last_round(self) -> Downtime | None:
        """With the guest's file systems frozen, where it has an agent, and the guest paused; given back in any case."""
        self._verification.hold()
        self._guard.ignore_pauses()
        was_running = self._job.record.was_running
        await self._life.watchdog.arm(self._options.freeze_limit + FREEZE)
        async with self._frozen() if was_running and self._options.agent else contextlib.nullcontext():
            began = self._clock.now()
            self._watch.paused(began)
            async with self._paused() if was_running else contextlib.nullcontext():
                self._watch.step("pausing")
                await self._complete()
            self._watch.step("resuming")
            took = self._clock.now() - began
        self._life.watchdog.disarm()
        if not was_running:
            return None
        verify = self._watch.phases.get("verify", 0.0)
        return Downtime(took, disk=took - verify, verify=verify, ram=0.0, steps=self._watch.steps)

    async def _read_back(self) -> bool:
        """Whether what lies at the destination is what was written."""
        if not self._verification.wanted:
            return True
        with self._watch.phase("readback"):
            return await self._verification.rest()

    async def _complete(self) -> None:
        with self._watch.phase("switchover"):
            await self._copy_the_rest()
        self._watch.step("last round")
        if self._options.verify is Verify.FULL:
            with self._watch.phase("verify"):
                await self._carriage.compare(self._verification, self._copy_the_rest)
            self._watch.step("both sides compared")

    async def _copy_the_rest(self) -> None:
        limit = self._options.freeze_limit
        try:
            async with time_limit(limit):
                await self._engine.complete()
        except TimeoutError:
            raise Stalled(f"the last round did not end within {limit:.0f} s; the guest was given back") from None

    @contextlib.asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """A pause stops those writers, too, that a frozen file system does not (raw devices, swap)."""
        record = self._job.record
        await self._guest.check_still_here()
        await self._guest.check_awake()
        record.run_state_taken = True
        await self._job.save(within=self._options.freeze_limit)
        try:
            await self._guest.pause()
            yield
        finally:
            await self._guest.resume()
            record.run_state_taken = False
            # File systems may be frozen still.
            await self._job.save(within=self._options.freeze_limit)

    @contextlib.asynccontextmanager
    async def _frozen(self) -> AsyncIterator[None]:
        path = str(self._options.agent)
        try:
            agent = await GuestAgent.connect(path)
        except BlkmigError as error:
            self._warn(f"no guest agent, the copy is crash-consistent: {error}")
            yield
            return
        try:
            if not await self._may_freeze(agent):
                yield
                return
            self._job.record.frozen_by = path
            await self._job.save()
            try:
                await self._freeze(agent)
                yield
            finally:
                await self._thaw(agent)
        finally:
            await agent.close()

    async def _may_freeze(self, agent: GuestAgent) -> bool:
        """Whether nobody else, such as a backup tool, has frozen the file systems: our thaw would end that, too."""
        try:
            if await agent.status() == "thawed":
                return True
            why = "somebody else has frozen the file systems, and may thaw them at any time"
        except BlkmigError as error:
            why = str(error)
        self._warn(f"the guest agent was given up on, the copy is crash-consistent: {why}")
        return False

    async def _freeze(self, agent: GuestAgent) -> None:
        try:
            count = await agent.freeze(FREEZE)
            self._consistency = "file systems"
            self._reporter.note(f"the guest agent froze {count} file systems")
        except BlkmigError as error:
            self._warn(f"the guest agent was given up on, the copy is crash-consistent: {error}")

    async def _thaw(self, agent: GuestAgent) -> None:
        for remaining in reversed(range(THAW_TRIES)):
            try:
                await agent.thaw(FREEZE)
                break
            except BlkmigError as error:
                if self._consistency == "crash" or not remaining:
                    self._warn(f"the guest agent does not answer to thaw: {error}")
                    return
        self._job.record.frozen_by = None
        await self._job.save()

    def _warn(self, text: str) -> None:
        """Tell at once, and in the result."""
        self._reporter.note(text)
        self._warnings.append(text)

    def _result(self, downtime: Downtime | None) -> Result:
        disks = self._carriage.results(self._engine)
        running = self._job.record.was_running
        return Result(
            job=self._job.record.job,
            outcome="copied",
            guest="the guest runs at the source" if running else "the guest is at the source, paused as it was",
            disks=disks,
            total_copied=sum(disk.copied for disk in disks),
            phases=self._watch.phases,
            downtime=downtime,
            verified=self._options.verify.value,
            read_back=self._verification.read_back,
            mended=self._verification.mended,
            warnings=[
                *self._plan.warnings,
                *self._warnings,
                *remarks(downtime, self._life.steering.downtime),
            ],
            consistency=self._consistency,
            serving=self._job.record.source_process.pid if self._job.record.source_process else None,
        )
