"""`migrate`: a running guest moves with its disks, or (`--pause-only`) its disks do while it stays paused here.

Phases: prepare; bulk; standby, if it is to wait for a word or a time; dirty rounds until the last one would fit the
downtime; then what `switchover` tells of.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from qemu_blkmig.engine.convergence import Policy, Verdict
from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import Refused, Stalled
from qemu_blkmig.job.brake import SHARES, Brake
from qemu_blkmig.job.carriage import Carriage
from qemu_blkmig.job.connected import begin, connect
from qemu_blkmig.job.guard import Guard
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.moment import reached
from qemu_blkmig.job.options import MigrateOptions, OnStall
from qemu_blkmig.job.plan import Plan, Planner, verify_launched
from qemu_blkmig.job.record import Job
from qemu_blkmig.job.reporting import STANDBY, Reporter, Stopwatch
from qemu_blkmig.job.result import Downtime, Result, remarks
from qemu_blkmig.job.sharing import Sharing
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.job.switchover import Switchover, disks_budget
from qemu_blkmig.qmp.guest import QemuGuest
from qemu_blkmig.qmp.ram import unfit_capabilities
from qemu_blkmig.qmp.throttle import check_can_throttle
from qemu_blkmig.units import show_seconds


async def migrate(
    options: MigrateOptions, reporter: Reporter, interrupts: Interrupts, clock: Clock, suspended: Job | None = None
) -> Result:
    """Migrate a guest, or go on with the suspended job.

    Raises a `BlkmigError` that tells the state of things; nothing of ours is left then, unless the job is suspended.
    """
    steering = Steering(options.downtime, options.transfer.bandwidth)
    async with Lifecycle(reporter, interrupts, steering, suspended) as life:
        life.job.record.migrate = options
        run = _Run(life, options, interrupts, clock)
        return await life.conduct(run.whole())


ROUNDS_OF_A_SHARE = 8
"""Rounds in which it shows whether the guest is slowed far enough."""


class _Run:
    """One migration, phase by phase."""

    def __init__(self, life: Lifecycle, options: MigrateOptions, interrupts: Interrupts, clock: Clock) -> None:
        self._life = life
        self._job = life.job
        self._options = options
        self._reporter = life.reporter
        self._interrupts = interrupts
        self._clock = clock
        self._watch = Stopwatch(clock, life.reporter)
        life.steering.may_wait = options.switchover.waits
        max_rounds = None if options.on_stall is OnStall.WAIT else options.max_rounds
        self._policy = Policy(downtime=0.0, max_rounds=max_rounds, put_off=options.put_off)

    async def whole(self) -> Result:
        """All phases."""
        self._life.steering.on_change(self._follow)
        await self._follow()
        with self._watch.phase("prepare"):
            await self._prepare()
        sharing = Sharing(self._job.record.job, self._options.transfer, self._life.steering, self._reporter)
        async with sharing:
            self._engine.aim(self._policy)
            with self._watch.phase("bulk"):
                await begin(self._life, self._connected)
                await self._engine.bulk()
            sharing.bulk_over()
            over = Switchover(
                self._life, self._options, self._interrupts, self._watch, self._connected, self._plan.disks, self._again
            )
            async with self._connected.verification.in_background():
                if self._options.switchover.waits:
                    await self._wait_for_word()
                else:
                    await self._converge()
                downtime = await over.run()
        return self._result(downtime)

    async def _wait_for_word(self) -> None:
        """Keep the disks in step until somebody says that the guest may move, and the last round fits then."""
        when, word = self._options.switchover, self._life.steering.switchover
        timer = asyncio.create_task(self._give_word(when.at)) if when.at is not None else None
        try:
            while True:
                self._reporter.note(
                    f"the disks are kept in step; the guest moves {f'at {when}, or ' if timer else ''}"
                    f"when you run: qemu-blkmig switchover {self._job.record.job}"
                )
                with self._watch.phase(STANDBY):
                    await self._engine.stand_by(self._policy, word)
                try:
                    return await self._converge()
                except Stalled as error:
                    # What days of copying have brought over is not thrown away for that.
                    word.clear()
                    self._reporter.note(f"not moved: {error}")
        finally:
            if timer is not None:
                timer.cancel()

    async def _give_word(self, at: float) -> None:
        await reached(at, self._clock.sleep)
        self._life.steering.switchover.set()

    async def _follow(self) -> None:
        """The rounds aim at the downtime in force."""
        self._policy.downtime = disks_budget(self._options, self._life.steering.downtime)

    async def _prepare(self) -> None:
        options, life = self._options, self._life
        source = await life.connect_source(options.source)
        agent = await life.start_agent(options.target.place)
        if options.target.qmp is not None:
            await life.attach_target(options.target.qmp)
        planner = Planner(
            agent,
            options.selection,
            Path(options.target.place.directory),
            self._reporter.note,
            self._job.record.identities,
        )
        self._plan: Plan = await planner.plan(
            source, life.target, self._job.record.prefix, with_ram=not options.pause_only
        )
        self._plan.require()
        if (options.target.ram_uri or "").startswith("tcp:"):
            self._reporter.note(
                "--ram-uri: the guest's RAM crosses the network in plain text, open to whoever is on it"
            )
        for warning in self._plan.warnings:
            self._reporter.note(warning)
        if options.on_stall is OnStall.THROTTLE:
            await check_can_throttle(source)
        self._brake = Brake(life, self._plan.disks, options.transfer.granularity, self._clock)
        self._job.record.keep_source = options.keep_source
        self._job.record.source_images = options.source_images
        guest = QemuGuest(source)
        self._job.record.was_running = not await guest.is_paused()
        self._carriage = Carriage(
            self._job,
            self._plan,
            life.host,
            agent,
            options.transfer,
            self._reporter,
            options.verify,
            life.journal.stable,
        )
        await self._carriage.prepare()
        if options.target.launch is not None:
            await self._launch()
        self._connected = await connect(life, self._plan, self._carriage, guest, options, self._clock)
        self._engine = self._connected.engine

    async def _launch(self) -> None:
        target = self._options.target
        qemu = await self._life.launch_target(str(target.launch), target.place.directory)
        await verify_launched(self._plan, qemu)
        if unfit := await unfit_capabilities(qemu.monitor):
            raise Refused("; ".join(unfit))

    async def _again(self) -> Guard:
        """Ready for another attempt at the switchover: a new destination QEMU, rounds until the last one fits."""
        await self._launch()
        guard = self._life.guard()
        await self._converge()
        return guard

    async def _converge(self) -> None:
        """Rounds until the last one would fit. Raises `Stalled` when it does not and the user wants no more."""
        with self._watch.phase("dirty"):
            await self._brake.look()
            verdict = await self._engine.converge(self._policy)
            if verdict is Verdict.STALLED and self._options.on_stall is OnStall.THROTTLE:
                verdict = await self._converge_slowed()
        if verdict is Verdict.FITS:
            return
        figures = self._engine.figures()
        text = (
            f"after {figures.round} rounds the last one is still predicted to take "
            f"{show_seconds(figures.predicted or 0)}, more than the disks' share "
            f"({show_seconds(self._policy.downtime)}) of --downtime: the guest writes faster than its disks are copied"
        )
        if self._options.on_stall is OnStall.PAUSE:
            self._reporter.note(f"{text}; it will be paused for as long as it takes (--on-stall pause)")
            return
        await self._brake.release()
        raise Stalled(text, advice="raise --downtime or --bandwidth, or choose --on-stall throttle, pause or wait")

    async def _converge_slowed(self) -> Verdict:
        """Rounds with the guest's writes slowed, the more the longer it takes."""
        usual, self._policy.max_rounds = self._policy.max_rounds, ROUNDS_OF_A_SHARE
        try:
            for share in SHARES:
                await self._brake.press(self._engine.figures(), share, self._policy.downtime)
                if await self._engine.converge(self._policy) is Verdict.FITS:
                    return Verdict.FITS
            return Verdict.STALLED
        finally:
            self._policy.max_rounds = usual

    def _result(self, downtime: Downtime | None) -> Result:
        disks = self._carriage.results(self._engine)
        running, target = self._job.record.was_running, self._life.target
        if self._options.pause_only:
            outcome, guest, serving = "copied", "the guest is paused at the source", self._job.record.source_process
        else:
            outcome, serving = "migrated", target.process if target else None
            guest = (
                "the guest runs at the destination" if running else "the guest is paused at the destination, as it was"
            )
        return Result(
            job=self._job.record.job,
            outcome=outcome,
            guest=guest,
            disks=disks,
            total_copied=sum(disk.copied for disk in disks),
            phases=self._watch.phases,
            downtime=downtime,
            verified=self._options.verify.value,
            slowed=self._brake.slowed(),
            warnings=[*self._plan.warnings, *remarks(downtime, self._life.steering.downtime)],
            serving=serving.pid if serving else None,
        )
