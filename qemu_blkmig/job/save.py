"""`save`: disks of a running guest, or an image file, into a stream of the old wire format; the guest stays here."""

from __future__ import annotations

import msgspec

from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.job.copy import GuestCopy
from qemu_blkmig.job.copy_images import Way, copy_image
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.options import SaveOptions
from qemu_blkmig.job.plan import Plan, Planner
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.result import Result
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.job.streaming import StreamCarriage

IMAGE_MACHINE = "pc"
"""What a stream from an image file names; only a QEMU cares."""

QEMU_DECIDES = "the stream was sent to its end; whether the QEMU has loaded it, only that QEMU tells (query-migrate)"


async def save(options: SaveOptions, reporter: Reporter, interrupts: Interrupts, clock: Clock) -> Result:
    """Save disks. Raises a `BlkmigError` that tells the state of things; the guest runs on whatever happens."""
    carriages: list[StreamCarriage] = []

    async def into_stream(life: Lifecycle) -> Way:
        machine = await _machine(life, options)

        def carriage(plan: Plan) -> StreamCarriage:
            carriages.append(StreamCarriage(plan, options, machine, life.reporter))
            return carriages[-1]

        return Way(Planner(None, options.selection, None), carriage)

    steering = Steering(options.downtime, options.transfer.bandwidth)
    try:
        async with Lifecycle(reporter, interrupts, steering) as life:
            if options.image is not None:
                result = await life.conduct(copy_image(life, options, into_stream, clock))
            else:
                result = await life.conduct(GuestCopy(life, options, into_stream, clock).whole())
            warnings = [*result.warnings, QEMU_DECIDES] if options.for_qemu else result.warnings
            return msgspec.structs.replace(result, outcome="saved", warnings=warnings)
    finally:
        for carriage in carriages:
            carriage.abandon()


async def _machine(life: Lifecycle, options: SaveOptions) -> str | None:
    if not options.configuration:
        return None
    if options.machine is not None:
        return options.machine
    if options.image is not None:
        return IMAGE_MACHINE
    # The name of a machine's QOM type is its own with this ending (QEMU's hw/boards.h).
    kind: str = await life.source.execute("qom-get", {"path": "/machine", "property": "type"})
    return kind.removesuffix("-machine")
