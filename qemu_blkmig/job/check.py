"""`check`: everything that would fail, all at once, before anything is touched."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from qemu_blkmig.destination.protocol import FindProgram, FindProgramReply
from qemu_blkmig.errors import BlkmigError
from qemu_blkmig.job.host import looking_at
from qemu_blkmig.job.options import Selection, Target
from qemu_blkmig.job.plan import Plan, Planner
from qemu_blkmig.job.target import TargetQemu
from qemu_blkmig.nbd.binding import libnbd
from qemu_blkmig.places import state_directory
from qemu_blkmig.qmp.socket import SocketMonitor
from qemu_blkmig.transport.client import AgentClient


class CheckedDisk(msgspec.Struct, frozen=True):
    """A disk that would be migrated, and onto what; sizes in bytes."""

    name: str
    source: str
    destination: str
    format: str
    virtual_size: int
    allocated: int | None


class CheckResult(msgspec.Struct, frozen=True):
    """`ready`: a migration would start. `problems`: why not; `warnings`: what should be known."""

    ready: bool
    disks: list[CheckedDisk]
    problems: list[str]
    warnings: list[str]


async def check(source: str, target: Target, selection: Selection) -> CheckResult:
    """Look at both sides and touch nothing. Problems are collected, not raised."""
    problems: list[str] = []
    plan: Plan | None = None
    try:
        libnbd()
        plan, others = await _plan(source, target, selection)
        problems += [*plan.problems, *others]
    except BlkmigError as error:
        problems.append(str(error))
    if (trouble := state_directory_trouble()) is not None:
        problems.append(trouble)
    disks = checked_disks(plan) if plan else []
    return CheckResult(not problems, disks, problems, list(plan.warnings) if plan else [])


def checked_disks(plan: Plan) -> list[CheckedDisk]:
    """The disks that would be migrated."""
    return [
        CheckedDisk(
            name=disk.name,
            source=disk.filename,
            destination=plan.images[disk.name].path if disk.name in plan.images else "",
            format=disk.format,
            virtual_size=disk.size,
            allocated=disk.allocated,
        )
        for disk in plan.disks
    ]


async def _plan(source: str, target: Target, selection: Selection) -> tuple[Plan, list[str]]:
    """The plan, and problems that are none of its own."""
    async with contextlib.AsyncExitStack() as stack:
        monitor = await SocketMonitor.connect(source, who="source QEMU")
        stack.push_async_callback(monitor.close)
        host, agent = await looking_at(target.place, stack)
        qemu = None
        if target.qmp is not None:
            qemu = await TargetQemu.attach(host, agent, target.qmp)
            stack.push_async_callback(qemu.close)
        planner = Planner(agent, selection, Path(target.place.directory), layers_first=qemu is None)
        plan = await planner.plan(monitor, qemu, "blkmig-(none)", with_ram=True)
        return plan, await _program_missing(agent, target)


async def _program_missing(agent: AgentClient, target: Target) -> list[str]:
    if target.launch is None:
        return []
    reply = await agent.expect(FindProgram(target.launch, target.place.directory), FindProgramReply)
    return [f"the --launch command's program {reply.missing} is not there"] if reply.missing else []


def state_directory_trouble() -> str | None:
    """Why no job could be kept here, in words."""
    directory = state_directory()
    for place in (directory, *directory.parents):
        if place.exists():
            writable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
            return None if writable else f"the state directory {directory} cannot be made or written"
    return f"the state directory {directory} cannot be made"
