"""Gives the guest its own disk limits back, where a job slowed it (`job.brake`); by the job's record."""

from __future__ import annotations

import logging

from qemu_blkmig.errors import RecordFailed
from qemu_blkmig.job.record import Job
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.qmp.throttle import restore

log = logging.getLogger(__name__)


async def give_back(job: Job, source: Monitor) -> None:
    """The disks get the limits again that they had before, but where somebody else has changed them meanwhile.

    Raises what `Monitor.execute` raises.
    """
    if not job.record.throttled:
        return
    for name in await restore(source, job.record.throttled):
        log.warning("the limits of disk %s were changed by somebody else meanwhile, and stay as they are", name)
    job.record.throttled = []
    try:
        await job.save()
    except RecordFailed as error:
        # To give them back once more would do no harm.
        log.warning("job %s: %s", job.record.job, error)
