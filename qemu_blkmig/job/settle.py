"""Brings both sides to rest after a failure: exactly one side owns the guest, nothing hangs, nothing of ours is left.

Used alike by the coordinator when something fails, by the watchdog when the coordinator is no more, and by `cleanup`.
It goes by the job's record and by what both QEMUs say of themselves; it never guesses (DESIGN.md, invariant 5).

What makes it safe: the destination QEMU never starts the guest by itself (it is told `stop` while it waits, which
clears its autostart), so until our `cont` there the guest can run at the source only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from qemu_blkmig.destination.protocol import Discard, DiscardReply, Done, Mark
from qemu_blkmig.errors import BlkmigError, ConnectionLost, DestinationFailed, Refused, RequestError, Undecided
from qemu_blkmig.job.activation import activate
from qemu_blkmig.job.chronicle import Chronicle
from qemu_blkmig.job.journal import FILE
from qemu_blkmig.job.limits import give_back
from qemu_blkmig.job.peers import Here, HostUnreachable, Peer, There, Unreachable, until
from qemu_blkmig.job.place import Ssh
from qemu_blkmig.job.record import Job, Owner, Record
from qemu_blkmig.job.source_images import Afterwards, leave_behind
from qemu_blkmig.qmp.agent import GuestAgent
from qemu_blkmig.qmp.guest import MIGRATED, UNDER_WAY, migration_status
from qemu_blkmig.qmp.monitor import Monitor, NoAnswer
from qemu_blkmig.qmp.ram import cancel_migration
from qemu_blkmig.qmp.removal import remove_all, remove_server
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.host import Host

log = logging.getLogger(__name__)

SETTLE = 15.0
"""Seconds in which a QEMU's own migration must come to an end, one way or the other."""
DYING = 0.5
"""Seconds that a QEMU which hung up is given to end, before it is looked for again."""
ATTEMPTS = 5
"""A QEMU that dies while it is being settled is found gone by the next attempt."""
ANSWER = 10.0
"""Seconds in which a destination QEMU must answer while the guest is paused."""
REACHABLE = 5.0
"""Seconds in which an agent must be there on a host that was not heard of before, while the guest stands still."""
THAW = 10.0
"""Seconds in which a guest agent must thaw."""

DESTINATION_IS_OFF = "--destination-is-off"
"""The option of `cleanup` by which a person answers for what nobody here can know."""

NOT_STARTED = ("inmigrate", "paused", "prelaunch", "postmigrate")
"""Run states of a destination in which a guest that was never started can be."""


@dataclass
class Settlement:
    """How things stand: who owns the guest, and in sentences what is so. `decided`: nothing is left to be done.

    `ended`: the destination has the guest, but its QEMU has ended since. `left_there`: it is known who has the guest,
    but at a destination host that cannot be reached something is left to be tidied up. `unreachable`: what to do about
    it when that host keeps the decision to itself. `suspended`: images and bitmaps were kept, so that the job can be
    resumed.
    """

    owner: Owner
    decided: bool = True
    ended: bool = False
    left_there: bool = False
    unreachable: str | None = None
    suspended: bool = False
    facts: list[str] = field(default_factory=list)


def unsettled(what: str, settlement: Settlement, job: str) -> Undecided:
    """The error that tells of a settlement that is not decided."""
    again = f"run: qemu-blkmig cleanup {job}"
    if settlement.owner is Owner.SOURCE:
        advice = f"the guest is the source's; end or mend what is told above, then {again}"
    elif settlement.owner is Owner.DESTINATION:
        advice = f"the guest is the destination's; end or mend what is told above, then {again}"
    elif settlement.unreachable is not None:
        advice = settlement.unreachable
    else:
        advice = (
            "look at both QEMUs (query-status) and never `cont` one while the other runs; decide by ending the one "
            f"that is not to have the guest, then {again}"
        )
    return Undecided(what, state="; ".join(settlement.facts), advice=advice)


