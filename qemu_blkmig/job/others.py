"""Jobs of other processes: asked through their control sockets; what does not answer is read of."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator

import msgspec

from qemu_blkmig.errors import BlkmigError, ConnectionLost, MigrationError, Refused, Undecided
from qemu_blkmig.hooks.expected import happenings
from qemu_blkmig.job.chronicle import Chronicle
from qemu_blkmig.job.control import Cancel, Change, ControlClient, Done, Ended, Look, SwitchOver
from qemu_blkmig.job.history import past_journal, past_journals
from qemu_blkmig.job.journal import FILE
from qemu_blkmig.job.record import Record, left_behind, read_record
from qemu_blkmig.job.status import ELSEWHERE, Status, at_rest, past
from qemu_blkmig.places import state_directory

SETTLING = 90.0
"""Seconds in which the watchdog of a job whose coordinator was killed comes to an end."""
POLL = 0.2
"""Seconds between two looks for that."""


def find(name: str) -> Record | None:
    """The record of a job; None if that is over. Raises `Refused` if there is no such job, or its record is damaged."""
    directory = state_directory() / name
    try:
        return read_record(directory)
    except FileNotFoundError:
        if past_journal(state_directory(), name) is None:
            raise Refused(
                f"there is no job {name!r} in {state_directory()}", advice="qemu-blkmig jobs --all lists them"
            ) from None
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise Refused(
            f"the record of job {name} cannot be read: {error}", advice=f"look at {directory / 'record.json'}"
        ) from error


def not_over(name: str) -> Record:
    """The record of a job that is not over. Raises `Refused`, which tells how it ended, or as `find` does."""
    record = find(name)
    if record is None:
        raise Refused(f"job {name} is over: {how_it_ended(name)}", advice=f"see qemu-blkmig status {name}")
    return record


def how_it_ended(name: str) -> str:
    """How a job that is over ended, and how things stood then."""
    status = _past(name)
    outcome = status.outcome.text if status.outcome else None
    return "; ".join(part for part in (outcome, status.guest) if part)


def is_alive(name: str) -> bool:
    """Whether a process of the job lives (it holds the job's lock)."""
    try:
        lock = os.open(state_directory() / name / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


async def stand(name: str) -> Status:
    """How a job stands, alive or over; or what is known of another host's. Raises `Refused` if there is none."""
    noted = [each.tell() for each in happenings(name)]
    try:
        record = find(name)
    except Refused:
        if not noted:
            raise
        status = Status(
            job=name, state=ELSEWHERE, next=f"run on the host that it was started on: qemu-blkmig status {name}"
        )
    else:
        status = _past(name) if record is None else await _stand(record)
    return msgspec.structs.replace(status, libvirt=noted)


def chronicle(name: str) -> Chronicle:
    """The journal of a job, alive or over, to be read. Raises `Refused` if there is none here.

    A job that ends just now takes it along: then it is to be asked for anew.
    """
    journal = state_directory() / name / FILE
    if journal.exists():
        return Chronicle(journal)
    if (path := past_journal(state_directory(), name)) is None:
        raise Refused(f"there is no journal of job {name!r} any more in {state_directory()}")
    return Chronicle(path)


async def listed(*, with_past: bool) -> list[Status]:
    """The jobs that are not over; `with_past`: after them those of which a history is kept, the latest first."""
    jobs = list(await asyncio.gather(*(_stand(record) for record in left_behind())))
    if with_past:
        for path in past_journals(state_directory()):
            try:
                jobs.append(past(path))
            except Refused as error:
                jobs.append(Status(job=path.stem, state="unreadable", note=str(error)))
    return jobs


async def follow(name: str) -> AsyncIterator[Status]:
    """How a job stands, once a second until it is over; then how it ended. One that is not alive is told once."""
    if (record := find(name)) is not None:
        try:
            async with ControlClient.connect(record.runtime) as job:
                answer = await job.request(Look(follow=True))
                while isinstance(answer, Status):
                    yield answer
                    answer = await job.next()
        except ConnectionLost:
            await _settled(name)
    yield await stand(name)


async def change(name: str, wanted: Change) -> str:
    """Set limits of a running job; what holds now. Raises `Refused`."""
    return await _tell(name, wanted)


async def switch_over(name: str) -> str:
    """Tell a running job that the guest may move; what follows. Raises `Refused`."""
    return await _tell(name, SwitchOver())


async def cancel(name: str) -> Ended | None:
    """Cancel a running job, and wait for its end; None if none of its processes lives, so that it is to be cleaned up.

    Raises `Refused` when there is none, and what became of the job if it did not end by being cancelled:
    `MigrationError`, `Undecided`.
    """
    record = not_over(name)
    if not is_alive(name) or (record.settler is not None and record.settler.alive):
        return None
    try:
        ended = await _cancel(record)
    except ConnectionLost as error:
        await _settled(name)
        if find(name) is not None:
            if is_alive(name):
                raise MigrationError(
                    f"job {name} does not answer: {error}",
                    advice="interrupt the qemu-blkmig that runs it; if that does not help, kill it: its watchdog "
                    "gives the guest back",
                ) from error
            return None
        outcome = _past(name).outcome
        ended = Ended(128, "it ended while it was cancelled", outcome.guest if outcome else None)
    if ended.exit_code >= 128:
        return ended
    raise _not_cancelled(name, ended)


async def _cancel(record: Record) -> Ended:
    async with ControlClient.connect(record.runtime) as job:
        try:
            answer = await job.request(Cancel())
        except Refused:
            # It is ending in another way: that is what it tells next.
            answer = await job.next()
        while not isinstance(answer, Ended):
            answer = await job.next()
        return answer


def _not_cancelled(name: str, ended: Ended) -> BlkmigError:
    if ended.exit_code == Undecided.exit_code:
        return Undecided(ended.text, state=ended.guest, advice=f"run: qemu-blkmig cleanup {name}")
    how = "had finished" if ended.exit_code == 0 else "had failed by itself"
    return MigrationError(f"job {name} was not cancelled, it {how}: {ended.text}", state=ended.guest)


async def _tell(name: str, request: Change | SwitchOver) -> str:
    record = not_over(name)
    try:
        async with ControlClient.connect(record.runtime) as job:
            answer = await job.request(request)
    except ConnectionLost as error:
        status = await _stand(record)
        raise Refused(f"job {name} does not run: {error}", state=status.guest, advice=status.next) from error
    return answer.text if isinstance(answer, Done | Ended) else ""


async def _stand(record: Record) -> Status:
    try:
        async with ControlClient.connect(record.runtime) as job:
            answer = await job.request(Look())
            if isinstance(answer, Status):
                return answer
    except ConnectionLost:
        pass
    directory = state_directory() / record.job
    return at_rest(record, directory, busy=is_alive(record.job))


async def _settled(name: str) -> None:
    """Wait until no process of the job lives; one that hangs is waited for long enough, and no longer."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + SETTLING
    while is_alive(name) and loop.time() < deadline:  # noqa: ASYNC110 - nothing tells when a lock is let go of
        await asyncio.sleep(POLL)


def _past(name: str) -> Status:
    path = past_journal(state_directory(), name)
    return past(path) if path is not None else Status(job=name, state="over", guest="nothing is known of it any more")
