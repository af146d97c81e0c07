"""How things stand once a job was settled, and what brings the two sides of one to rest."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Protocol

from qemu_blkmig.errors import RecordFailed, RequestError, Undecided
from qemu_blkmig.job.limits import give_back
from qemu_blkmig.job.record import Job, Owner
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.qmp.removal import remove_all, remove_server

log = logging.getLogger(__name__)

DECISION = 10.0
"""Seconds that storage has for a decision: the guest may stand still meanwhile."""


@dataclass
class Settlement:
    """How things stand: who owns the guest, and in sentences what is so. `decided`: nothing is left to be done.

    `ended`: the destination has the guest, but its QEMU has ended since. `left_there`: it is known who has the guest,
    but at a destination host that cannot be reached something is left to be tidied up. `unreachable`: what to do about
    it when that host keeps the decision to itself. `suspended`: images and bitmaps were kept, so that the job can be
    resumed. `taken`: somebody else may have moved the guest onto the images at the destination, so that they stay;
    `moved`: it may have, if they were written to since. `returned`: the destination had the guest, but by now it
    is at the source again, which is nothing of this job's.
    """

    owner: Owner
    decided: bool = True
    ended: bool = False
    left_there: bool = False
    unreachable: str | None = None
    suspended: bool = False
    taken: bool = False
    moved: bool = False
    returned: bool = False
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


class Sides(Protocol):
    """The guest at both ends, as it is found when the job is settled. Methods add what is so to `settlement.facts`.

    They raise `HostUnreachable` where the destination host keeps the decision to itself, and `ConnectionLost`, after
    which all of it may be tried again.
    """

    async def decide(self, settlement: Settlement) -> Owner:
        """After the handover: whose the guest is. Leaves a destination that did not take it unable to."""

    async def return_to_source(self, settlement: Settlement) -> None:
        """The guest is the source's: it runs there if it ran, with nothing of ours, and never at the destination."""

    async def leave_to_destination(self, settlement: Settlement) -> None:
        """The guest is the destination's: at the source it is not any more, and never can be by accident."""

    async def images_are_gone(self, settlement: Settlement) -> None:
        """The incomplete images at the destination were removed: nothing there should list them any more."""

    async def source_images_went(self, settlement: Settlement) -> None:
        """The source's images were removed or renamed: nothing there should list them as they were."""

    async def source_is_over(self) -> bool:
        """Whether nothing at the source uses the disks any more."""

    async def close(self) -> None:
        """Let go of both."""


async def save_decision(job: Job, *, synced: bool = True) -> bool:
    """Whether it was saved. If another try would come to the same decision, it is acted upon all the same."""
    try:
        await job.save(synced=synced, within=DECISION)
    except RecordFailed as error:
        log.warning("job %s: %s", job.record.job, error)
        return False
    return True


async def clean_source(job: Job, source: Monitor, settlement: Settlement) -> None:
    """Take away what is ours in the source QEMU; the recording stays in that of a job that is suspended."""
    remove = remove_server if settlement.suspended else remove_all
    try:
        await remove(source, prefix=job.record.prefix, nbd_server_is_ours=job.record.nbd_server)
    except RequestError as error:
        settlement.decided = False
        settlement.facts.append(f"something of ours is left in the source QEMU: {error}")


async def give_back_limits(job: Job, source: Monitor, settlement: Settlement) -> None:
    """Let the guest write as it may without us."""
    try:
        await give_back(job, source)
    except RequestError as error:
        settlement.decided = False
        settlement.facts.append(f"the guest's disk writes may still be slowed by us: {error}")