async def settle(
    job: Job,
    source: Monitor | None = None,
    destination: Monitor | None = None,
    release_images: Callable[[], Awaitable[None]] | None = None,
    host: Host | None = None,
    agent: AgentClient | None = None,
    *,
    suspend: bool = False,
    destination_is_off: bool = False,
) -> Settlement:
    """Settle the job. `source` and `destination` are live monitors, where the caller has them; they are closed.

    `host` and `agent` are the caller's ways to the destination host, and stay; without them it is reached anew.

    `destination_is_off`: a person says so, and that no guest runs there any more. It counts only where that host cannot
    be reached: then the guest is the source's, and what is left there is to be ended when it can be.

    `release_images` ends what of the caller's still has the destination's images open, before they are removed; the
    guest does not wait for it. `suspend`: keep images and bitmaps, where they are of use, for the job to be resumed.

    Saves every decision in the job's record before it acts upon it. Does not raise for what it meets: what could not
    be settled is told in the settlement, with `decided` False, and the record stays for another try.
    """
    record = job.record
    beyond = There(job, host, agent)
    here = Peer("source QEMU", Here(), record.source_qmp, record.source_process, source)
    there = Peer("destination QEMU", beyond, record.target_qmp, record.target_process, destination)
    before = record.owner
    settlement = Settlement(before, suspended=suspend and record.recording and before is Owner.SOURCE)
    if record.recording and not settlement.suspended:
        # What is removed now is not there to be resumed by whoever settles next.
        record.recording = False
        _save(job)
    try:
        for attempt in range(ATTEMPTS):
            settlement.facts.clear()
            try:
                await _settle(job, here, there, beyond, settlement, destination_is_off)
                if release_images is not None:
                    beyond.leave_agent()
                    await release_images()
                if record.owner is Owner.SOURCE and not settlement.suspended:
                    await _discard(job, beyond, settlement)
                    _tell_overwritten(job, settlement)
                elif record.owner is Owner.DESTINATION:
                    await _mark(job, beyond, settlement)
                await beyond.tidy(needed=record.target_launched and release_images is not None)
                break
            except ConnectionLost:
                if attempt == ATTEMPTS - 1:
                    raise
                await asyncio.sleep(DYING)
    except HostUnreachable as error:
        settlement.decided = False
        settlement.left_there = record.owner is not Owner.UNDECIDED
        settlement.unreachable = _by_hand(job, beyond.name)
        if str(error) not in "; ".join(settlement.facts):
            settlement.facts.append(str(error))
    except (BlkmigError, OSError, TimeoutError) as error:
        log.warning("settling job %s: %s", record.job, error, exc_info=log.isEnabledFor(logging.DEBUG))
        settlement.decided = False
        if isinstance(error, Unreachable) and isinstance(record.target_place, Ssh):
            settlement.unreachable = _by_hand(job, beyond.name)
        settlement.facts.append(f"job {record.job} could not be brought to rest: {error}")
    finally:
        settlement.owner = record.owner
        if record.source_qmp is not None:
            _tell_why(record, before, settlement)
        if settlement.suspended:
            _rest(job, settlement)
        if settlement.owner is Owner.UNDECIDED:
            settlement.decided = False
        for peer in (here, there):
            await peer.close()
        await beyond.close(done=settlement.decided)
    return settlement


def _by_hand(job: Job, host: str) -> str:
    """Who was told to start the guest cannot be asked: the two ways out, to be typed."""
    cleanup = f"qemu-blkmig cleanup {job.record.job}"
    return (
        f"when {host} can be reached again, run: {cleanup} (it looks who has the guest); only if {host} is off and the "
        f"guest runs there no more, give it back to the source: {cleanup} {DESTINATION_IS_OFF}"
    )


def _rest(job: Job, settlement: Settlement) -> None:
    """Suspend the job, if the source is at rest; what could not be tidied up at the destination is left for later."""
    if not (settlement.decided or settlement.left_there):
        settlement.suspended = False
        return
    try:
        job.rest(target_ended=settlement.decided)
    except OSError as error:
        log.warning("the record of job %s cannot be written: %s", job.record.job, error)
    settlement.decided, settlement.left_there = True, False
    settlement.facts.append(f"what was copied is kept at the destination, {kept(job)}")


def kept(job: Job) -> str:
    """How much of a suspended job's disks need not be copied again, in words."""
    try:
        journal = Chronicle(job.directory / FILE)
        stable, total = journal.stable_by_disk(), sum(disk.size for disk in journal.agreed())
    except Refused:
        return "0 % of it known to be safe"
    return f"{sum(stable.values()) * 100 // max(1, total)} % of the disks known to be safe"


