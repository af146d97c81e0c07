"""Jobs as text for people."""

from __future__ import annotations

import time

import msgspec

from qemu_blkmig.job.status import FINISHED, RUNNING, Status
from qemu_blkmig.units import show_bytes, show_rate, show_seconds


class Jobs(msgspec.Struct, frozen=True):
    """What `jobs` lists."""

    directory: str
    jobs: list[Status]


class Cleaned(msgspec.Struct, frozen=True):
    """What `cleanup` did: who has the guest now, and how things stand in sentences.

    Of a job that was over already: what was noted then; `owner` may be "unknown".
    """

    job: str
    owner: str
    facts: list[str]


class Told(msgspec.Struct, frozen=True):
    """What a job answered, in words."""

    job: str
    text: str


class Cancelled(msgspec.Struct, frozen=True):
    """A job that was cancelled: what it said, and how things stand."""

    job: str
    text: str
    guest: str | None


def jobs(outcome: Jobs) -> str:
    """A line for each job, its name first."""
    return "\n".join(
        "  ".join(part for part in (job.job, job.state, _way(job), _standing(job), job.guest) if part)
        for job in outcome.jobs
    )


def status(job: Status) -> str:
    """Everything that is known of a job."""
    lines = [f"job {job.job}: {job.state}" + (f", {standing}" if (standing := _standing(job)) else "")]
    if way := _way(job):
        lines.append(f"  {way}")
    if figures := _figures(job):
        lines.append(f"  {figures}")
    for disk in job.disks:
        stable = "" if disk.stable is None else f", {show_bytes(disk.stable)} of the first pass are stable"
        lines.append(
            f"  disk {disk.name}: {disk.percent:.0f} % of {show_bytes(disk.size)}; copied {show_bytes(disk.copied)}, "
            f"zeroed {show_bytes(disk.zeroed)}, skipped {show_bytes(disk.skipped)}, {show_bytes(disk.dirty)} dirty, "
            f"{disk.rounds} dirty rounds{stable}"
        )
    lines += [f"  libvirt: {happening}" for happening in job.libvirt]
    if job.note:
        lines.append(f"  told last: {job.note}")
    if job.guest:
        lines.append(f"  now:  {job.guest}")
    if job.next:
        lines.append(f"  next: {job.next}")
    return "\n".join(lines)


def line(job: Status) -> str:
    """The figures in one line."""
    return ", ".join(part for part in (_standing(job), _figures(job)) if part) or job.state


def cleaned(outcome: Cleaned) -> str:
    """How things stand now."""
    return "\n".join([*outcome.facts, f"job {outcome.job} is settled"])


def told(outcome: Told) -> str:
    """The job's words."""
    return f"job {outcome.job}: {outcome.text}"


def cancelled(outcome: Cancelled) -> str:
    """How things stand now."""
    return f"job {outcome.job} was cancelled" + (f"; {outcome.guest}" if outcome.guest else "")


def _way(job: Status) -> str:
    return f"{job.source or 'an image file'} -> {job.destination}" if job.destination else job.source or ""


def _standing(job: Status) -> str:
    if job.state == FINISHED:
        if job.outcome is None:
            return ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.outcome.time))
        return f"{when} {job.outcome.text} (exit code {job.outcome.exit_code})"
    percent = f" {job.percent:.0f} %" if job.phase == "bulk" and job.percent is not None else ""
    since = f" for {_duration(time.time() - job.since)}" if job.state == RUNNING and job.since is not None else ""
    return f"{job.phase}{percent}{since}" if job.phase else ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return show_seconds(max(0, int(seconds)) or 0.0)
    minutes = int(seconds) // 60
    days, hours = divmod(minutes // 60, 24)
    parts = [f"{days} d" if days else "", f"{hours} h" if hours else "", f"{minutes % 60} min"]
    return " ".join(part for part in parts if part)


def _figures(job: Status) -> str:
    parts = []
    if job.speed is not None:
        parts.append(show_rate(job.speed))
    if job.predicted_downtime is not None:
        limit = f" (limit {show_seconds(job.downtime)})" if job.downtime is not None else ""
        parts.append(f"predicted downtime {show_seconds(job.predicted_downtime)}{limit}")
    if job.dirty_rate is not None:
        parts.append(f"dirtied at {show_rate(job.dirty_rate)}")
    if job.pending:
        parts.append(f"{show_bytes(job.pending)} pending")
    if job.round:
        parts.append(f"round {job.round}")
    if job.state == RUNNING:
        parts.append("no bandwidth limit" if job.bandwidth is None else f"bandwidth limit {show_rate(job.bandwidth)}")
    if job.guest_latency is not None:
        parts.append(f"the guest's disks take {job.guest_latency * 1e3:.2f} ms for a request")
    return ", ".join(parts)
