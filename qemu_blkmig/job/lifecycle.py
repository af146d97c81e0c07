"""The life of a job: everything that it makes, and its end, in which nothing of it is left, whatever happened."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Callable, Coroutine
from importlib import import_module
from types import TracebackType

import msgspec

from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.destination.protocol import AliveReply, EndProcess, Mark
from qemu_blkmig.engine.outlast import outlast
from qemu_blkmig.errors import (
    BlkmigError,
    ConnectionLost,
    DestinationFailed,
    DestinationWriteError,
    HostSilent,
    Interrupted,
    MigrationError,
    RecordFailed,
    Refused,
    RequestError,
    Undecided,
)
from qemu_blkmig.job.beginning import Beginning
from qemu_blkmig.job.chronicle import AgreedDisk
from qemu_blkmig.job.control import SOCKET, ControlServer, Ended
from qemu_blkmig.job.datapath import INSECURE, DataPath
from qemu_blkmig.job.datapath_made import open_data_path
from qemu_blkmig.job.diskmap import Cells
from qemu_blkmig.job.environment import environment, terms
from qemu_blkmig.job.guard import Guard
from qemu_blkmig.job.history import OWNER
from qemu_blkmig.job.host import host_of
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.journal import Journal
from qemu_blkmig.job.limits import give_back
from qemu_blkmig.job.live import Live
from qemu_blkmig.job.peers import until
from qemu_blkmig.job.place import Place
from qemu_blkmig.job.plan import Plan
from qemu_blkmig.job.record import Job, Owner, Steered
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.result import Result
from qemu_blkmig.job.settle import settle
from qemu_blkmig.job.settlement import Settlement, unsettled
from qemu_blkmig.job.status import noted
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.job.target import TargetQemu
from qemu_blkmig.job.telling import Telling
from qemu_blkmig.job.watchdog_client import Watchdog
from qemu_blkmig.nbd.address import Export
from qemu_blkmig.qmp.clients import SOCKET as SOCKET_NAME
from qemu_blkmig.qmp.dirtylog import BitmapLog
from qemu_blkmig.qmp.exports import ExportServer
from qemu_blkmig.qmp.features import ask
from qemu_blkmig.qmp.guest import MIGRATED, UNDER_WAY, migration_away, migration_status, run_state
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.qmp.removal import remove_all
from qemu_blkmig.qmp.socket import SocketMonitor
from qemu_blkmig.qmp.topology import Topology
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.host import Host
from qemu_blkmig.virt.connection import Connection

log = logging.getLogger(__name__)

MOMENT = 0.5
"""Seconds in which the end of a connection shows everywhere."""
JOURNAL = 2.0
"""Seconds in which the journal should have taken in what a resume goes by; what it has not is copied again."""
OTHERS = 0.2
"""Seconds between two looks at a migration that is not ours."""
TAKEN_OVER = 10.0
"""Seconds in which whoever has migrated the guest starts it there and ends it here, or gives it back."""
INSISTED = 5.0
"""Seconds that who insists on our end is kept waiting for our storage."""
TAKEN = "look there whether the guest uses the images (virsh list --all), and remove them only if it does not"


class Lifecycle:
    """The job's parts, made in order. `conduct` runs the work and brings everything to rest after it."""

    def __init__(
        self,
        reporter: Reporter,
        interrupts: Interrupts,
        steering: Steering,
        suspended: Job | None = None,
        beginning: Beginning | None = None,
    ) -> None:
        """`suspended`: a job to be gone on with, in place of a new one. `beginning`: of its way to the destination."""
        self.beginning = beginning
        self._suspended = suspended
        self._display = reporter
        self.steering = steering
        self._interrupts = interrupts
        self._guard: Guard | None = None
        self._source: Monitor | None = None
        self._libvirts: tuple[Connection, Connection] | None = None
        self._exports: ExportServer | None = None
        self._host: Host | None = None
        self._agent: AgentClient | None = None
        self._lost: DestinationFailed | None = None
        self._at_rest = False
        self._unsettled = False
        self._open: Undecided | None = None
        self._ended_there = False
        self._signals = contextlib.ExitStack()
        self.target: TargetQemu | None = None
        self.environment: dict[str, str] = {}
        """What is known of where the job runs, beside what is asked for anyway."""

    async def __aenter__(self) -> Lifecycle:
        self._signals.enter_context(self._interrupts.watching())
        try:
            self.job = self._suspended or self._new_job()
            self.job.record.steered = self._steered()
            if self._suspended is not None:
                await self.job.wake()
            try:
                self.watchdog = await Watchdog.start(self.job.directory, self.job.lock)
            except BaseException:
                await self._give_back()
                raise
            self._interrupts.on_insisted = self._give_up
            begin = Journal.create if self._suspended is None else Journal.open
            self.journal = begin(self.job.directory, self._warner())
            self.reporter = Telling(self._display, self.journal, self.steering)
            self.reporter.job(self.job.record.job)
            await self._tell_limits()
            self.steering.on_change(self._tell_limits)
            self.steering.on_change(self._keep_steered)
            try:
                await self._listen()
            except BaseException:
                await asyncio.to_thread(self.journal.close)
                await self.watchdog.dismiss()
                await self._give_back()
                raise
        except BaseException as error:
            self._signals.close()
            interrupt = self._interrupts.error("nothing was touched")
            if isinstance(error, asyncio.CancelledError) and interrupt is not None:
                raise interrupt from error
            if isinstance(error, OSError):
                raise Refused(f"cannot start the watchdog: {error}", state="nothing was touched") from error
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupts.settling()
        try:
            await asyncio.to_thread(self.journal.close)
            if self._at_rest:
                await self.watchdog.dismiss()
                self.job.release()
            elif self._unsettled:
                await asyncio.to_thread(self.job.finish_saving)
                self.watchdog.take_over()
                self.job.release()
        finally:
            self._signals.close()

    def _new_job(self) -> Job:
        begun = self.beginning.take_job() if self.beginning is not None else None
        return begun or Job.create()

    def _steered(self) -> Steered:
        return Steered(self.steering.bandwidth, self.steering.downtime)

    async def _keep_steered(self) -> None:
        """What was changed holds when the job is resumed, too."""
        if self.job.record.steered == self._steered():
            return
        self.job.record.steered = self._steered()
        try:
            await self.job.save()
        except RecordFailed as error:
            self.reporter.note(f"a resume will go by what was asked for before: {error}")

    async def _give_back(self) -> None:
        """The job never came to life: a suspended one goes back to rest."""
        if self._suspended is None:
            self.job.remove()
        else:
            await self.job.rest()
            self.job.release()

    def _give_up(self) -> None:
        """The watchdog, which settles the job, is not to suspend it."""
        self.job.record.recording = False
        with contextlib.suppress(OSError):
            self.job.save_blocking(INSISTED)

    def _warner(self) -> Callable[[str], None]:
        """What the journal's thread may call to tell the user something."""
        loop, display = asyncio.get_running_loop(), self._display

        def warn(text: str) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(display.note, text)

        return warn

    async def _tell_limits(self) -> None:
        self.reporter.limits(self.steering.downtime, self.steering.rate)

    async def _listen(self) -> None:
        """Open the control socket; a job that has none can still be interrupted, and is no failure."""
        live = Live(self.job.record, self.reporter, self.steering, self._interrupts)
        self._control = ControlServer(self.job.runtime / SOCKET, live)
        try:
            await self._control.start()
        except OSError as error:
            self.reporter.note(f"this job cannot be controlled from other terminals: {error}")

    async def agree(self, plan: Plan) -> None:
        """Note what is about to be done; somebody will clean up after us from now on. Raises `Refused`."""
        await self.watchdog.stand()
        for name, value in noted(self.job.record).items():
            self.journal.fact(name, value)
        self.journal.fact("bitmaps", f"{self.job.record.prefix}-b")
        await self._note_plan(plan)
        self.journal.agree(
            [
                AgreedDisk(
                    name=disk.name,
                    size=disk.size,
                    source=disk.filename,
                    destination=image.path if (image := plan.images.get(disk.name)) else "a stream",
                    format=image.format if image else disk.format,
                )
                for disk in plan.disks
            ]
        )

    async def _note_plan(self, plan: Plan) -> None:
        """What a report shows of the plan and of where it is carried out."""
        there = self._agent.there if self._agent is not None else None
        target = self.target.monitor if self.target is not None else None
        found = await environment(self._source, target, there)
        self.journal.fact("environment", msgspec.json.encode(found | self.environment).decode())
        self.journal.fact("plan", msgspec.json.encode(terms(self.job.record)).decode())
        kept: dict[str, Cells] = {}
        if self._suspended is not None:
            with contextlib.suppress(Refused):
                kept = self.journal.maps()
        self.reporter.maps.begin({disk.name: disk.size for disk in plan.disks}, kept)

    def stable(self) -> dict[str, int]:
        """What of the bulk pass is known to be flushed, by disk; if the journal cannot be read, nothing is."""
        try:
            return self.journal.stable_by_disk()
        except Refused as error:
            self.reporter.note(f"{error}: all is copied anew")
            return {}

    async def forget_stable(self) -> None:
        """The disks are copied anew: what the journal says of an earlier pass holds no more. Raises `Refused`."""
        if self._suspended is None:
            return
        for disk in self.stable():
            self.journal.stable(disk, 0)
        if not await self.journal.written():
            raise Refused("the journal cannot be written, and it tells of an earlier pass over the disks")

    @property
    def source(self) -> Monitor:
        """The source QEMU's monitor, once connected."""
        if self._source is None:
            raise RuntimeError("the source is not connected yet")
        return self._source

    @property
    def exports(self) -> ExportServer:
        """The source's NBD server, once opened."""
        if self._exports is None:
            raise RuntimeError("the source is not opened yet")
        return self._exports

    async def connect_source(self, path: str) -> Monitor:
        """Connect to the source QEMU, which is asked at once what it can do. Raises `Refused`."""
        begun = self.beginning.take_source() if self.beginning is not None else None
        self._source = await (begun or SocketMonitor.connect(path, who="source QEMU"))
        ask(self._source)
        self.job.record.source_qmp = path
        self.job.record.source_process = ProcessId.of(self._source.peer_pid) if self._source.peer_pid else None
        await self.job.save()
        return self._source

    def adopt_domain(self, monitor: Monitor, source: Connection, target: Connection) -> None:
        """The guest is a domain of libvirt's: its QEMU, and both libvirts, by connections that outlast this."""
        # What settles its two ends is loaded while all is well.
        import_module("qemu_blkmig.job.settle_domains")
        self._source = monitor
        self._libvirts = (source, target)

    async def start_agent(self, place: Place) -> AgentClient:
        """Start the agent beside the destination's storage at `place`. Raises `Refused`, `DestinationFailed`."""
        self.job.record.target_place = place
        await self.job.save()
        self._host = host_of(place, self.job.runtime, self.job.record.job, self.beginning)
        standing = asyncio.create_task(self.watchdog.stand())
        self._agent = await self._host.start_agent()
        await standing
        return self._agent

    @property
    def host(self) -> Host:
        """The destination host, once its agent is started."""
        if self._host is None:
            raise RuntimeError("the destination host is not known yet")
        return self._host

    @property
    def agent(self) -> AgentClient:
        """The agent beside the destination's storage, once started."""
        if self._agent is None:
            raise RuntimeError("the agent is not started yet")
        return self._agent

    async def why_destination_gone(self) -> DestinationFailed | None:
        """Why the agent, or the connection to it, is gone, if it is or comes to be in a moment."""
        if self._agent is not None:
            self._lost = await self._agent.why_gone(MOMENT)
        return self._lost

    def disarm(self) -> None:
        """Silence of ours is no reason to act any more, unless the guest's run state, or its limits, are still ours."""
        if not (self.job.record.run_state_taken or self.job.record.throttled):
            self.watchdog.disarm()

    async def attach_target(self, path: str) -> None:
        """Connect to a destination QEMU that already waits at the QMP socket `path` there. Raises `Refused`."""
        self.target = await TargetQemu.attach(self.host, self.agent, path)
        self.job.record.target_qmp = path
        self.job.record.target_process = self.target.process
        await self.job.save()

    async def launch_target(self, command: str, directory: str) -> TargetQemu:
        """Start the destination QEMU. Raises `Refused`."""
        self.target = await TargetQemu.launch(self.job, self.host, self.agent, command, directory)
        return self.target

    async def drop_target(self) -> None:
        """End the destination QEMU that we launched: it took part in an attempt that was called off."""
        process = self.job.record.target_process
        if self._guard is not None:
            await self._guard.stand_down()
        if self.target is not None:
            await self.target.close()
        if process is not None and (await self.agent.expect(EndProcess(process, group=True), AliveReply)).alive:
            raise MigrationError(f"the destination QEMU (pid {process.pid}) could not be ended")

    def guard(self) -> Guard:
        """Start to watch the guest and the destination QEMU, on behalf of the task that calls this."""
        work = asyncio.current_task()
        if work is None:
            raise RuntimeError("a guard needs a task to watch over")
        self._guard = Guard(self.job, self.source, self.target, self.watchdog, work)
        return self._guard

    async def open_source(
        self, plan: Plan, granularity: int, shared_base: bool, data: DataPath | None
    ) -> tuple[BitmapLog, dict[str, Export]]:
        """Start the source's NBD server, on a unix socket or where `data` says, with a lasting export for each disk.

        Returns the record of what the guest writes, and the exports by disk.
        """
        prefix = self.job.record.prefix
        self._exports = await self._export_server(data)
        topology = await Topology.snapshot(self.source, plan.disks, ours=prefix)
        await self._start_server(self._exports)
        exports = {}
        for number, disk in enumerate(plan.disks):
            name = f"{prefix}-data{number}"
            await self._exports.add(name, disk.node, allocation_depth=shared_base and disk.backing is not None)
            exports[disk.name] = Export(self._exports.address, name)
        log_ = BitmapLog(
            self.source, plan.disks, prefix=prefix, granularity=granularity, exports=self._exports, topology=topology
        )
        return log_, exports

    async def _export_server(self, data: DataPath | None) -> ExportServer:
        place = self.job.record.target_place
        if data is None or place is None:
            return ExportServer(self.source, str(self.job.runtime / SOCKET_NAME))
        if not data.tls:
            self.reporter.note(INSECURE)
        name = f"{self.job.record.prefix}-tls"
        address = await open_data_path(data, self.source, place, name, self.job.runtime)
        return ExportServer(self.source, address, name if data.tls else None)

    async def _start_server(self, exports: ExportServer) -> None:
        """The record says that the server is ours before it is, so that no crash leaves one behind."""
        self.job.record.nbd_server = True
        await self.job.save()
        try:
            await exports.start()
        except Refused:
            self.job.record.nbd_server = False
            await self.job.save()
            raise

    async def conduct(self, work: Coroutine[None, None, Result]) -> Result:
        """Run the work; then end the job. Raises a `BlkmigError` that tells the state of things."""
        try:
            result = await work
            with self._interrupts.deferred():
                await self._conclude(result)
        except (Exception, asyncio.CancelledError) as error:
            self._interrupts.settling()
            # In a task of its own: this one may have been cancelled, and that is over.
            failure = (await outlast(self._fail(error))).result()
            await self._control.end(Ended(failure.exit_code, str(failure), failure.state))
            raise failure from error
        if self._open is not None:
            await self._control.end(Ended(self._open.exit_code, str(self._open), self._open.state))
            raise self._open
        if self._ended_there:
            ended = Undecided(
                "the guest was handed over, but then the destination QEMU ended (or the guest shut down)",
                state="the guest runs nowhere; its disks at the destination are the truth, those at the source are old",
                advice="start the guest from the destination's images, never from the source's",
            )
            await self._control.end(Ended(ended.exit_code, str(ended), ended.state))
            raise ended
        await self._control.end(Ended(0, result.outcome, result.guest))
        return result

    async def settle(self, *, suspend: bool = False) -> Settlement:
        """Bring both sides to rest, by what the record says."""
        target = self.target.monitor if self.target is not None else None
        return await settle(
            self.job, self._source, target, self._release_images, self._host, self._agent, suspend=suspend
        )

    async def _conclude(self, result: Result) -> None:
        if self._guard is not None:
            await self._guard.stand_down()
        if self._agent is not None:
            await self._mark(self._agent, result)
        if self.job.record.owner is Owner.DESTINATION:
            target = self.target.monitor if self.target is not None else None
            settlement = await settle(
                self.job, self._source, target, host=self._host, agent=self._agent, libvirts=self._libvirts
            )
            self._ended_there = settlement.ended
            result.warnings.extend(settlement.facts[1:])
        else:
            settlement = Settlement(self.job.record.owner)
            await self._leave_source(result)
        if self._agent is not None:
            await self._agent.close()
            self._agent = None
        await self._let_go()
        name = self.job.record.job
        self.journal.fact("result", msgspec.json.encode(result).decode())
        if settlement.decided:
            await self._forget(0, result.outcome, result.guest)
        elif settlement.left_there:
            result.warnings.append(f"when the destination host can be reached again, run: qemu-blkmig cleanup {name}")
        else:
            self._open = _left_to_watchdog("the guest was handed over, but not everything is at rest", settlement, name)
        self._part(settlement)

    async def _mark(self, agent: AgentClient, result: Result) -> None:
        """The images hold all there is: their ownership records say so."""
        record = self.job.record
        if left := [made.path for made in record.created if made.path not in record.images]:
            result.warnings.append(
                "what was copied of disks that were unplugged since stays at the destination, incomplete: remove it "
                f"there, with what lies beside it (.NAME.blkmig*): {', '.join(left)}"
            )
        try:
            await agent.request(Mark(record.job, record.images, "complete"))
            record.marked = True
        except BlkmigError as error:
            result.warnings.append(str(error))

    async def _leave_source(self, result: Result) -> None:
        """After a success that leaves the guest here: what of ours is still there goes; if not, that is no failure."""
        record = self.job.record
        if record.source_qmp is None:
            return
        try:
            await give_back(self.job, self.source)
            await remove_all(self.source, prefix=record.prefix, nbd_server_is_ours=record.nbd_server)
        except (RequestError, ConnectionLost) as error:
            result.warnings.append(f"something of ours may be left in the source QEMU: {error}")

    async def _forget(self, exit_code: int, outcome: str, guest: str | None) -> None:
        """All is at rest: nothing is left for a watchdog or `cleanup` to do; how it ended goes down in history."""
        self.reporter.close()
        self.journal.fact(OWNER, self.job.record.owner.value)
        self.journal.outcome(exit_code, outcome, guest)
        await asyncio.to_thread(self.journal.close)
        await asyncio.to_thread(self.job.remove)
        self._at_rest = True

    async def _fail(self, error: BaseException) -> BlkmigError:
        failure = await self._explain(error)
        if self._guard is not None:
            await self._guard.stand_down()
        if self.job.record.source_qmp is None and not (self.job.record.images or self.job.record.volumes):
            await self._release_images()
            failure.state = failure.state or "nothing was touched"
            failure.advice = failure.advice or _anew(failure)
            await self._forget(failure.exit_code, str(failure), failure.state)
            return failure
        await self._outlast_others()
        suspend = failure.mendable or (self._suspended is not None and isinstance(failure, Refused))
        if suspend:
            self.journal.note(f"the job rests: {failure}")
            self.reporter.close()
            # The guest may stand still, and does not wait for a disk that stalls.
            with contextlib.suppress(TimeoutError):
                async with time_limit(JOURNAL):
                    await self.journal.written()
        settlement = await self.settle(suspend=suspend)
        # An agent that goes on would keep our end waiting for it.
        await self._release_images()
        await self._let_go()
        failure = _told(failure, settlement, self.job)
        if settlement.decided and not settlement.suspended:
            await self._forget(failure.exit_code, str(failure), failure.state)
        self._part(settlement)
        return failure

    async def _outlast_others(self) -> None:
        """Where somebody else migrates the guest away our images stay locked until that has ended: it may be to them,
        and the guest would go on with what is incomplete. So its QEMU there does not start, and it is given back.
        """
        source = self._source
        if source is None or self._agent is None or self.job.record.migrating:
            return

        async def let_go() -> bool:
            return await run_state(source) not in MIGRATED

        with contextlib.suppress(BlkmigError):
            if await migration_away(source) in (*UNDER_WAY, "completed"):
                self.reporter.note("somebody else migrates the guest: until that has ended the copies stay locked")
            while await migration_status(source) in UNDER_WAY:  # noqa: ASYNC110 - no event may come of others'
                await asyncio.sleep(OTHERS)
            await until(let_go, TAKEN_OVER)

    def _part(self, settlement: Settlement) -> None:
        """What is not settled is left to the watchdog, which tries again; else it is dismissed."""
        self._unsettled = not settlement.decided and not settlement.left_there
        self._at_rest = not self._unsettled

    async def _explain(self, error: BaseException) -> BlkmigError:
        """What happened, as one of our own errors."""
        if isinstance(error, BlkmigError):
            reason = await self._guard.explain(error) if self._guard is not None else error
            return await self._explain_by_host(reason)
        if (interrupt := self._interrupts.error()) is not None:
            return interrupt
        if self._guard is not None and self._guard.error is not None:
            return self._guard.error
        log.error("defect", exc_info=error)
        return MigrationError(f"a defect of qemu-blkmig: {type(error).__name__}: {error}", advice="please report it")

    async def _explain_by_host(self, error: BlkmigError) -> BlkmigError:
        """A connection to another host takes all down that goes through it: its own end is the reason."""
        if not isinstance(error, ConnectionLost | DestinationFailed) or isinstance(error, HostSilent):
            return error
        return await self.why_destination_gone() or error

    async def _release_images(self) -> None:
        if self._agent is not None:
            agent, self._agent = self._agent, None
            self._lost = await agent.why_gone(0)
            await agent.abandon()

    async def _let_go(self) -> None:
        if self._source is not None:
            await self._source.close()
        if self.target is not None:
            await self.target.close()
        if self._host is not None:
            await self._host.close()


