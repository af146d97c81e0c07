"""A domain that does not run: its images are copied, as one job, then libvirt defines it at the destination."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from qemu_blkmig.destination.protocol import Created, Mark
from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import BlkmigError, MigrationError, Refused
from qemu_blkmig.job.arrangement import VARIABLES, Arrangement, arrange, variables_there
from qemu_blkmig.job.base_choice import apart
from qemu_blkmig.job.beginning import Beginning
from qemu_blkmig.job.carriage import Carriage
from qemu_blkmig.job.copy_images import copy_images
from qemu_blkmig.job.ends import Ends
from qemu_blkmig.job.imagefile import ImageFile, ImageSource, describe
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import Selection
from qemu_blkmig.job.plan import NO_NEED_OF_US, NOTHING_TO_COPY, Placed, Plan, Planner, together
from qemu_blkmig.job.record import Job, Managed
from qemu_blkmig.job.reporting import Reporter, Stopwatch
from qemu_blkmig.job.result import Result
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.virt.connection import libvirt
from qemu_blkmig.virt.domain import Domain, has_varstore
from qemu_blkmig.virt.kept import tpm_state
from qemu_blkmig.virt.migration import Wish, asked_for
from qemu_blkmig.virt.storage import refresh_pools


async def move_offline(
    options: ManagedOptions,
    reporter: Reporter,
    interrupts: Interrupts,
    clock: Clock,
    suspended: Job | None = None,
    beginning: Beginning | None = None,
) -> Result:
    """Copy the images and define the domain there, or go on with the suspended job.

    `beginning`: of the way to the destination.

    Raises a `BlkmigError`. Once all images are complete they stay, whatever becomes of the domain.
    """
    steering = Steering(options.downtime, options.transfer.bandwidth)
    async with contextlib.AsyncExitStack() as stack:
        life = await stack.enter_async_context(Lifecycle(reporter, interrupts, steering, suspended, beginning))
        return await life.conduct(_move(life, options, interrupts, clock, stack))


async def _move(
    life: Lifecycle, options: ManagedOptions, interrupts: Interrupts, clock: Clock, stack: contextlib.AsyncExitStack
) -> Result:
    watch, record = Stopwatch(clock, life.reporter), life.job.record
    with watch.phase("prepare"):
        ends = await Ends.open(options, stack, life.beginning)
        domain = ends.domain
        record.offline = Managed.of(options, domain.uuid, domain.name)
        agent = await life.start_agent(options.place)
        arrangement = await arrange_offline(options, ends, agent)
        images = offline_images(domain, arrangement)
        plans = await plan_offline(options, images, agent, record.identities)
        if problems := [*arrangement.problems, *(problem for plan in plans for problem in plan.problems)]:
            raise Refused("; ".join(problems), state="nothing was touched")
        for warning in arrangement.notes():
            life.reporter.note(warning)
        before = _as_it_is(domain)
        source = await ImageSource.serve([image.file for image in images], life.job.runtime)
    try:
        plan = together(plans)
        carriage = Carriage(
            life.job, plan, life.host, agent, options.transfer, life.reporter, options.verify, life.journal.stable
        )
        copied = await copy_images(life, watch, source, plan, carriage, options.transfer, options.verify)
    finally:
        await source.close()
    await _require_as_before(ends, before)
    with interrupts.deferred(), _told_how_it_stands():
        await _let_images_stay(life, agent)
        await refresh_pools(ends.target, arrangement.paths.values())
        await _define(options, ends, arrangement)
    gone = "" if options.undefine_source else "; it is still defined here: start it on one host only"
    return msgspec.structs.replace(
        copied,
        outcome="migrated",
        guest=f"domain {record.offline.name_there} is defined at the destination and does not run{gone}",
        warnings=[*arrangement.notes(), *copied.warnings],
    )


async def arrange_offline(options: ManagedOptions, ends: Ends, agent: AgentClient) -> Arrangement:
    """What the destination gets, and all that would fail of it; nothing is touched."""
    found = await arrange(options, ends.domain, ends.source, ends.target, agent)
    problems = [
        f"disk {disk.target} is encrypted within its {disk.format} image, which only its QEMU can read: start it, and "
        "with --allow-plaintext it moves while it runs"
        for disk in ends.domain.disks
        if disk.target in found.paths and disk.encrypted and disk.format != "raw"
    ]
    problems += left_behind(ends.domain, ends.source.uri)
    if not options.selection.ignore_ownership and await _has_moved_away(ends):
        problems.append(
            "libvirt has moved the domain away from here (virsh domstate --reason), so that its images are old; if you "
            "know better, --ignore-ownership overrides"
        )
    shared = [
        f"{directory}, which is shared with it, is not copied: without a directory there it does not start"
        for directory in ends.domain.shared
    ]
    return replace(found, problems=(*found.problems, *problems), warnings=(*found.warnings, *shared))


async def _has_moved_away(ends: Ends) -> bool:
    """Whether it was a migration that ended it here, of which no record beside an image tells if it was not ours."""
    state, reason = await ends.source.call(ends.handle.state)
    module = libvirt()
    return bool(state == module.VIR_DOMAIN_SHUTOFF and reason == module.VIR_DOMAIN_SHUTOFF_MIGRATED)


def left_behind(domain: Domain, uri: str) -> Iterator[str]:
    """What of this host's domain, of the libvirt of `uri`, no copy of images and UEFI variables takes along."""
    if (state := tpm_state(domain, uri)) is not None:
        yield f"its TPM has a state ({state}), which only the migration of a running domain carries along"
    if has_varstore(domain.xml):
        yield "its UEFI variables lie in a <varstore>, which is not copied: start it, and they move along while it runs"