async def _settle(job: Job, here: Peer, there: Peer, beyond: There, settlement: Settlement, is_off: bool) -> None:
    if job.record.owner is Owner.UNDECIDED:
        job.record.owner = await _decide(job, here, there, beyond, settlement, is_off)
        job.record.taken_back = job.record.owner is Owner.SOURCE
        _save(job)
    if job.record.owner is Owner.SOURCE:
        await _return_to_source(job, here, there, settlement)
    elif job.record.owner is Owner.DESTINATION:
        await _leave_to_destination(job, here, there, settlement)


def _save(job: Job, *, synced: bool = True) -> None:
    """A decision that cannot be saved is acted upon all the same: another try would come to the same one."""
    try:
        job.save(synced=synced)
    except OSError as error:
        log.warning("the record of job %s cannot be written: %s", job.record.job, error)


async def _decide(job: Job, here: Peer, there: Peer, beyond: There, settlement: Settlement, is_off: bool) -> Owner:
    """After the handover: did the destination take the guest? Leaves a destination that did not take it fenced."""
    source = await here.monitor()
    record = job.record
    if source is not None and not record.started_there and not await _answers(job, beyond):
        return await _take_back(job, source, settlement)
    arrived = True
    if source is None:
        settlement.facts.append("the source QEMU is gone")
    else:
        status = await _conclude(source)
        if status in UNDER_WAY:
            settlement.facts.append(f"the source's migration is still in state {status}")
            return Owner.UNDECIDED
        arrived = status == "completed"
    try:
        if arrived and await _take(job, there, beyond):
            return Owner.DESTINATION
        if record.started_there and await there.gone():
            return await _decide_after_lost_start(source, settlement)
        if await there.fence():
            return Owner.SOURCE
    except HostUnreachable:
        # After the destination was told to start the guest nobody but a person, who was told how, has it start here.
        if source is None or not (is_off or not record.started_there or await _runs(source)):
            raise
        # Never told to start the guest, it waits paused, until somebody who can reach it ends it.
        record.unfenced = True
        return Owner.SOURCE
    settlement.facts.append("the destination QEMU neither took the guest nor could be ended")
    return Owner.UNDECIDED


async def _answers(job: Job, beyond: There) -> bool:
    """Whether the destination host answers while the guest stands still; this host does, however long it takes."""
    return not isinstance(job.record.target_place, Ssh) or await beyond.answers(REACHABLE)


async def _take_back(job: Job, source: Monitor, settlement: Settlement) -> Owner:
    """The destination was never told to start the guest and is silent: the guest does not wait for it to be fenced."""
    await cancel_migration(source)
    if (status := await _migration_status(source)) in UNDER_WAY:
        settlement.facts.append(f"the source's migration is still in state {status}")
        return Owner.UNDECIDED
    job.record.unfenced = True
    return Owner.SOURCE


async def _decide_after_lost_start(source: Monitor | None, settlement: Settlement) -> Owner:
    """The destination was told to run the guest and is gone: only a person can know whether it did."""
    if source is None:
        return Owner.DESTINATION
    if await _runs(source):
        return Owner.SOURCE
    settlement.facts.append(
        "the destination QEMU ended in the moment when the guest was started there, which may have written to its "
        "images; at the source it is paused: `cont` there loses such writes, `quit` there keeps them"
    )
    return Owner.UNDECIDED


async def _conclude(source: Monitor) -> str:
    """Let the source's migration end; one that waits to be continued, or hangs, is cancelled. Returns its status."""
    status = await _migration_status(source)
    if status == "pre-switchover":
        await cancel_migration(source)

    async def ended() -> bool:
        return await _migration_status(source) not in UNDER_WAY

    if not await until(ended, SETTLE):
        await cancel_migration(source)
    return await _migration_status(source)


async def _take(job: Job, there: Peer, beyond: There) -> bool:
    """Whether the destination has the guest, started there if it ran before.

    Raises `Unreachable` if it was told to start the guest and does not answer.
    """
    try:
        destination = await there.monitor()
        return destination is not None and await _take_by(job, beyond, destination)
    except HostUnreachable:
        raise
    except (NoAnswer, Unreachable) as error:
        if job.record.started_there:
            raise Unreachable(f"whether the guest runs at the destination cannot be known: {error}") from error
        log.warning("%s", error)
        return False


