"""Brings both sides to rest after a failure: exactly one side owns the guest, nothing hangs, nothing of ours is left.

Used alike by the coordinator when something fails, by the watchdog when the coordinator is no more, and by `cleanup`.
It goes by the job's record and by what both sides say of themselves; it never guesses (DESIGN.md, invariant 5). What
is done to a guest's two ends is `settle_qemus`' and, where libvirt manages it, `settle_domains`'.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from qemu_blkmig.destination.protocol import Discard, DiscardReply, Done, Mark
from qemu_blkmig.errors import BlkmigError, ConnectionLost, RecordFailed, Refused
from qemu_blkmig.job.chronicle import Chronicle
from qemu_blkmig.job.journal import FILE
from qemu_blkmig.job.options import Afterwards
from qemu_blkmig.job.peers import Here, HostUnreachable, Peer, There, Unreachable
from qemu_blkmig.job.place import Ssh
from qemu_blkmig.job.record import Job, Owner, Record
from qemu_blkmig.job.settle_qemus import Qemus
from qemu_blkmig.job.settlement import Settlement, Sides, save_decision
from qemu_blkmig.job.source_images import leave_behind
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.host import Host
from qemu_blkmig.virt.connection import Connection

log = logging.getLogger(__name__)

DYING = 0.5
"""Seconds that a QEMU which hung up is given to end, before it is looked for again."""
ATTEMPTS = 5
"""A QEMU that dies while it is being settled is found gone by the next attempt."""

MARKED = (
    "the records beside them (.NAME.blkmig) still call them incomplete, so that libvirt's hook refuses them: remove "
    "there those records if the guest uses the images, else the images, too"
)
"""What is to be done about images that stay although the job is given up."""
DESTINATION_IS_OFF = "--destination-is-off"
"""The option of `cleanup` by which a person answers for what nobody here can know."""


async def settle(
    job: Job,
    source: Monitor | None = None,
    destination: Monitor | None = None,
    release_images: Callable[[], Awaitable[None]] | None = None,
    host: Host | None = None,
    agent: AgentClient | None = None,
    *,
    libvirts: tuple[Connection, Connection] | None = None,
    suspend: bool = False,
    destination_is_off: bool = False,
    long_after: bool = False,
) -> Settlement:
    """Settle the job. `source` and `destination` are live monitors, where the caller has them; they are closed.

    `host` and `agent` are the caller's ways to the destination host, and stay, as do `libvirts` (the source's, the
    destination's), which must be sound; without them they are reached anew.

    `destination_is_off`: a person says so, and that no guest runs there any more. It counts only where that host cannot
    be reached: then the guest is the source's, and what is left there is to be ended when it can be.

    `long_after`: perhaps by now the guest runs, or not, because somebody wants it so.

    `release_images` ends what of the caller's still has the destination's images open, before they are removed; the
    guest does not wait for it. `suspend`: keep images and bitmaps, where they are of use, for the job to be resumed.

    Saves every decision in the job's record before it acts upon it. Does not raise for what it meets: what could not
    be settled is told in the settlement, with `decided` False, and the record stays for another try.
    """
    record = job.record
    beyond = There(job, host, agent)
    sides: Sides
    if record.managed is not None:
        from qemu_blkmig.job.settle_domains import Domains

        sides = Domains(job, record.managed, is_off=destination_is_off, long_after=long_after, lent=libvirts)
    else:
        here = Peer("source QEMU", Here(), record.source_qmp, record.source_process, source)
        there = Peer("destination QEMU", beyond, record.target_qmp, record.target_process, destination)
        sides = Qemus(job, here, there, beyond, is_off=destination_is_off)
    before = record.owner
    settlement = Settlement(before, suspended=suspend and record.recording and before is Owner.SOURCE)
    if record.recording and not settlement.suspended:
        # What is removed now is not there to be resumed by whoever settles next.
        record.recording = False
        await save_decision(job)
    try:
        for attempt in range(ATTEMPTS):
            settlement.facts.clear()
            try:
                await _settle(job, sides, settlement)
                if release_images is not None:
                    beyond.leave_agent()
                    await release_images()
                if settlement.taken:
                    images = ", ".join(record.images)
                    settlement.facts.append(f"nothing was removed at the destination: {images}; {MARKED}")
                    await beyond.ask(Discard([], record.images), DiscardReply)
                elif record.owner is Owner.SOURCE and not settlement.suspended:
                    # As long as our agent lives nobody else has opened them.
                    settlement.moved &= release_images is None
                    await _discard(job, sides, beyond, settlement)
                    _tell_overwritten(job, settlement)
                elif record.owner is Owner.DESTINATION and not settlement.returned:
                    await _mark(job, sides, beyond, settlement)
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
        if record.source_qmp is not None or record.managed is not None:
            _tell_why(record, before, settlement)
        if settlement.suspended:
            await _rest(job, settlement)
        if settlement.owner is Owner.UNDECIDED:
            settlement.decided = False
        await sides.close()
        await beyond.close(done=settlement.decided)
    return settlement


def _by_hand(job: Job, host: str) -> str:
    """Who was told to start the guest cannot be asked: the two ways out, to be typed."""
    cleanup = f"qemu-blkmig cleanup {job.record.job}"
    return (
        f"when {host} can be reached again, run: {cleanup} (it looks who has the guest); only if {host} is off and the "
        f"guest runs there no more, give it back to the source: {cleanup} {DESTINATION_IS_OFF}"
    )


async def _rest(job: Job, settlement: Settlement) -> None:
    """Suspend the job, if the source is at rest; what could not be tidied up at the destination is left for later."""
    if not (settlement.decided or settlement.left_there):
        settlement.suspended = False
        return
    try:
        await job.rest(target_ended=settlement.decided)
    except RecordFailed as error:
        # It is brought to rest once more before it goes on.
        log.warning("job %s: %s", job.record.job, error)
    settlement.decided, settlement.left_there = True, False
    settlement.facts.append(f"what was copied is kept at the destination, {kept(job)}")


def kept(job: Job) -> str:
    """How much of a suspended job's disks need not be copied again, in words."""
    try:
        disks = Chronicle(job.directory / FILE).last().disks
    except Refused:
        return "0 % of it known to be safe"
    stable, total = sum(disk.stable for disk in disks), sum(disk.size for disk in disks)
    return f"{stable * 100 // max(1, total)} % of the disks known to be safe"


