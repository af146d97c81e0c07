"""Image files that no guest uses, copied by the same engine as a guest's disks: one of them, or several at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.job.connected import Carrying, begin, open_carriage
from qemu_blkmig.job.imagefile import ImageFile, ImageSource
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.options import CopyOptions, SaveOptions, Transfer, Verify
from qemu_blkmig.job.plan import Placed, Plan, Planner
from qemu_blkmig.job.record import Job
from qemu_blkmig.job.reporting import Stopwatch
from qemu_blkmig.job.result import Result
from qemu_blkmig.job.sharing import Sharing


@dataclass(frozen=True)
class Way:
    """How the disks of a plan get to where they are copied to."""

    planner: Planner
    carriage: Callable[[Plan], Carrying]


OpenWay = Callable[[Lifecycle], Awaitable[Way]]
"""Called once the source, if it is a guest, is connected."""


async def copy_image(life: Lifecycle, options: CopyOptions | SaveOptions, open_way: OpenWay, clock: Clock) -> Result:
    """Copy the image that `options` name."""
    watch = Stopwatch(clock, life.reporter)
    with watch.phase("prepare"):
        way = await open_way(life)
        source = await ImageSource.serve([ImageFile(str(options.image), options.image_format)], life.job.runtime)
    try:
        (disk,) = source.disks
        plan = await way.planner.plan_image(disk, _placed(disk.name, options))
        plan.require()
        return await copy_images(life, watch, source, plan, way.carriage(plan), options.transfer, options.verify)
    finally:
        await source.close()


async def copy_images(
    life: Lifecycle,
    watch: Stopwatch,
    source: ImageSource,
    plan: Plan,
    carriage: Carrying,
    transfer: Transfer,
    verify: Verify,
) -> Result:
    """Copy all that `source` serves, or go on with it. A failure that can be mended suspends the job."""
    await _keep_in_mind(life.job, source)
    await carriage.prepare()
    await open_carriage(life, carriage, source.exports)
    await life.agree(plan)
    engine = await carriage.engine(source, source, watch.clock, life.reporter.maps.watched)
    life.steering.on_change(lambda: engine.limit(life.steering.rate))
    async with Sharing(life.job.record.job, transfer, life.steering, life.reporter, carriage.payload):
        with watch.phase("bulk"):
            await begin(life, carriage, engine)
            await engine.bulk()
    await engine.complete()
    verification = carriage.verification(engine, watch.clock)
    if verification.wanted:
        with watch.phase("readback"):
            while not await verification.rest():
                await engine.complete()
    if verify is Verify.FULL:
        with watch.phase("verify"):
            await carriage.compare(verification, engine.complete)
    await carriage.close()
    await engine.finish()
    disks = carriage.results(engine)
    return Result(
        job=life.job.record.job,
        outcome="copied",
        guest="no guest: an image file was copied",
        disks=disks,
        total_copied=sum(disk.copied for disk in disks),
        phases=watch.phases,
        downtime=None,
        verified=verify.value,
        read_back=verification.read_back,
        mended=verification.mended,
        warnings=list(plan.warnings),
    )


async def _keep_in_mind(job: Job, source: ImageSource) -> None:
    """What the images are like, or were when a copy of them began that is gone on with."""
    if job.record.recording and not job.starts_over:
        source.were(job.record.untouched)
    else:
        job.record.untouched = await source.unchanged()


def _placed(disk: str, options: CopyOptions | SaveOptions) -> Placed | None:
    if isinstance(options, SaveOptions) or options.image_there is None:
        return None
    return Placed(disk, options.image_there, options.owner_there)
