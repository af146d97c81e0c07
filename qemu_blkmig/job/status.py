"""How a job stands: drawn from a running job's figures, from what a dead one left, or from history."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qemu_blkmig.engine.migration import DiskFigures
from qemu_blkmig.errors import Refused
from qemu_blkmig.job.chronicle import Chronicle, DiskState, Outcome
from qemu_blkmig.job.journal import FILE
from qemu_blkmig.job.record import Owner, Record
from qemu_blkmig.job.reporting import STANDBY
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.job.telling import Telling

RUNNING, BUSY, LEFT, SUSPENDED, FINISHED = "running", "busy", "left behind", "suspended", "finished"
"""States of a job. BUSY: its processes live, but do not answer (its watchdog settles it, or it hangs)."""
ELSEWHERE = "another host's"
"""The state of a job of which only libvirt's hook knows here: its domain came here, or left."""


class DiskStatus(msgspec.Struct, frozen=True):
    """One disk, in bytes; `percent` of the bulk pass. `stable`: what a resume need not copy again, if it is known."""

    name: str
    size: int
    percent: float
    copied: int
    zeroed: int
    skipped: int
    dirty: int
    rounds: int
    stable: int | None = None


class DomainMoved(msgspec.Struct, frozen=True):
    """The domain of libvirt's that a job moves: its names here and there, and the libvirt there."""

    name: str
    uuid: str
    name_there: str
    target_uri: str


class Status(msgspec.Struct, frozen=True, kw_only=True, tag="status", tag_field="event"):
    """A job at one moment: bytes, bytes a second, seconds, `since` in seconds since 1970; null: not known.

    `percent`: of the bulk pass. `predicted_downtime`: of the disks' last round now, to be held against `downtime`,
    the limit. `converges_in`: until it is predicted to fit that; `confidence`: what such predictions were worth, from 0
    to 1. `put_off`: the part of `pending` that is copied last, because it is written all the time. `bandwidth`: the
    most that may be carried now; with --adaptive, `adapted`: the most that the guest's disks bear, and `guest_latency`:
    what a request to them took lately. `guest`: who has the guest. `next`: what may be done. `outcome`: how it ended.
    `domain`: null where it is none of libvirt's. `libvirt`: what libvirt did here with its domain, as the hook noted
    it.
    """

    job: str
    state: str
    phase: str | None = None
    since: float | None = None
    percent: float | None = None
    pending: int | None = None
    speed: float | None = None
    dirty_rate: float | None = None
    predicted_downtime: float | None = None
    converges_in: float | None = None
    confidence: float | None = None
    put_off: int = 0
    downtime: float | None = None
    bandwidth: int | None = None
    adapted: int | None = None
    guest_latency: float | None = None
    round: int = 0
    disks: list[DiskStatus] = []
    source: str | None = None
    destination: str | None = None
    guest: str | None = None
    next: str | None = None
    note: str | None = None
    outcome: Outcome | None = None
    domain: DomainMoved | None = None
    libvirt: list[str] = []


def live(record: Record, telling: Telling, steering: Steering) -> Status:
    """The status of the job that this process runs."""
    figures = telling.latest
    disks = [_live_disk(disk, telling.moved.get(disk.name, 0)) for disk in figures.disks] if figures else []
    waits = telling.phase == STANDBY
    return Status(
        job=record.job,
        state=RUNNING,
        phase=telling.phase,
        since=telling.since,
        percent=_percent(disks),
        pending=figures.pending if figures else None,
        speed=telling.speed,
        dirty_rate=figures.dirty_rate if figures else None,
        predicted_downtime=figures.predicted if figures else None,
        converges_in=figures.converges_in if figures else None,
        confidence=figures.confidence if figures else None,
        put_off=sum(disk.put_off for disk in figures.disks) if figures else 0,
        downtime=steering.downtime,
        bandwidth=steering.rate,
        adapted=steering.adapted,
        guest_latency=steering.latency,
        round=figures.round if figures else 0,
        disks=disks,
        source=_source(record),
        destination=_destination(record),
        guest=_guest(record, alive=True),
        next=f"qemu-blkmig switchover {record.job} moves the guest" if waits else None,
        note=telling.last_note,
        domain=_domain(record),
    )


