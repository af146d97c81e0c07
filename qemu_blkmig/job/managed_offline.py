"""A domain that does not run: its images are copied one by one, then libvirt defines it at the destination."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import BlkmigError, MigrationError, Refused
from qemu_blkmig.job.arrangement import Arrangement, arrange
from qemu_blkmig.job.copy import copy
from qemu_blkmig.job.ends import Ends
from qemu_blkmig.job.imagefile import describe
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import CopyOptions, Selection, Target
from qemu_blkmig.job.place import host_of
from qemu_blkmig.job.plan import Placed, Plan, Planner
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.result import DiskResult, Result
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.virt.connection import libvirt
from qemu_blkmig.virt.domain import Domain
from qemu_blkmig.virt.storage import refresh_pools

TPM_STATES = Path("/var/lib/libvirt/swtpm")
"""Where libvirt keeps the state of emulated TPMs, by the domain's UUID (seen on libvirt 9.0)."""


async def move_offline(options: ManagedOptions, reporter: Reporter, interrupts: Interrupts, clock: Clock) -> Result:
    """Copy the images and define the domain there.

    Raises a `BlkmigError`. Images that are complete by then stay, and are overwritten when it is tried again.
    """
    async with contextlib.AsyncExitStack() as stack:
        ends = await Ends.open(options, stack)
        async with _looking(options) as agent:
            arrangement = await arrange_offline(options, ends, agent)
            plans = await plan_offline(options, ends.domain, arrangement, agent)
        if problems := [*arrangement.problems, *(problem for plan in plans for problem in plan.problems)]:
            raise Refused("; ".join(problems), state="nothing was touched")
        for warning in arrangement.warnings:
            reporter.note(warning)
        results = []
        before = _as_it_is(ends.domain)
        for each in _copies(options, ends.domain, arrangement):
            results.append(await copy(each, reporter, interrupts, clock))
        await refresh_pools(ends.target, arrangement.paths.values())
        await _define(options, ends, arrangement, before)
        return _together(results, options, ends, arrangement)


@contextlib.asynccontextmanager
async def _looking(options: ManagedOptions) -> AsyncIterator[AgentClient]:
    """An agent that only looks."""
    with tempfile.TemporaryDirectory(prefix="blkmig-check-") as runtime:
        host = host_of(options.place, Path(runtime))
        try:
            agent = await host.start_agent()
            try:
                yield agent
            finally:
                await agent.close()
        finally:
            await host.close()


async def arrange_offline(options: ManagedOptions, ends: Ends, agent: AgentClient) -> Arrangement:
    """What the destination gets, and all that would fail of it; nothing is touched."""
    found = await arrange(options, ends.domain, ends.source, ends.target, agent)
    states = TPM_STATES / ends.domain.uuid
    if ends.domain.tpm and states.is_dir() and any(states.iterdir()):
        problem = f"its TPM has a state ({states}), which only the migration of a running domain carries along"
        return replace(found, problems=(*found.problems, problem))
    return found


async def plan_offline(
    options: ManagedOptions, domain: Domain, arrangement: Arrangement, agent: AgentClient
) -> list[Plan]:
    """A plan for each image: what would fail of it; nothing is touched. Raises `Refused` where one cannot be read."""
    plans = []
    for disk in domain.disks:
        if disk.path is not None and (path := arrangement.paths.get(disk.target)) is not None:
            source = replace(await describe(disk.path, disk.format), name=disk.target)
            planner = Planner(agent, replace(options.selection, disks=None), Path("/"))
            plans.append(await planner.plan_image(source, Placed(disk.target, path, arrangement.owner)))
    return plans