@dataclass(frozen=True)
class OfflineImage:
    """An image and where it goes. `variables`: it holds those of its UEFI, not a disk."""

    file: ImageFile
    placed: Placed
    variables: bool = False


def offline_images(domain: Domain, arrangement: Arrangement) -> list[OfflineImage]:
    """The domain's images, and its UEFI variables, which lie where the definition for the destination has them."""
    found = []
    for disk in domain.disks:
        path = arrangement.paths.get(disk.target)
        if disk.path is not None and path is not None:
            placed = Placed(disk.target, path, arrangement.owner)
            found.append(OfflineImage(ImageFile(disk.path, disk.format, disk.target), placed))
    if domain.nvram is not None:
        there = variables_there(arrangement.xml, arrangement.persistent_xml, runs=False)
        placed = Placed(VARIABLES, there or domain.nvram, arrangement.owner)
        found.append(OfflineImage(ImageFile(domain.nvram, "raw", VARIABLES), placed, variables=True))
    return found


async def plan_offline(
    options: ManagedOptions,
    images: Sequence[OfflineImage],
    agent: AgentClient,
    begun: Sequence[Created] = (),
    tell: Callable[[str], None] = lambda _: None,
    *,
    layers_first: bool = False,
) -> list[Plan]:
    """A plan for each image: what would fail of it; nothing is touched. Raises `Refused` where one cannot be read.

    `begun`: the images of a job that is resumed. `tell`, `layers_first`: see `Planner`.
    """
    if not images:
        raise Refused(NOTHING_TO_COPY, state="nothing was touched", advice=NO_NEED_OF_US)
    plans = []
    for image in images:
        wanted = replace(options.selection, disks=None)
        if image.variables:
            wanted = Selection(ignore_ownership=wanted.ignore_ownership, compare=wanted.compare)
        source = replace(await describe(image.file.path, image.file.format), name=image.placed.target)
        planner = Planner(agent, wanted, Path("/"), tell, begun, layers_first=layers_first)
        plans.append(await planner.plan_image(source, image.placed))
    whole = together(plans)
    if plans and (
        crossed := [each for each in apart(whole.layers, whole.images, whole.places) if each not in whole.problems]
    ):
        plans[-1] = replace(plans[-1], problems=(*plans[-1].problems, *crossed))
    return plans


def _as_it_is(domain: Domain) -> Mapping[str, tuple[int, int]]:
    """When each image was last written to, and its length."""
    paths = [Path(disk.path) for disk in domain.disks if disk.path is not None and disk.left_alone is None]
    paths += [] if domain.nvram is None else [Path(domain.nvram)]
    status = {str(path): path.stat() for path in paths if path.exists()}
    return {path: (each.st_mtime_ns, each.st_size) for path, each in status.items()}


async def _require_as_before(ends: Ends, before: Mapping[str, tuple[int, int]]) -> None:
    if await ends.source.call(ends.handle.isActive) or _as_it_is(ends.domain) != before:
        raise MigrationError(
            "the domain was started while its images were copied, or they were written to",
            advice="try again while it does not run, or without --offline while it does",
        )


async def _let_images_stay(life: Lifecycle, agent: AgentClient) -> None:
    """They are complete, and may soon be a domain's: nothing that happens to the job removes them any more."""
    record = life.job.record
    try:
        await agent.request(Mark(record.job, record.images, "complete"))
    except BlkmigError as error:
        life.reporter.note(f"the images at the destination are complete, but their records do not say so: {error}")
    record.images, record.created, record.recording = [], [], False
    await life.job.save()


async def _define(options: ManagedOptions, ends: Ends, arrangement: Arrangement) -> None:
    """libvirt's own offline migration, which copies nothing: it defines the domain there, and may undefine it here."""
    wish = Wish(
        None,
        arrangement.persistent_xml or arrangement.xml,
        name=options.dname,
        offline=True,
        peer_to_peer=options.peer_to_peer,
        persistent=True,
        undefine_source=options.undefine_source,
    )
    await asked_for(ends.source, ends.handle, ends.target, wish)


@contextlib.contextmanager
def _told_how_it_stands() -> Iterator[None]:
    try:
        yield
    except BlkmigError as error:
        raise MigrationError(
            f"the domain was not defined at the destination: {error}",
            state="the domain is the source's; its images at the destination are complete",
            advice="mend the cause and run the same command again, with --compare: it reads both sides and copies what "
            "differs",
        ) from error
