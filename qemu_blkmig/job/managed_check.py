"""`virsh-blkmigrate --dry-run`: everything that would fail for a domain, all at once, before anything is touched."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import msgspec

from qemu_blkmig.errors import BlkmigError
from qemu_blkmig.job.arrangement import Arrangement, arrange
from qemu_blkmig.job.check import CheckedDisk, checked_disks, state_directory_trouble
from qemu_blkmig.job.ends import Ends
from qemu_blkmig.job.host import host_of
from qemu_blkmig.job.managed_offline import arrange_offline, offline_images, plan_offline
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.plan import Plan, Planner
from qemu_blkmig.nbd.binding import libnbd
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.virt.monitor import PassthroughMonitor


class LeftAlone(msgspec.Struct, frozen=True):
    """A disk, by its target, that is not migrated, and why."""

    target: str
    why: str


class DomainCheck(msgspec.Struct, frozen=True):
    """`ready`: a migration would start. `problems`: why not; `warnings`: what should be known.

    `xml`: what the destination's libvirt would get; `persistent_xml`: what would be defined there.
    """

    ready: bool
    domain: str
    disks: list[CheckedDisk]
    left_alone: list[LeftAlone]
    problems: list[str]
    warnings: list[str]
    xml: str | None
    persistent_xml: str | None


async def check_managed(options: ManagedOptions) -> DomainCheck:
    """Look at both sides and touch nothing. Problems are collected, not raised."""
    problems: list[str] = []
    plans: list[Plan] = []
    arrangement: Arrangement | None = None
    try:
        libnbd()
        async with contextlib.AsyncExitStack() as stack:
            ends = await Ends.open(options, stack)
            agent = await _agent(options, stack)
            if options.offline:
                arrangement = await arrange_offline(options, ends, agent)
                plans = await plan_offline(options, offline_images(ends.domain, arrangement), agent)
            else:
                arrangement = await arrange(options, ends.domain, ends.source, ends.target, agent)
                plans = [await _plan(options, ends, arrangement, agent, stack)]
            problems += arrangement.problems
            problems += [problem for plan in plans for problem in plan.problems]
    except BlkmigError as error:
        problems.append(f"{error}{f': {error.advice}' if error.advice else ''}")
    if (trouble := state_directory_trouble()) is not None:
        problems.append(trouble)
    warnings = [*(arrangement.warnings if arrangement else ()), *(told for plan in plans for told in plan.warnings)]
    return DomainCheck(
        ready=not problems,
        domain=options.domain,
        disks=[disk for plan in plans for disk in checked_disks(plan)],
        left_alone=[LeftAlone(*each) for each in arrangement.left_alone] if arrangement else [],
        problems=problems,
        warnings=warnings,
        xml=arrangement.xml if arrangement else None,
        persistent_xml=arrangement.persistent_xml if arrangement else None,
    )


async def _agent(options: ManagedOptions, stack: contextlib.AsyncExitStack) -> AgentClient:
    runtime = stack.enter_context(tempfile.TemporaryDirectory(prefix="blkmig-check-"))
    host = host_of(options.place, Path(runtime))
    stack.push_async_callback(host.close)
    agent = await host.start_agent()
    stack.push_async_callback(agent.close)
    return agent


async def _plan(
    options: ManagedOptions, ends: Ends, arrangement: Arrangement, agent: AgentClient, stack: contextlib.AsyncExitStack
) -> Plan:
    monitor = await PassthroughMonitor.connect(ends.source, ends.handle, "source QEMU")
    stack.push_async_callback(monitor.close)
    planner = Planner(agent, options.selection, Path("/"), placed=arrangement.placed(ends.domain))
    return await planner.plan(monitor, None, "blkmig-(none)", with_ram=True)