def _copies(options: ManagedOptions, domain: Domain, arrangement: Arrangement) -> Iterator[CopyOptions]:
    """The images, and its UEFI variables, to where they are to lie there."""
    whole = CopyOptions(
        target=Target(options.place),
        image="",
        selection=replace(options.selection, disks=None),
        transfer=options.transfer,
        verify=options.verify,
        owner=arrangement.owner,
        part=True,
    )
    for disk in domain.disks:
        if (path := arrangement.paths.get(disk.target)) is not None:
            yield replace(whole, image=disk.path, image_format=disk.format, image_there=path)
    if domain.nvram is not None and Path(domain.nvram).exists():
        variables = replace(whole, image=domain.nvram, image_format="raw", image_there=domain.nvram)
        yield replace(variables, selection=Selection(ignore_ownership=options.selection.ignore_ownership))


def _as_it_is(domain: Domain) -> Mapping[str, tuple[int, int]]:
    """When each image was last written to, and its length."""
    paths = [Path(disk.path) for disk in domain.disks if disk.path is not None and disk.left_alone is None]
    status = {str(path): path.stat() for path in paths if path.exists()}
    return {path: (each.st_mtime_ns, each.st_size) for path, each in status.items()}


async def _define(
    options: ManagedOptions, ends: Ends, arrangement: Arrangement, before: Mapping[str, tuple[int, int]]
) -> None:
    """libvirt's own offline migration, which copies nothing: it defines the domain there, and may undefine it here."""
    module, source = libvirt(), ends.source
    if await source.call(ends.handle.isActive) or _as_it_is(ends.domain) != before:
        raise MigrationError(
            "the domain was started while its images were copied, or they were written to",
            state="the domain is the source's; its images at the destination are old",
            advice="try again while it does not run, or without --offline while it does",
        )
    chosen = {
        module.VIR_MIGRATE_OFFLINE: True,
        module.VIR_MIGRATE_PERSIST_DEST: True,
        module.VIR_MIGRATE_UNSAFE: True,
        module.VIR_MIGRATE_UNDEFINE_SOURCE: options.undefine_source,
        module.VIR_MIGRATE_PEER2PEER: options.peer_to_peer,
    }
    told = {
        module.VIR_MIGRATE_PARAM_DEST_XML: arrangement.xml,
        module.VIR_MIGRATE_PARAM_PERSIST_XML: arrangement.persistent_xml,
        module.VIR_MIGRATE_PARAM_DEST_NAME: options.dname,
    }
    parameters = {name: value for name, value in told.items() if value is not None}
    flags = sum(flag for flag, wanted in chosen.items() if wanted)
    with _told_how_it_stands():
        if options.peer_to_peer:
            await source.call(ends.handle.migrateToURI3, ends.target.uri, parameters, flags)
        else:
            await source.call(ends.handle.migrate3, ends.target.handle, parameters, flags)


@contextlib.contextmanager
def _told_how_it_stands() -> Iterator[None]:
    try:
        yield
    except BlkmigError as error:
        raise MigrationError(
            f"libvirt did not define the domain at the destination: {error}",
            state="the domain is the source's; its images at the destination are complete",
            advice="mend the cause and run the same command again",
        ) from error


def _together(results: list[Result], options: ManagedOptions, ends: Ends, arrangement: Arrangement) -> Result:
    """One result of all the copies, with the disks called as in the domain."""
    names = {path: target for target, path in arrangement.paths.items()}
    phases: dict[str, float] = {}
    for each in results:
        for phase, seconds in each.phases.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    name = options.dname or ends.domain.name
    gone = "" if options.undefine_source else "; it is still defined here: start it on one host only"
    return Result(
        job=results[-1].job if results else "",
        outcome="migrated",
        guest=f"domain {name} is defined at the destination and does not run{gone}",
        disks=[_called(disk, names) for each in results for disk in each.disks],
        total_copied=sum(each.total_copied for each in results),
        phases=phases,
        downtime=None,
        verified=options.verify.value,
        read_back=sum(each.read_back for each in results),
        mended=sum(each.mended for each in results),
        warnings=[*arrangement.warnings, *(warning for each in results for warning in each.warnings)],
    )


def _called(disk: DiskResult, names: Mapping[str, str]) -> DiskResult:
    return msgspec.structs.replace(disk, name=names.get(disk.destination, "UEFI variables"))