def _told(failure: BlkmigError, settlement: Settlement, job: Job) -> BlkmigError:
    if settlement.decided and settlement.suspended:
        name = job.record.job
        failure.suspended = name
        failure.state = "; ".join(settlement.facts)
        go_on, give_up = f"qemu-blkmig resume {name}", f"qemu-blkmig cleanup {name} removes what is left"
        if isinstance(failure, Refused):
            give_up = f"else {give_up}, to begin anew"
        if failure.advice is None or go_on not in failure.advice:
            mend = failure.advice or _mend(failure)
            failure.advice = f"{f'{mend}: ' if mend else ''}{go_on} goes on where it was"
        failure.advice = f"{failure.advice}; {give_up}"
        return failure
    arrived = settlement.owner is Owner.DESTINATION and (settlement.decided or settlement.left_there)
    if arrived and not isinstance(failure, Interrupted):
        return _arrived_all_the_same(failure, settlement, job)
    if settlement.decided:
        failure.state = "; ".join(settlement.facts)
        failure.advice = TAKEN if settlement.taken else failure.advice or _anew(failure)
        return failure
    if settlement.left_there:
        failure.state = "; ".join(settlement.facts)
        failure.advice = _when_reached(job)
        return failure
    undecided = _left_to_watchdog(str(failure), settlement, job.record.job)
    undecided.__cause__ = failure
    return undecided


def _mend(failure: BlkmigError) -> str | None:
    """What is to be done before the job can go on, where it does not go on by itself."""
    if isinstance(failure, DestinationWriteError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room at the destination"
    return "if that can be mended" if isinstance(failure, Refused) else None


def _arrived_all_the_same(failure: BlkmigError, settlement: Settlement, job: Job) -> Undecided:
    """No failure whose exit code would say that the source is the truth: it is not any more."""
    told = Undecided(
        f"the guest was handed over, but then: {failure}",
        state="; ".join(settlement.facts),
        advice="see how the guest is there" if settlement.decided else _when_reached(job),
    )
    told.__cause__ = failure
    return told


def _when_reached(job: Job) -> str:
    return f"when the destination host can be reached again, run: qemu-blkmig cleanup {job.record.job}"


def _anew(failure: BlkmigError) -> str:
    if isinstance(failure, Interrupted):
        return "run the same command again: it starts from the beginning"
    return "mend the cause and run the same command again"


def _left_to_watchdog(what: str, settlement: Settlement, job: str) -> Undecided:
    settlement.facts.append("the job's watchdog goes on trying to settle it")
    return unsettled(what, settlement, job)
