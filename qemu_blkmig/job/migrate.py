"""`migrate`: a running guest moves with its disks, or (`--pause-only`) its disks do while it stays paused here.

Phases: prepare; bulk; standby, if it is to wait for a word or a time; dirty rounds until the last one would fit the
downtime; then what `switchover` tells of.
"""

from __future__ import annotations

from pathlib import Path

from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import Refused
from qemu_blkmig.job.beginning import Beginning
from qemu_blkmig.job.carriage import Carriage
from qemu_blkmig.job.certificates_tried import require_data
from qemu_blkmig.job.connected import connect
from qemu_blkmig.job.guard import Guard
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.options import MigrateOptions, OnStall
from qemu_blkmig.job.plan import Plan, Planner, verify_launched
from qemu_blkmig.job.record import Job
from qemu_blkmig.job.reporting import Reporter, Stopwatch
from qemu_blkmig.job.result import Downtime, Result, remarks
from qemu_blkmig.job.rounds import Rounds
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.job.switchover import Switchover
from qemu_blkmig.qmp.guest import QemuGuest
from qemu_blkmig.qmp.ram import unfit_capabilities
from qemu_blkmig.qmp.throttle import check_can_throttle


async def migrate(
    options: MigrateOptions,
    reporter: Reporter,
    interrupts: Interrupts,
    clock: Clock,
    suspended: Job | None = None,
    beginning: Beginning | None = None,
) -> Result:
    """Migrate a guest, or go on with the suspended job; `beginning`: of the way to the destination.

    Raises a `BlkmigError` that tells the state of things; nothing of ours is left then, unless the job is suspended.
    """
    steering = Steering(options.downtime, options.transfer.bandwidth)
    async with Lifecycle(reporter, interrupts, steering, suspended, beginning) as life:
        life.job.record.migrate = options
        run = _Run(life, options, interrupts, clock)
        return await life.conduct(run.whole())


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

    async def whole(self) -> Result:
        """All phases."""
        with self._watch.phase("prepare"):
            await self._prepare()
        over = Switchover(
            self._life, self._options, self._interrupts, self._watch, self._connected, self._plan.disks, self._again
        )
        downtime = await self._rounds.lead_to(over.run)
        return self._result(downtime)

    async def _prepare(self) -> None:
        options, life = self._options, self._life
        source = await life.connect_source(options.source)
        agent = await life.start_agent(options.target.place)
        await require_data(agent, options.transfer.data, options.target.place, self._reporter.note)
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
        self._rounds = Rounds(life, options, self._watch, self._connected, self._plan.disks)

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
        await self._rounds.converge()
        return guard

    def _result(self, downtime: Downtime | None) -> Result:
        disks = self._carriage.results(self._connected.engine)
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
            read_back=self._connected.verification.read_back,
            mended=self._connected.verification.mended,
            slowed=self._rounds.brake.slowed(),
            warnings=[*self._plan.warnings, *remarks(downtime, self._life.steering.downtime)],
            serving=serving.pid if serving else None,
        )
