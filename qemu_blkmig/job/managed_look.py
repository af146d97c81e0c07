"""What the migration of a domain would do, looked at before anything of it is done: nothing is touched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from qemu_blkmig.job.arrangement import Arrangement, arrange
from qemu_blkmig.job.ends import Ends
from qemu_blkmig.job.host import looking_at
from qemu_blkmig.job.managed_offline import arrange_offline, offline_images, plan_offline
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.plan import Plan, Planner
from qemu_blkmig.virt.monitor import PassthroughMonitor


async def look_at_domain(
    options: ManagedOptions, stack: contextlib.AsyncExitStack, tell: Callable[[str], None] = lambda _: None
) -> tuple[Arrangement, list[Plan]]:
    """What is agreed with the destination's libvirt, and the plan, or one for each image of a domain that does not run.

    Connections are closed with `stack`; `tell` is told what takes long. Raises `Refused` and what connecting does.
    """
    ends = await Ends.open(options, stack)
    _, agent = await looking_at(options.place, stack)
    if options.offline:
        arrangement = await arrange_offline(options, ends, agent)
        images = offline_images(ends.domain, arrangement)
        return arrangement, await plan_offline(options, images, agent, tell=tell, layers_first=True)
    arrangement = await arrange(options, ends.domain, ends.source, ends.target, agent)
    monitor = await PassthroughMonitor.connect(ends.source, ends.handle, "source QEMU")
    stack.push_async_callback(monitor.close)
    placed, known = arrangement.placed(ends.domain), None if options.unsafe else ends.domain.aliases
    planner = Planner(agent, options.selection, Path("/"), tell, placed=placed, known=known, layers_first=True)
    return arrangement, [await planner.plan(monitor, None, "blkmig-(none)", with_ram=True)]
