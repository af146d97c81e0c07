"""`--flatten no`: the layers between a shared base and the one that the guest writes to arrive one by one.

Nobody writes to them, so each is copied as an image file is, by a job of its own, the lowest one first, upon what lies
beneath it there. For the guest's own job only the top layer is private then, and all below it is proven like any base.
Before the first one all is looked at that would fail of that job.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import BlkmigError, Refused
from qemu_blkmig.job.base_choice import LayerThere
from qemu_blkmig.job.base_proof import path_here
from qemu_blkmig.job.certificates_tried import of_data
from qemu_blkmig.job.copy import copy
from qemu_blkmig.job.host import looking_at
from qemu_blkmig.job.imagefile import describe
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import CopyOptions, MigrateOptions, Target
from qemu_blkmig.job.plan import Plan, Planner
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.result import Result
from qemu_blkmig.qmp.socket import SocketMonitor

_Options = MigrateOptions | CopyOptions | ManagedOptions

Tell = Callable[[str], None]
Work = Callable[[Reporter, Interrupts, Clock], Awaitable[Result]]
Persist = Callable[[Work], Awaitable[Result]]
"""Does the work, and goes on with it as often as was asked for; an interrupt that came too late for it is raised."""


async def bring_layers(options: _Options, reporter: Reporter, persist: Persist) -> _Options:
    """Copy the layers that are to be there and are not; what is left to be done then.

    Raises as `copy` does, and `Refused`, before anything is copied, with all that would fail of what is left.
    """
    if not isinstance(options, ManagedOptions) and options.target.qmp is not None:
        # It waits upon layers that it has open.
        return options
    with Interrupts(reporter.note).before_there_is_a_job():
        problems, plans = await _looked_at(options, reporter.note)
    if problems:
        raise Refused("; ".join(problems), state="nothing was touched")
    for layer, work in _work(options, plans):
        reporter.note(f"disk {layer.disk}: {layer.file} is copied first, as a layer of its own (--flatten no)")
        try:
            await persist(work)
        except BlkmigError as error:
            error.state = f"{f'{error.state}; ' if error.state else ''}what stands upon this layer was not begun yet"
            if error.suspended is not None:
                error.advice = f"{error.advice}; once resumed, this layer is there: then run the same command again"
            raise
    if isinstance(options, ManagedOptions):
        await _let_pools_know(options, [layer.path for plan in plans for layer in plan.layers], reporter.note)
    return replace(options, selection=replace(options.selection, base=None))


def _work(options: _Options, plans: Sequence[Plan]) -> list[tuple[LayerThere, Work]]:
    """What is to be copied; a layer of several disks just once. Raises `Refused` where one cannot be read."""
    found = {
        layer.place: (layer, partial(copy, _copied(layer, path_here(layer.file, plan.process), options)))
        for plan in plans
        for layer in plan.layers
        if not layer.there
    }
    return list(found.values())


def _copied(layer: LayerThere, file: str, options: _Options) -> CopyOptions:
    return CopyOptions(
        target=Target(options.place),
        image=file,
        image_format=layer.format,
        image_there=layer.path,
        owner_there=layer.owner,
        selection=replace(options.selection, disks=None, base=None, compare=False, target_is_zero=False),
        transfer=replace(options.transfer, data=None),
        verify=options.verify,
    )


async def _looked_at(options: _Options, tell: Tell) -> tuple[list[str], list[Plan]]:
    """All that would fail of what is asked for, and its plans."""
    async with contextlib.AsyncExitStack() as stack:
        arranged: Sequence[str] = ()
        if isinstance(options, ManagedOptions):
            from qemu_blkmig.job.managed_look import look_at_domain

            arrangement, plans = await look_at_domain(options, stack, tell)
            arranged = arrangement.problems
        else:
            plans = [await _plan(options, stack, tell)]
        return [*arranged, *(problem for plan in plans for problem in plan.problems)], plans


async def _plan(options: MigrateOptions | CopyOptions, stack: contextlib.AsyncExitStack, tell: Tell) -> Plan:
    _, agent = await looking_at(options.place, stack)
    planner = Planner(agent, options.selection, Path(options.place.directory), tell, layers_first=True)
    if isinstance(options, CopyOptions) and options.image is not None:
        return await planner.plan_image(await describe(options.image, options.image_format))
    monitor = await SocketMonitor.connect(str(options.source), who="source QEMU")
    stack.push_async_callback(monitor.close)
    with_ram = isinstance(options, MigrateOptions) and not options.pause_only
    plan = await planner.plan(monitor, None, "blkmig-(none)", with_ram=with_ram)
    lost, _ = await of_data(agent, options.transfer.data, options.place)
    return replace(plan, problems=(*plan.problems, *lost))


async def _let_pools_know(options: ManagedOptions, paths: Sequence[str], tell: Tell) -> None:
    """libvirt's pools at the destination list the layers; also those of a job that was resumed by itself."""
    from qemu_blkmig.virt.connection import TARGET, Connection
    from qemu_blkmig.virt.storage import refresh_pools

    try:
        target = await Connection.open(options.target_uri, TARGET)
        try:
            await refresh_pools(target, paths)
        finally:
            await target.close()
    except BlkmigError as error:
        tell(f"pools may not list the layers yet (virsh pool-refresh): {error}")