async def _take_by(job: Job, beyond: There, destination: Monitor) -> bool:
    async def ended() -> bool:
        return await _migration_status(destination) not in ("setup", "active", "none")

    await until(ended, SETTLE)
    if await _migration_status(destination) != "completed":
        return False
    if not job.record.was_running:
        try:
            await activate(destination, beyond.idle, job.record.images)
            return True
        except DestinationFailed as error:
            log.warning("%s", error)
            return False
    state = (await destination.execute("query-status", timeout=ANSWER))["status"]
    if job.record.started_there and state not in NOT_STARTED:
        return True
    try:
        job.record.started_there = True
        _save(job, synced=False)
        await destination.execute("cont", timeout=ANSWER)
        return True
    except RequestError as error:
        log.warning("the destination cannot start the guest: %s", error)
        job.record.started_there = False
        _save(job)
        return False


async def _return_to_source(job: Job, here: Peer, there: Peer, settlement: Settlement) -> None:
    record = job.record
    if record.source_qmp is None:
        settlement.facts.append("no guest is concerned, the source is as it was")
        return
    source = await here.monitor()
    if source is None:
        settlement.facts.append("the source QEMU has ended; its disks hold all that the guest wrote")
        settlement.suspended = False
    else:
        if record.migrating and await _migration_status(source) in UNDER_WAY:
            await cancel_migration(source)
        await _give_back_run_state(job, source, settlement)
        await _give_back_limits(job, source, settlement)
        if record.frozen_by is not None:
            await _thaw(record.frozen_by, settlement)
    if source is not None:
        await _clean(job, source, settlement)
    if record.target_launched or record.unfenced:
        await _end_destination(job, there, settlement)


async def _end_destination(job: Job, there: Peer, settlement: Settlement) -> None:
    who = f"the destination QEMU (pid {there.process and there.process.pid})"
    try:
        if await (there.kill() if job.record.target_launched else there.fence()):
            job.record.unfenced = False
        else:
            settlement.decided = False
            settlement.facts.append(f"{who} could not be ended")
    except HostUnreachable as error:
        settlement.decided, settlement.left_there = False, True
        settlement.facts.append(f"{error}; {who} waits there, paused, never to be told `cont`, and is to be ended")


async def _clean(job: Job, source: Monitor, settlement: Settlement) -> None:
    record = job.record
    try:
        if settlement.suspended:
            await remove_server(source, prefix=record.prefix, nbd_server_is_ours=record.nbd_server)
        else:
            await remove_all(source, prefix=record.prefix, nbd_server_is_ours=record.nbd_server)
    except RequestError as error:
        settlement.decided = False
        settlement.facts.append(f"something of ours is left in the source QEMU: {error}")


async def _give_back_limits(job: Job, source: Monitor, settlement: Settlement) -> None:
    try:
        await give_back(job, source)
    except RequestError as error:
        settlement.decided = False
        settlement.facts.append(f"the guest's disk writes may still be slowed by us: {error}")


async def _give_back_run_state(job: Job, source: Monitor, settlement: Settlement) -> None:
    status = await source.execute("query-status")
    record = job.record
    # One that somebody else has migrated away runs elsewhere: `cont` would start it a second time.
    pauses = ("paused", *MIGRATED) if record.migrating else ("paused",)
    if status["status"] == "prelaunch" and (record.migrating or await _migration_status(source) != "completed"):
        # It was reset in our pause.
        pauses = (*pauses, "prelaunch")
    ours = record.run_state_taken and record.was_running and status["status"] in pauses
    if ours and not status["running"]:
        await source.execute("cont")
        status = await source.execute("query-status")
    if status["running"]:
        settlement.facts.append("the guest runs at the source")
    else:
        settlement.facts.append(await _why_not_running(job, source, status["status"]))


async def _why_not_running(job: Job, source: Monitor, status: str) -> str:
    if status != "postmigrate":
        return f"the guest is at the source, not running (run state {status})"
    if await _migration_status(source) == "completed" and not job.record.migrating:
        return "the source QEMU is what another migration left behind; `cont` there would start the guest twice"
    return "the guest is at the source, paused (run state postmigrate: QEMU migrates it again only after a `cont`)"


async def _thaw(path: str, settlement: Settlement) -> None:
    try:
        agent = await GuestAgent.connect(path)
        try:
            await agent.thaw(THAW)
        finally:
            await agent.close()
    except BlkmigError as error:
        settlement.facts.append(f"the guest's file systems may still be frozen: {error}")


