"""Two plain QEMUs are brought to rest, by the job's record and by what both say of themselves.

What makes it safe: the destination QEMU never starts the guest by itself (it is told `stop` while it waits, which
clears its autostart), so until our `cont` there the guest can run at the source only.
"""

from __future__ import annotations

import logging

from qemu_blkmig.errors import BlkmigError, DestinationFailed, RequestError
from qemu_blkmig.job.activation import activate
from qemu_blkmig.job.peers import HostUnreachable, Peer, There, Unreachable, until
from qemu_blkmig.job.place import Ssh
from qemu_blkmig.job.record import Job, Owner
from qemu_blkmig.job.settlement import Settlement, clean_source, give_back_limits, save_decision
from qemu_blkmig.qmp.agent import GuestAgent
from qemu_blkmig.qmp.guest import MIGRATED, UNDER_WAY, migration_status
from qemu_blkmig.qmp.monitor import Monitor, NoAnswer
from qemu_blkmig.qmp.ram import cancel_migration

log = logging.getLogger(__name__)

SETTLE = 15.0
"""Seconds in which a QEMU's own migration must come to an end, one way or the other."""
ANSWER = 10.0
"""Seconds in which a destination QEMU must answer while the guest is paused."""
REACHABLE = 5.0
"""Seconds in which an agent must be there on a host that was not heard of before, while the guest stands still."""
THAW = 10.0
"""Seconds in which a guest agent must thaw."""

NOT_STARTED = ("inmigrate", "paused", "prelaunch", "postmigrate")
"""Run states of a destination in which a guest that was never started can be."""