async def _settle(job: Job, sides: Sides, settlement: Settlement) -> None:
    if job.record.owner is Owner.UNDECIDED:
        job.record.owner = await sides.decide(settlement)
        job.record.taken_back = job.record.owner is Owner.SOURCE
        await save_decision(job)
    if job.record.owner is Owner.SOURCE:
        await sides.return_to_source(settlement)
    elif job.record.owner is Owner.DESTINATION:
        await sides.leave_to_destination(settlement)


async def _mark(job: Job, sides: Sides, beyond: There, settlement: Settlement) -> None:
    """The ownership records follow what was decided (see `destination/ownership.py`)."""
    record = job.record
    # While anything is uncertain, and while the source QEMU lives, all stays where it is.
    over = settlement.decided and not settlement.ended and await sides.source_is_over()
    afterwards = record.source_images if over else Afterwards.KEEP
    settlement.facts += await asyncio.to_thread(leave_behind, record.moving, record.job, afterwards)
    if afterwards is not Afterwards.KEEP:
        await sides.source_images_went(settlement)
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


async def _discard(job: Job, sides: Sides, beyond: There, settlement: Settlement) -> None:
    record = job.record
    untouched = [path for path in record.images if not record.filling]
    if not record.images:
        await sides.images_are_gone(settlement)
        return
    try:
        if untouched:
            await _mark_untouched(beyond, record.job, untouched, settlement)
        reply = await beyond.ask(Discard(record.created, record.images, settlement.moved), DiscardReply)
    except HostUnreachable as error:
        settlement.decided, settlement.left_there = False, True
        paths = ", ".join(created.path for created in record.created)
        settlement.facts.append(f"{error}; incomplete images may be left there: {paths or 'none'}")
        return
    if not reply.left:
        await sides.images_are_gone(settlement)
    if not record.created:
        return
    if reply.left and settlement.moved:
        settlement.facts.append(
            f"images were left at the destination: {', '.join(reply.left)}; if the guest was moved there, what it "
            f"wrote since is there alone; {MARKED}"
        )
    elif reply.left:
        settlement.facts.append(f"incomplete images were left at the destination: {', '.join(reply.left)}")
    elif reply.removed:
        settlement.facts.append("the incomplete images at the destination were removed")
    else:
        settlement.facts.append("no incomplete image was there any more at the destination")


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
