"""`--flatten no`: the layers between a shared base and the one that the guest writes to arrive one by one.

Nobody writes to them, so each is copied as an image file is, by a job of its own, the lowest one first, upon what lies
beneath it there. For the guest's own job only the top layer is private then, and all below it is proven like any base.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from qemu_blkmig.destination.protocol import Files, FilesReply, Image, Inspect, InspectReply
from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import BlkmigError, Interrupted, Refused
from qemu_blkmig.job.base_proof import path_here
from qemu_blkmig.job.bases import Base, bases_of, path_there
from qemu_blkmig.job.copy import copy
from qemu_blkmig.job.host import host_of
from qemu_blkmig.job.imagefile import describe
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.options import CopyOptions, MigrateOptions, Target
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.result import Result
from qemu_blkmig.qmp.disks import Disk, inventory, plain_filename, select
from qemu_blkmig.qmp.socket import SocketMonitor
from qemu_blkmig.transport.client import AgentClient

_Options = TypeVar("_Options", MigrateOptions, CopyOptions)

Work = Callable[[Reporter, Interrupts, Clock], Awaitable[Result]]
Persist = Callable[[Work], Awaitable[Result]]
"""Does the work, and goes on with it as often as was asked for."""


@dataclass(frozen=True)
class _Layer:
    """An image of the source's that is to be at the destination: `path` there, `disk` for which."""

    disk: str
    file: str
    format: str
    path: str


async def bring_layers(options: _Options, reporter: Reporter, persist: Persist) -> _Options:
    """Copy the layers that are to be there and are not; what is left to be done then.

    Raises as `copy` does, and `Refused` where a layer is there that a job has left incomplete.
    """
    if options.target.qmp is not None:
        # It waits upon layers that it has open.
        return options
    for layer in await _missing(options):
        reporter.note(f"disk {layer.disk}: {layer.file} is copied first, as a layer of its own (--flatten no)")
        try:
            await persist(_Copying(_copied(layer, options)))
        except BlkmigError as error:
            if error.suspended is not None:
                error.advice = f"{error.advice}; once resumed, this layer is there: then run the same command again"
            raise
    return replace(options, selection=replace(options.selection, base=None))


@dataclass(frozen=True)
class _Copying:
    """The copy of a layer; an interrupt that it did not heed any more ends what follows it."""

    options: CopyOptions

    async def __call__(self, reporter: Reporter, interrupts: Interrupts, clock: Clock) -> Result:
        result = await copy(self.options, reporter, interrupts, clock)
        if interrupts.received is not None:
            raise Interrupted(interrupts.received)
        return result


def _copied(layer: _Layer, options: MigrateOptions | CopyOptions) -> CopyOptions:
    return CopyOptions(
        target=Target(options.target.place),
        image=layer.file,
        image_format=layer.format,
        image_there=layer.path,
        selection=replace(options.selection, disks=None, base=None, compare=False, target_is_zero=False),
        transfer=replace(options.transfer, data=None),
        verify=options.verify,
    )


async def _missing(options: MigrateOptions | CopyOptions) -> list[_Layer]:
    disks, process = await _disks(options)
    found: dict[str, _Layer] = {}
    with tempfile.TemporaryDirectory(prefix="blkmig-layers-") as runtime:
        async with contextlib.AsyncExitStack() as stack:
            host = host_of(options.target.place, Path(runtime))
            stack.push_async_callback(host.close)
            agent = await host.start_agent()
            stack.push_async_callback(agent.close)
            for disk in disks:
                bases = bases_of(disk)
                paths = [path_there(base, Path(options.target.place.directory)) for base in bases]
                ids = (await agent.expect(Files(paths), FilesReply)).ids
                there = [identity is not None for identity in ids]
                await _require_complete(agent, disk, list(itertools.compress(paths, there)))
                for number in _to_be_brought(bases, there, options.selection.base):
                    base, path = bases[number], paths[number]
                    file = path_here(plain_filename(base.layer.filename), process)
                    found.setdefault(path, _Layer(disk.name, file, base.layer.driver, path))
    return list(found.values())


async def _require_complete(agent: AgentClient, disk: Disk, paths: Sequence[str]) -> None:
    """Raise `Refused` where a job has left one of these layers incomplete."""
    layers = [Image(disk.name, path, disk.format, disk.size, create=True) for path in paths]
    if incomplete := (await agent.expect(Inspect(layers), InspectReply)).incomplete:
        raise Refused(
            f"disk {disk.name}: a layer that is there is incomplete: {'; '.join(incomplete)}",
            state="nothing was touched",
            advice="qemu-blkmig resume JOB, of that job, goes on with it: then run the same command again (cleanup JOB "
            "removes it)",
        )


def _to_be_brought(bases: Sequence[Base], there: Sequence[bool], base: str | None) -> list[int]:
    """Which of the layers below the top one are missing above the shared one, the lowest first.

    None where the destination has no base at all: the plan of the guest's own job tells that.
    """
    named = [number for number, each in enumerate(bases) if base is not None and each.answers_to(base)]
    shared = named[0] if named else next((number for number, is_there in enumerate(there) if is_there), 0)
    return [number for number in reversed(range(shared)) if not there[number]]


async def _disks(options: MigrateOptions | CopyOptions) -> tuple[Sequence[Disk], int | None]:
    """The disks that take part, and the source QEMU's process."""
    if isinstance(options, CopyOptions) and options.image is not None:
        return [await describe(options.image, options.image_format)], None
    monitor = await SocketMonitor.connect(str(options.source), who="source QEMU")
    try:
        return select(await inventory(monitor), options.selection.disks), monitor.peer_pid
    finally:
        await monitor.close()
