"""A domain of libvirt's moves with its disks: ours is the disks' part, and the gate in libvirt's migration stream.

Phases as in `migrate`; then what `managed_switchover` tells of. docs/architecture.md, "Domains of libvirt's".
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import BlkmigError, Refused
from qemu_blkmig.job.arrangement import Arrangement, arrange
from qemu_blkmig.job.beginning import Beginning
from qemu_blkmig.job.carriage import Carriage
from qemu_blkmig.job.connected import Connected, connect
from qemu_blkmig.job.ends import Ends
from qemu_blkmig.job.environment import libvirt_version
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.managed_options import ManagedOptions, with_other_xml
from qemu_blkmig.job.managed_switchover import ManagedSwitchover
from qemu_blkmig.job.options import OnStall
from qemu_blkmig.job.plan import NO_NEED_OF_US, NOTHING_TO_COPY, Plan, Planner
from qemu_blkmig.job.record import Job, Managed
from qemu_blkmig.job.reporting import Reporter, Stopwatch
from qemu_blkmig.job.result import Downtime, Result, remarks
from qemu_blkmig.job.rounds import Rounds
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.job.volumes import make_volumes
from qemu_blkmig.qmp.features import probe
from qemu_blkmig.qmp.guest import QemuGuest
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.qmp.removal import remove_bitmaps
from qemu_blkmig.qmp.throttle import check_can_throttle
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.virt.monitor import PassthroughMonitor

AGAIN = 5.0
"""Seconds until libvirt is told anew to pause a guest that it did not pause."""


async def migrate_managed(
    options: ManagedOptions,
    reporter: Reporter,
    interrupts: Interrupts,
    clock: Clock,
    suspended: Job | None = None,
    beginning: Beginning | None = None,
) -> Result:
    """Migrate a domain, or go on with the suspended job; `beginning`: of the way to the destination.

    Raises a `BlkmigError` that tells the state of things; nothing of ours is left then, unless the job is suspended.
    """
    steering = Steering(options.downtime, options.transfer.bandwidth)
    async with contextlib.AsyncExitStack() as stack:
        life = await stack.enter_async_context(Lifecycle(reporter, interrupts, steering, suspended, beginning))
        run = _Run(life, options, interrupts, clock, stack)
        return await life.conduct(run.whole())


async def forget_recording(managed: Managed, prefix: str) -> None:
    """Remove the bitmaps of a suspended job (see `remove_bitmaps`) from the domain's QEMU. Raises `Refused`."""
    async with contextlib.AsyncExitStack() as stack:
        ends = await Ends.open(managed.options, stack)
        monitor = await PassthroughMonitor.connect(ends.source, ends.handle, "source QEMU")
        stack.push_async_callback(monitor.close)
        await remove_bitmaps(monitor, prefix)