def at_rest(record: Record, directory: Path, *, busy: bool) -> Status:
    """The status of a job that this process can only read of, in `directory`; `busy`: its processes live."""
    job = record.job
    if busy:
        state, advice = BUSY, "its processes are at work, or hang; ask again in a minute"
    elif record.suspended:
        state = SUSPENDED
        advice = f"qemu-blkmig resume {job} goes on where it was, qemu-blkmig cleanup {job} gives it up"
    else:
        state, advice = LEFT, f"qemu-blkmig cleanup {job} brings it to rest and removes what it made"
        if record.recording and record.owner is Owner.SOURCE:
            advice = f"qemu-blkmig resume {job} brings it to rest and goes on where it was; {advice}"
    steered = record.steered
    status = Status(
        job=job,
        state=state,
        downtime=steered.downtime if steered is not None else None,
        bandwidth=steered.bandwidth if steered is not None else None,
        source=_source(record),
        destination=_destination(record),
        guest=_guest(record, alive=busy),
        next=advice,
        domain=_domain(record),
    )
    journal = directory / FILE
    # It is begun a moment after the record: a coordinator may have been killed in between.
    return _with_journal(status, Chronicle(journal)) if journal.exists() else status


def past(path: Path) -> Status:
    """The status of a job that is over, by its journal. Raises `Refused` when that cannot be read."""
    chronicle = Chronicle(path)
    facts, outcome = chronicle.facts(), chronicle.last().outcome
    status = Status(
        job=path.stem,
        state=FINISHED,
        source=facts.get("source"),
        destination=facts.get("destination"),
        guest=outcome.guest if outcome else "its last processes did not note how it ended",
        domain=_past_domain(facts),
    )
    return _with_journal(status, chronicle)


def _with_journal(status: Status, chronicle: Chronicle) -> Status:
    try:
        last = chronicle.last()
    except Refused as error:
        return msgspec.structs.replace(status, note=str(error))
    disks = [_recorded_disk(disk) for disk in last.disks]
    sample = last.sample
    return msgspec.structs.replace(
        status,
        phase=last.phase.name if last.phase else None,
        since=last.phase.time if last.phase else None,
        percent=_percent(disks),
        pending=sample.pending if sample else None,
        dirty_rate=sample.dirty_rate if sample else None,
        predicted_downtime=sample.predicted if sample else None,
        round=sample.round if sample else 0,
        disks=disks,
        note=last.note.text if last.note else None,
        outcome=last.outcome,
    )


def _live_disk(disk: DiskFigures, moved: int) -> DiskStatus:
    done = min(disk.size, disk.bulk_done + moved) if disk.bulk_done < disk.size else disk.size
    return DiskStatus(
        disk.name, disk.size, 100.0 * done / disk.size, disk.copied, disk.zeroed, disk.skipped, disk.dirty, disk.rounds
    )


def _recorded_disk(disk: DiskState) -> DiskStatus:
    percent = 100.0 * max(disk.bulk_done, disk.stable) / disk.size
    return DiskStatus(
        disk.name, disk.size, percent, disk.copied, disk.zeroed, disk.skipped, disk.dirty, disk.rounds, disk.stable
    )


def _percent(disks: list[DiskStatus]) -> float | None:
    total = sum(disk.size for disk in disks)
    return round(sum(disk.percent * disk.size for disk in disks) / total, 1) if total else None


def noted(record: Record) -> dict[str, str]:
    """What the journal keeps of both ends, so that it can be told when the job is over."""
    facts = {"source": _source(record), "destination": _destination(record)}
    if (domain := _domain(record)) is not None:
        facts |= {f"domain {name}": value for name, value in msgspec.structs.asdict(domain).items()}
    return {name: value for name, value in facts.items() if value is not None}


def _source(record: Record) -> str | None:
    if (domain := _domain(record)) is not None:
        return f"libvirt:{domain.name}"
    return f"qmp:{record.source_qmp}" if record.source_qmp else None


def _domain(record: Record) -> DomainMoved | None:
    managed = record.managed or record.offline
    if managed is None:
        return None
    return DomainMoved(managed.name, managed.uuid, managed.name_there, managed.options.target_uri)


def _past_domain(facts: dict[str, str]) -> DomainMoved | None:
    told = [facts.get(f"domain {name}") for name in DomainMoved.__struct_fields__]
    known = [value for value in told if value is not None]
    return DomainMoved(*known) if len(known) == len(told) else None


def _destination(record: Record) -> str | None:
    return str(record.target_place) if record.target_place else None


def _guest(record: Record, *, alive: bool) -> str:
    if record.source_qmp is None and record.managed is None:
        return record.untouched_guest
    if record.owner is Owner.DESTINATION:
        return "the guest is the destination's"
    if record.owner is Owner.UNDECIDED:
        return "the guest was handed over, and it is not known yet whether the destination has taken it"
    if record.run_state_taken and record.was_running:
        paused = "may be paused for the switchover just now" if alive else "may still be paused by the job"
        return f"the guest is the source's; it {paused}"
    return "the guest is the source's, and runs there" if record.was_running else "the guest is the source's, paused"