async def _mark(job: Job, beyond: There, settlement: Settlement) -> None:
    """The ownership records follow what was decided (see `destination/ownership.py`)."""
    record = job.record
    source = record.source_process
    # While anything is uncertain, and while the source QEMU lives, all stays where it is.
    over = settlement.decided and not settlement.ended and source is not None and not source.alive
    afterwards = record.source_images if over else Afterwards.KEEP
    settlement.facts += await asyncio.to_thread(leave_behind, record.moving, record.job, afterwards)
    if record.source_images is not afterwards:
        settlement.facts.append("the images at the source were kept where they are")
    if record.marked or not record.images:
        return
    try:
        await beyond.ask(Mark(record.job, record.images, "complete"), Done)
        record.marked = True
    except HostUnreachable:
        # That it cannot be reached was told. Until it can, hooks there keep the guest from being started again.
        settlement.decided, settlement.left_there = False, settlement.decided or settlement.left_there
    except BlkmigError as error:
        settlement.facts.append(f"the images at the destination are complete, but their records do not say so: {error}")


async def _discard(job: Job, beyond: There, settlement: Settlement) -> None:
    record = job.record
    untouched = [path for path in record.images if not record.filling]
    if not record.images:
        return
    try:
        if untouched:
            await _mark_untouched(beyond, record.job, untouched, settlement)
        reply = await beyond.ask(Discard(record.created, record.images), DiscardReply)
    except HostUnreachable as error:
        settlement.decided, settlement.left_there = False, True
        paths = ", ".join(created.path for created in record.created)
        settlement.facts.append(f"{error}; incomplete images may be left there: {paths or 'none'}")
        return
    if not record.created:
        return
    if reply.left:
        settlement.facts.append(f"incomplete images were left at the destination: {', '.join(reply.left)}")
    else:
        settlement.facts.append("the incomplete images at the destination were removed")


async def _mark_untouched(beyond: There, job: str, images: list[str], settlement: Settlement) -> None:
    try:
        await beyond.ask(Mark(job, images, "untouched"), Done)
    except Refused as error:
        settlement.facts.append(str(error))


def _tell_why(record: Record, before: Owner, settlement: Settlement) -> None:
    """Why the guest is whose it is, after something failed."""
    if settlement.owner is Owner.SOURCE and record.taken_back:
        could = "was told to start it, but is said to be off" if record.started_there else "was never told to start it"
        last = could if settlement.left_there else "no longer can"
        settlement.facts.append(f"in the handover the destination did not take it, and {last}")
    elif settlement.owner is Owner.SOURCE:
        settlement.facts.append("this job had not handed it over")
    elif (before, settlement.owner) == (Owner.UNDECIDED, Owner.DESTINATION):
        settlement.facts.append("the destination took it in the handover")


def _tell_overwritten(job: Job, settlement: Settlement) -> None:
    """What was at the destination before us is never removed, but it is not what it was."""
    made = {created.path for created in job.record.created}
    overwritten = [path for path in job.record.images if path not in made]
    if job.record.filling and overwritten:
        settlement.facts.append(f"what was at the destination before is partly overwritten: {', '.join(overwritten)}")


async def _leave_to_destination(job: Job, here: Peer, there: Peer, settlement: Settlement) -> None:
    ended, unreachable = False, None
    try:
        ended = await there.gone()
    except HostUnreachable as error:
        settlement.decided, settlement.left_there = False, True
        unreachable = f"{error}; the records of its images, and our sockets, are still to be put in order there"
    if ended:
        settlement.ended = True
        fact = "the guest was handed over, and the destination QEMU has ended since; its disks hold what it wrote"
    elif job.record.was_running:
        fact = "the guest runs at the destination"
    else:
        fact = "the guest is at the destination, paused"
    settlement.facts += [fact, unreachable] if unreachable else [fact]
    source = await here.monitor()
    if source is None:
        return
    if job.record.keep_source:
        await _give_back_limits(job, source, settlement)
        await _clean(job, source, settlement)
        settlement.facts.append("the source QEMU was kept; `cont` there would start the guest a second time")
    elif not await here.fence():
        settlement.decided = settlement.left_there = False
        settlement.facts.append("the source QEMU could not be ended; never `cont` it: that would start the guest twice")


async def _runs(monitor: Monitor) -> bool:
    return bool((await monitor.execute("query-status"))["running"])


async def _migration_status(monitor: Monitor) -> str:
    return await migration_status(monitor, timeout=ANSWER)