class _Run:
    """One migration, phase by phase."""

    def __init__(
        self,
        life: Lifecycle,
        options: ManagedOptions,
        interrupts: Interrupts,
        clock: Clock,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self._life = life
        self._job = life.job
        self._options = options
        self._reporter = life.reporter
        self._interrupts = interrupts
        self._clock = clock
        self._stack = stack
        self._watch = Stopwatch(clock, life.reporter)
        life.steering.may_wait = options.switchover.waits

    async def whole(self) -> Result:
        """All phases."""
        with self._watch.phase("prepare"):
            await self._prepare()
        over = ManagedSwitchover(
            self._life, self._options, self._interrupts, self._watch, self._connected, self._ends, self._arrangement,
            self._plan.disks, self._rounds.converge,
        )  # fmt: skip
        timer = asyncio.create_task(self._time_out(over))
        try:
            async with over.attempts():
                downtime = await self._rounds.lead_to(over.run)
        finally:
            timer.cancel()
        return self._result(downtime)

    async def _time_out(self, over: ManagedSwitchover) -> None:
        """`--timeout`: when it has passed, the guest is paused as soon as its disks have been passed over once."""
        if self._options.timeout is None:
            return None
        await self._clock.sleep(self._options.timeout)
        self._reporter.note("--timeout has passed: the guest is paused until it has moved")
        self._rounds.hurry()
        told = False
        while True:
            try:
                return await over.hurry()
            except BlkmigError as error:
                if not told:
                    self._reporter.note(f"the guest could not be paused, which is tried again until it is: {error}")
                told = True
            await self._clock.sleep(AGAIN)

    async def _reach(self) -> tuple[Ends, Monitor]:
        """The domain, by both libvirts, and its QEMU, which is asked what it can do: that takes a while, too."""
        ends = await Ends.open(self._options, self._stack, self._life.beginning)
        monitor = await PassthroughMonitor.connect(ends.source, ends.handle, "source QEMU")
        self._life.adopt_domain(monitor, ends.source, ends.target)
        await probe(monitor)
        return ends, monitor

    async def _connect(self) -> tuple[Ends, Monitor, AgentClient]:
        """To all of them at once: each takes its time over ssh."""
        try:
            async with asyncio.TaskGroup() as group:
                reached = group.create_task(self._reach())
                agent = group.create_task(self._life.start_agent(self._options.place))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return *reached.result(), agent.result()

    async def _prepare(self) -> None:
        options, life, record = self._options, self._life, self._job.record
        ends, monitor, agent = await self._connect()
        self._ends = ends
        domain = ends.domain
        number = await ends.source.call(ends.handle.ID)
        record.managed = Managed.of(options, domain.uuid, domain.name, number)
        self._arrangement: Arrangement = await arrange(options, domain, ends.source, ends.target, agent)
        placed = self._arrangement.placed(domain)
        known = None if options.unsafe else domain.aliases
        planner = Planner(agent, options.selection, Path("/"), self._reporter.note, record.identities, placed, known)
        self._plan: Plan = await planner.plan(monitor, None, record.prefix, with_ram=True)
        if problems := [*self._arrangement.problems, *self._plan.problems]:
            refused = Refused("; ".join(problems), state="nothing was touched", advice=self._mend(problems))
            refused.lasting = self._arrangement.lasting
            raise refused
        for warning in (*self._arrangement.notes(), *self._plan.warnings):
            self._reporter.note(warning)
        if options.on_stall is OnStall.THROTTLE:
            await check_can_throttle(monitor)
        record.source_images = options.source_images
        guest = QemuGuest(monitor)
        record.was_running = not await guest.is_paused()
        self._carriage = Carriage(
            self._job, self._plan, life.host, agent, options.transfer, self._reporter, options.verify,
            life.journal.stable,
        )  # fmt: skip
        await make_volumes(ends.target, agent, self._plan, self._job, self._arrangement.owner)
        await self._carriage.prepare()
        for name, end in (("Source libvirt", ends.source), ("Destination libvirt", ends.target)):
            life.environment[name] = libvirt_version(await end.call(end.handle.getLibVersion))
        self._connected: Connected = await connect(life, self._plan, self._carriage, guest, options, self._clock)
        if options.abort_on_error:
            await self._connected.guard.end_on_io_error()
        self._rounds = Rounds(life, options, self._watch, self._connected, self._plan.disks)

    def _mend(self, problems: Sequence[str]) -> str | None:
        """What to do about them, where that is known."""
        if problems == [NOTHING_TO_COPY]:
            return NO_NEED_OF_US
        if self._job.record.identities:
            return with_other_xml(self._job.record.job) if self._options.xml is not None else None
        paths = self._arrangement.paths.values()
        if self._options.xml is None and any(path in problem for path in paths for problem in problems):
            return "mend that, or name another path there (--disk TARGET=PATH), and run the same command again"
        return None

    def _result(self, downtime: Downtime | None) -> Result:
        disks = self._carriage.results(self._connected.engine)
        runs = self._job.record.was_running and not self._options.suspend
        return Result(
            job=self._job.record.job,
            outcome="migrated",
            guest=f"the guest {'runs' if runs else 'is paused'} at the destination",
            disks=disks,
            total_copied=sum(disk.copied for disk in disks),
            phases=self._watch.phases,
            downtime=downtime,
            verified=self._options.verify.value,
            read_back=self._connected.verification.read_back,
            mended=self._connected.verification.mended,
            slowed=self._rounds.brake.slowed(),
            warnings=[
                *self._arrangement.notes(),
                *self._plan.warnings,
                *remarks(downtime, self._life.steering.downtime),
            ],
        )
