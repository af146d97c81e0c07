"""`resume`: a job that was suspended goes on where it was."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import DestinationFailed, Refused
from qemu_blkmig.job.chronicle import Chronicle
from qemu_blkmig.job.connected import compare_instead
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.journal import FILE
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.moment import Moment
from qemu_blkmig.job.options import CopyOptions, MigrateOptions, OnStall
from qemu_blkmig.job.record import Job, Owner, Record, Steered
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.result import Result
from qemu_blkmig.job.settle import settle
from qemu_blkmig.job.settlement import unsettled
from qemu_blkmig.job.work import work_of
from qemu_blkmig.qmp.removal import remove_bitmaps
from qemu_blkmig.qmp.socket import SocketMonitor
from qemu_blkmig.virt.domain import Domain

_Options = MigrateOptions | CopyOptions | ManagedOptions


@dataclass(frozen=True)
class Changes:
    """What is to be other than it was asked for at first; None: as it was.

    `bandwidth`: bytes a second, 0: no limit. `compare`: the recording may be lost. `xml`, `persistent_xml`: as of
    `ManagedOptions`.
    """

    bandwidth: int | None = None
    downtime: float | None = None
    max_rounds: int | None = None
    on_stall: OnStall | None = None
    switchover: Moment | None = None
    launch: str | None = None
    xml: str | None = None
    persistent_xml: str | None = None
    compare: bool = False


async def resume(name: str, changes: Changes, reporter: Reporter, interrupts: Interrupts, clock: Clock) -> Result:
    """Go on with the job `name`. Raises as `migrate` and `copy` do; `Refused` where it cannot be gone on with."""
    job = Job.load(name)
    try:
        options: _Options | None = job.record.options
        if options is None or not (job.record.recording or job.record.suspended):
            raise Refused(
                f"job {name} cannot be resumed: {_why_nothing_is_kept(job.record)}",
                advice=f"run: qemu-blkmig cleanup {name}",
            )
        await _come_to_rest(job)
        options = _changed(_as_steered(options, job.record.steered), changes)
        if changes.xml is not None:
            _check_same_places(job, changes.xml)
        if changes.compare:
            await _forget_recording(job)
            options = replace(options, selection=replace(options.selection, compare=True, target_is_zero=False))
        else:
            await _check_same_qemu(job)
    except BaseException:
        job.release()
        raise
    return await work_of(options)(options, reporter, interrupts, clock, job)


def _why_nothing_is_kept(record: Record) -> str:
    if record.owner is Owner.DESTINATION:
        return "the destination has the guest"
    if record.owner is Owner.UNDECIDED:
        return "the guest was handed over, and it is not known who has it"
    if record.taken_back:
        return "its handover was undone, and nothing of what was copied is kept after that"
    return "nothing was copied yet, or it cannot be told what"


async def _come_to_rest(job: Job) -> None:
    """A job whose processes were all killed is brought to rest first, and what a lost host was left with is ended.

    Raises what tells that it cannot be.
    """
    if job.record.suspended and not job.record.target_launched:
        return
    name = job.record.job
    settlement = await settle(job, suspend=True, long_after=True)
    if not settlement.decided:
        raise unsettled(f"job {name} could not be brought to rest", settlement, name)
    if not settlement.suspended:
        job.remove()
        raise Refused(
            f"job {name} cannot be resumed, it has come to its end",
            state="; ".join(settlement.facts),
            advice="start anew, if the guest is still to be moved",
        )
    if job.record.target_launched:
        failure = DestinationFailed(
            "what an earlier attempt left at the destination cannot be tidied up yet",
            advice=f"when the destination host can be reached again, run: qemu-blkmig resume {name}",
        )
        failure.state, failure.suspended = "; ".join(settlement.facts), name
        raise failure


async def _check_same_qemu(job: Job) -> None:
    """Bitmaps live in the QEMU that has recorded; the socket of that may be another's by now."""
    if job.record.source_qmp is None:
        return
    monitor = await SocketMonitor.connect(job.record.source_qmp, who="source QEMU")
    try:
        process = ProcessId.of(monitor.peer_pid) if monitor.peer_pid else None
    finally:
        await monitor.close()
    if process != job.record.source_process:
        name = job.record.job
        raise Refused(
            "the source QEMU was restarted: what the guest has written since is not known any more",
            state="the guest is at the source; what was copied is at the destination",
            advice=f"{compare_instead(name)}; qemu-blkmig cleanup {name} removes what is left",
        )


async def _forget_recording(job: Job) -> None:
    """Both sides are compared, and recorded anew: bitmaps that are left would only be in the way."""
    job.starts_over = True
    if job.record.managed is not None:
        from qemu_blkmig.job.managed import forget_recording

        await forget_recording(job.record.managed, f"{job.record.prefix}-")
    if job.record.source_qmp is None:
        return
    monitor = await SocketMonitor.connect(job.record.source_qmp, who="source QEMU")
    try:
        await remove_bitmaps(monitor, f"{job.record.prefix}-")
    finally:
        await monitor.close()


def _as_steered(options: _Options, steered: Steered | None) -> _Options:
    """What was asked for, as it was changed while the job ran."""
    if steered is None:
        return options
    transfer = replace(options.transfer, bandwidth=steered.bandwidth)
    return replace(options, transfer=transfer, downtime=steered.downtime)


def _changed(options: _Options, changes: Changes) -> _Options:
    transfer = options.transfer
    if changes.bandwidth is not None:
        transfer = replace(transfer, bandwidth=changes.bandwidth or None)
    options = replace(
        options,
        transfer=transfer,
        downtime=options.downtime if changes.downtime is None else changes.downtime,
        max_rounds=options.max_rounds if changes.max_rounds is None else changes.max_rounds,
    )
    if changes.on_stall is not None and not isinstance(options, CopyOptions):
        options = replace(options, on_stall=changes.on_stall)
    if changes.switchover is not None and not isinstance(options, CopyOptions):
        options = replace(options, switchover=changes.switchover)
    if changes.xml is not None or changes.persistent_xml is not None:
        options = _with_xml(options, changes)
    if changes.launch is not None:
        if isinstance(options, ManagedOptions) or options.target.launch is None:
            raise Refused("--launch is of no use to this job: it starts no destination QEMU")
        options = replace(options, target=replace(options.target, launch=changes.launch))
    return options


def _with_xml(options: _Options, changes: Changes) -> _Options:
    if not isinstance(options, ManagedOptions):
        raise Refused("--xml is of no use to this job: libvirt does not manage its guest")
    return replace(
        options,
        xml=options.xml if changes.xml is None else changes.xml,
        persistent_xml=options.persistent_xml if changes.persistent_xml is None else changes.persistent_xml,
    )


def _check_same_places(job: Job, xml: str) -> None:
    """What was copied lies where it was agreed. Raises `Refused` where the XML has a disk in another place."""
    given = {disk.target: disk.path for disk in Domain.parse(xml).disks}
    for disk in Chronicle(job.directory / FILE).story().agreed:
        path = given.get(disk.name, disk.destination)
        if path != disk.destination:
            raise Refused(
                f"the XML says {path}, but what was copied lies in {disk.destination}",
                disk=disk.name,
                advice=f"name that path in the XML; or qemu-blkmig cleanup {job.record.job}, and start anew",
            )