class Qemus:
    """See `Sides`: two QEMUs, of which the destination's never starts the guest before our `cont`.

    `here`, `there`: how they are reached; `is_off`: a person says that the destination is.
    """

    def __init__(self, job: Job, here: Peer, there: Peer, beyond: There, *, is_off: bool) -> None:
        self._job = job
        self._here = here
        self._there = there
        self._beyond = beyond
        self._is_off = is_off

    async def images_are_gone(self, settlement: Settlement) -> None:
        """See `Sides`: nothing but the agent knew of them."""

    async def source_images_went(self, settlement: Settlement) -> None:
        """See `Sides`: nobody listed them."""

    async def source_is_over(self) -> bool:
        """See `Sides`."""
        source = self._job.record.source_process
        return source is not None and not source.alive

    async def close(self) -> None:
        """See `Sides`."""
        await self._here.close()
        await self._there.close()

    async def decide(self, settlement: Settlement) -> Owner:
        """See `Sides`: did the destination take the guest? One that did not is fenced."""
        source = await self._here.monitor()
        record = self._job.record
        if source is not None and not record.started_there and not await self._answers():
            return await self._take_back(source, settlement)
        arrived = True
        if source is None:
            settlement.facts.append("the source QEMU is gone")
        else:
            status = await _conclude(source)
            if status in UNDER_WAY:
                settlement.facts.append(f"the source's migration is still in state {status}")
                return Owner.UNDECIDED
            # Somebody else may have resumed it here meanwhile: never twice.
            arrived = status == "completed" and (record.started_there or not await _runs(source))
        try:
            if arrived and await self._take(alone=source is None):
                return Owner.DESTINATION
            if record.started_there and await self._there.gone():
                return await self._decide_after_lost_start(source, settlement)
            if await self._there.fence():
                return Owner.SOURCE
        except HostUnreachable:
            # After the destination was told to start the guest nobody but a person, who was told how, has it start
            # here.
            if source is None or not (self._is_off or not record.started_there or await _runs(source)):
                raise
            # Never told to start the guest, it waits paused, until somebody who can reach it ends it.
            record.unfenced = True
            return Owner.SOURCE
        settlement.facts.append("the destination QEMU neither took the guest nor could be ended")
        return Owner.UNDECIDED

    async def _answers(self) -> bool:
        """Whether the destination host answers while the guest stands still; this host does, however long it takes."""
        return not isinstance(self._job.record.target_place, Ssh) or await self._beyond.answers(REACHABLE)

    async def _take_back(self, source: Monitor, settlement: Settlement) -> Owner:
        """The destination was never told to start the guest and is silent: the guest does not wait for it any more."""
        await cancel_migration(source)
        if (status := await _migration_status(source)) in UNDER_WAY:
            settlement.facts.append(f"the source's migration is still in state {status}")
            return Owner.UNDECIDED
        self._job.record.unfenced = True
        return Owner.SOURCE

    async def _decide_after_lost_start(self, source: Monitor | None, settlement: Settlement) -> Owner:
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

    async def _take(self, *, alone: bool) -> bool:
        """Whether the destination has the guest, started there if it ran before. `alone`: nobody else can have it.

        Raises `Unreachable` if it was told to start the guest and does not answer.
        """
        try:
            destination = await self._there.monitor()
            return destination is not None and await self._take_by(destination, alone=alone)
        except HostUnreachable:
            raise
        except (NoAnswer, Unreachable) as error:
            if self._job.record.started_there:
                raise Unreachable(f"whether the guest runs at the destination cannot be known: {error}") from error
            log.warning("%s", error)
            return False

    async def _take_by(self, destination: Monitor, *, alone: bool) -> bool:
        async def ended() -> bool:
            return await _migration_status(destination) not in ("setup", "active", "none")

        await until(ended, SETTLE)
        if await _migration_status(destination) != "completed":
            return False
        if not self._job.record.was_running:
            try:
                await activate(destination, self._beyond.idle, self._job.record.images)
                return True
            except DestinationFailed as error:
                log.warning("%s", error)
                return False
        state = (await destination.execute("query-status", timeout=ANSWER))["status"]
        told = self._job.record.started_there
        if told and state not in NOT_STARTED:
            return True
        try:
            self._job.record.started_there = True
            if not (await save_decision(self._job, synced=False) or told or alone):
                # Whoever settles next would take the guest back from a destination that was told nothing.
                self._job.record.started_there = False
                return False
            await destination.execute("cont", timeout=ANSWER)
            return True
        except RequestError as error:
            log.warning("the destination cannot start the guest: %s", error)
            self._job.record.started_there = False
            await save_decision(self._job)
            return False

    async def return_to_source(self, settlement: Settlement) -> None:
        """See `Sides`."""
        record = self._job.record
        if record.source_qmp is None:
            settlement.facts.append(f"{record.untouched_guest}, the source is as it was")
            # It may have been started since, and moved.
            settlement.moved = record.offline is not None
            return
        source = await self._here.monitor()
        if source is None:
            settlement.facts.append("the source QEMU has ended; its disks hold all that the guest wrote here")
            settlement.suspended, settlement.moved = False, True
        else:
            if record.migrating and await _migration_status(source) in UNDER_WAY:
                await cancel_migration(source)
            await self._give_back_run_state(source, settlement)
            await give_back_limits(self._job, source, settlement)
            if record.frozen_by is not None:
                await _thaw(record.frozen_by, settlement)
        if source is not None:
            await clean_source(self._job, source, settlement)
        if record.target_launched or record.unfenced:
            await self._end_destination(settlement)

    async def _end_destination(self, settlement: Settlement) -> None:
        who = f"the destination QEMU (pid {self._there.process and self._there.process.pid})"
        try:
            if await (self._there.kill() if self._job.record.target_launched else self._there.fence()):
                self._job.record.unfenced = False
            else:
                settlement.decided = False
                settlement.facts.append(f"{who} could not be ended")
        except HostUnreachable as error:
            settlement.decided, settlement.left_there = False, True
            settlement.facts.append(f"{error}; {who} waits there, paused, never to be told `cont`, and is to be ended")

    async def _give_back_run_state(self, source: Monitor, settlement: Settlement) -> None:
        status = await source.execute("query-status")
        record = self._job.record
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
            settlement.facts.append(await self._why_not_running(source, status["status"], settlement))

    async def _why_not_running(self, source: Monitor, status: str, settlement: Settlement) -> str:
        if status != "postmigrate":
            return f"the guest is at the source, not running (run state {status})"
        if await _migration_status(source) == "completed" and not self._job.record.migrating:
            settlement.moved = True
            return "the source QEMU is what another migration left behind; `cont` there would start the guest twice"
        return "the guest is at the source, paused (run state postmigrate: QEMU migrates it again only after a `cont`)"

    async def leave_to_destination(self, settlement: Settlement) -> None:
        """See `Sides`."""
        ended, unreachable = False, None
        try:
            ended = await self._there.gone()
        except HostUnreachable as error:
            settlement.decided, settlement.left_there = False, True
            unreachable = f"{error}; the records of its images, and our sockets, are still to be put in order there"
        if ended:
            settlement.ended = True
            fact = "the guest was handed over, and the destination QEMU has ended since; its disks hold what it wrote"
        elif self._job.record.was_running:
            fact = "the guest runs at the destination"
        else:
            fact = "the guest is at the destination, paused"
        settlement.facts += [fact, unreachable] if unreachable else [fact]
        source = await self._here.monitor()
        if source is None:
            return
        if self._job.record.keep_source:
            await give_back_limits(self._job, source, settlement)
            await clean_source(self._job, source, settlement)
            settlement.facts.append("the source QEMU was kept; `cont` there would start the guest a second time")
        elif not await self._here.fence():
            settlement.decided = settlement.left_there = False
            settlement.facts.append(
                "the source QEMU could not be ended; never `cont` it: that would start the guest twice"
            )


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


async def _thaw(path: str, settlement: Settlement) -> None:
    try:
        agent = await GuestAgent.connect(path)
        try:
            await agent.thaw(THAW)
        finally:
            await agent.close()
    except BlkmigError as error:
        settlement.facts.append(f"the guest's file systems may still be frozen: {error}")


async def _runs(monitor: Monitor) -> bool:
    return bool((await monitor.execute("query-status"))["running"])


async def _migration_status(monitor: Monitor) -> str:
    return await migration_status(monitor, timeout=ANSWER)
