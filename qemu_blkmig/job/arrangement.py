"""What the destination of a libvirt-managed domain will be: its XML, where the image of each of its disks goes, and
all that would fail there.

Not its UEFI variables, nor the state of its emulated TPM: QEMU carries both along with RAM, and writes them at the
destination (seen on libvirt 9.0 with QEMU 7.2 and swtpm 0.7: files equal, also over older ones).
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qemu_blkmig.destination.files import FileId
from qemu_blkmig.destination.protocol import Below, BelowReply, Files, FilesReply
from qemu_blkmig.destination.sharedfs import shared_file_system
from qemu_blkmig.errors import Refused
from qemu_blkmig.job import certificates_tried
from qemu_blkmig.job.managed_options import ManagedOptions, name_for_tls
from qemu_blkmig.job.plan import Placed
from qemu_blkmig.job.staying import NOT_CHOSEN, staying
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.virt.acceptance import (
    conflicts,
    differing,
    is_defined,
    lacks,
    misread,
    missing,
    same_daemon,
    used_by_others,
)
from qemu_blkmig.virt.connection import Connection, LibvirtError, libvirt, virsh
from qemu_blkmig.virt.departure import hindrances, taken_along
from qemu_blkmig.virt.domain import (
    ELSEWHERE,
    Domain,
    DomainDisk,
    files_needed,
    keeps_variables,
    lasting_memory,
    nvram_of,
    rewritten,
)
from qemu_blkmig.virt.hugepages import pages_lacking
from qemu_blkmig.virt.kept import is_session, naming_variables, variables_for
from qemu_blkmig.virt.rehearsal import is_of_xml, unfit, unreachable, would_refuse
from qemu_blkmig.virt.storage import Volumes, pool_directory, qemu_owner, volume_path

VARIABLES = "UEFI variables"
"""What the image of a UEFI's variables is called, among the disks."""


def image_paths(
    domain: Domain, named: Mapping[str, str], given: Domain | None = None, directory: str | None = None
) -> dict[str, str]:
    """Where each disk that is migrated goes, by its target: the path in the XML `given` for the destination, else the
    one `named` for it, else in `directory` under its own file name, else the path it has at the source.

    Raises `Refused` when `named` is of no disk that is migrated or contradicts `given`, when a disk has no path, and
    when two disks would share one.
    """
    for target in named:
        _check_migrated(domain, target)
    paths: dict[str, str] = {}
    for disk in domain.disks:
        if disk.left_alone is not None:
            continue
        path = named.get(disk.target) or _default(disk.path, directory)
        if given is not None:
            path = _given(given, disk.target, named.get(disk.target))
        if path is None:
            raise Refused(
                "its XML names no file or block device", disk=disk.target, advice="name its path at the destination"
            )
        if posixpath.normpath(path) in map(posixpath.normpath, paths.values()):
            raise Refused(f"another disk of the domain goes to {path} too", disk=disk.target)
        paths[disk.target] = path
    return paths


def _check_migrated(domain: Domain, target: str) -> None:
    why = {disk.target: disk.left_alone for disk in domain.disks}
    if target not in why:
        raise Refused(f"the domain has no disk {target} (it has: {', '.join(why) or 'none'})", disk=target)
    if why[target] is not None:
        raise Refused(f"a path is named for it, but it is not migrated: {why[target]}", disk=target)


def _given(given: Domain, target: str, named: str | None) -> str:
    path = next((disk.path for disk in given.disks if disk.target == target), None)
    if path is None:
        raise Refused("the XML for the destination names no file or block device for it", disk=target)
    if named is not None and named != path:
        raise Refused(f"{named} is named for it, but the XML for the destination says {path}", disk=target)
    return path


def _default(path: str | None, directory: str | None) -> str | None:
    if path is None or directory is None:
        return path
    return posixpath.join(directory, posixpath.basename(path))


@dataclass(frozen=True)
class Arrangement:
    """What is agreed with the destination's libvirt. `owner`: uid and gid of its QEMU, where they are known.

    `lasting`: the problem is that libvirt itself, asked for the migration, refused the domain's XML.
    """

    paths: Mapping[str, str]
    xml: str
    persistent_xml: str | None
    left_alone: tuple[tuple[str, str], ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    owner: tuple[int, int] | None = None
    lasting: bool = False

    def notes(self) -> list[str]:
        """What should be known, and which disks are left alone."""
        return [*self.warnings, *(f"disk {target} is left alone: {why}" for target, why in self.left_alone)]

    def placed(self, domain: Domain) -> dict[str, Placed]:
        """Where the images go, by the ids that the disks' devices have in the QEMU of the running `domain`."""
        aliases = {disk.target: disk.alias for disk in domain.disks}
        return {aliases[target] or "": Placed(target, path, self.owner) for target, path in self.paths.items()}


async def arrange(
    options: ManagedOptions, domain: Domain, source: Connection, target: Connection, agent: AgentClient
) -> Arrangement:
    """What the destination gets, and all that its libvirt, or the source's, would refuse of it.

    Raises `Refused` where an image has no place, and what `Connection.call` raises.
    """
    if await same_daemon(source, target):
        raise Refused(f"{source.uri} and {target.uri} are the same host's libvirt")
    handle = await source.domain(domain.uuid)
    domain = await chosen(domain, options, source)
    given = None if options.xml is None else Domain.parse(options.xml)
    directory = options.directory if options.pool is None else await pool_directory(target, options.pool)
    paths = image_paths(domain, options.paths, given, directory)
    block = await block_devices(agent, paths.values())
    xml = rewritten(options.xml or await _own_xml(source, handle), paths, block, as_they_are=options.offline)
    name = options.dname or domain.name
    persistent, told, trouble = None, list[str](), list[str]()
    if options.offline and options.persistent_xml is None:
        persistent = xml
    elif options.persistent:
        own = await _own_xml(source, handle, defined=True)
        if options.persistent_xml is None:
            persistent, told = await _definition(options, domain, own, paths, block, source)
            absent = await absent_files(agent, persistent, {*paths.values(), *files_needed(xml)}, "--persistent-xml")
            told += [f"in the definition, not in the running domain: {each}" for each in absent]
        else:
            persistent, told, trouble = await definition_given(
                options.persistent_xml, options, domain, own, paths, target, block
            )
            told += await _lacking(agent, target, persistent, paths)
            if not trouble and (why := await unfit(target, persistent)) is not None:
                trouble.append(f"libvirt would not define it as --persistent-xml says: {why.words.strip()}")
    if persistent is not None:
        persistent, unnamed = with_variables(persistent, options, domain, xml, source.uri, target.uri)
        trouble += unnamed
    shared, stranded = await staying(domain, await _paths_there(domain, Domain.parse(xml), target), agent)
    written = {**paths, **_written_by_qemu(xml, persistent, runs=not options.offline)}
    problems = [
        *await hindrances(source, handle, domain.xml, runs=not options.offline),
        *await conflicts(target, domain.uuid, name),
        *await lacks(target, Domain.parse(xml), None if options.offline else domain),
        *await missing(target, xml),
        *await used_by_others(target, domain.uuid, written, partial(identified, agent), partial(backing_files, agent)),
        *await absent_files(agent, xml, paths.values()),
        *(differing(given, domain, "--xml") if given else ()),
        *(misread(given, domain, "--xml", as_they_are=options.offline) if given else ()),
        *(() if options.unsafe or options.offline else stranded),
        *(() if options.unsafe else memory_left(domain, runs=not options.offline)),
        *(() if options.unsafe or options.offline else await pages_lacking(target, xml)),
        *trouble,
    ]
    warnings = [*taken_along(domain.xml), *told]
    if await source.call(handle.autostart):
        warnings += _autostart(options, domain.name, target)
    # Those of a user's own (qemu:///session) have another configuration.
    if options.tls and not any(is_session(each.uri) for each in (source, target)):
        lost, unsure = await certificates_tried.of_migration(agent, name_for_tls(options))
        problems += lost
        warnings += unsure
    lost, unsure = await certificates_tried.of_data(agent, options.transfer.data, options.place)
    problems += lost
    warnings += unsure
    rehearsed = (persistent or xml) if options.offline else xml
    refused = None
    if not problems:
        refused = await would_refuse(source, handle, target, rehearsed, options.dname, offline=options.offline)
        problems += [] if refused is None else [_refused(options, refused)]
    if not problems and options.peer_to_peer:
        lost_way = await unreachable(source, handle, target, rehearsed, offline=options.offline)
        problems += [] if lost_way is None else [_not_reached(target, lost_way)]
    if await is_defined(target, domain.uuid):
        fate = "that definition is replaced" if options.persistent else "that definition stays as it is"
        warnings.append(f"the domain is defined at the destination already: {fate}")
    owner = await qemu_owner(target, xml)
    left = tuple(
        (disk.target, "; ".join([disk.left_alone, *filter(None, [shared.get(disk.target)])]))
        for disk in domain.disks
        if disk.left_alone is not None
    )
    return Arrangement(
        paths,
        xml,
        persistent,
        left,
        tuple(problems),
        tuple(warnings),
        owner,
        lasting=refused is not None and is_of_xml(refused),
    )


async def renewed(
    there: Arrangement, options: ManagedOptions, domain: Domain, source: Connection, agent: AgentClient
) -> tuple[Arrangement, list[str]]:
    """The arrangement with what was changed of the running `domain` since (a title, a limit, its definition), and new
    warnings.

    Where other storage of this host is among that it stays as it was, and libvirt refuses it: that was not copied.
    Raises `Refused`, and what `Connection.call` raises.
    """
    handle = await source.domain(domain.uuid)
    block = await block_devices(agent, there.paths.values())
    xml, persistent, told = there.xml, there.persistent_xml, list[str]()
    if options.xml is None:
        own = await _own_xml(source, handle)
        if _storage_here(own) != _storage_here(domain.xml):
            return there, []
        xml = rewritten(own, there.paths, block)
    if options.persistent and options.persistent_xml is None:
        own = await _own_xml(source, handle, defined=True)
        now = await chosen(domain, options, source)
        definition, told = await _definition(options, now, own, there.paths, block, source)
        persistent, _ = with_variables(definition, options, domain, xml, source.uri, options.target_uri)
    new = [each for each in told if each not in there.warnings]
    return replace(there, xml=xml, persistent_xml=persistent, warnings=(*there.warnings, *new)), new


async def _own_xml(source: Connection, handle: Any, *, defined: bool = False) -> str:
    """The domain's, as the destination's libvirt takes it: of the running one, or as it is `defined`."""
    module = libvirt()
    flags = module.VIR_DOMAIN_XML_SECURE | module.VIR_DOMAIN_XML_MIGRATABLE
    return str(await source.call(handle.XMLDesc, flags | (module.VIR_DOMAIN_XML_INACTIVE if defined else 0)))


def _storage_here(xml: str) -> list[object]:
    """What the guest can write to on this host."""
    disks = [disk for disk in Domain.parse(xml).disks if disk.written_here]
    return [*((disk.target, disk.path, disk.volume, disk.left_alone) for disk in disks), *lasting_memory(xml)]


def with_variables(
    definition: str, options: ManagedOptions, domain: Domain, xml: str, source_uri: str, target_uri: str
) -> tuple[str, list[str]]:
    """The definition for the destination, which names a file for UEFI variables where it has any; problems.

    Where it named none libvirt would take one by the domain's name: with --dname another than that which the QEMU of
    the running domain, whose XML there is `xml`, writes to.
    """
    if not keeps_variables(definition) or nvram_of(definition)[1] is not None:
        return definition, []
    if not options.offline:
        running = None if options.dname is None else nvram_of(xml)[1]
        return definition if running is None else naming_variables(definition, running), []
    if domain.nvram is None:
        return definition, []
    there = variables_for(options.dname or domain.name, domain.nvram, source_uri, target_uri)
    if there is None:
        return definition, [
            f"its UEFI variables are in {domain.nvram}, and where the destination's libvirt would look for them is "
            "not known: name that by <nvram> in --persistent-xml"
        ]
    return naming_variables(definition, there), []


def _written_by_qemu(xml: str, persistent: str | None, *, runs: bool) -> dict[str, str]:
    """What else is overwritten there, by what it is, when QEMU takes over, or we copy: perhaps another domain's."""
    nvram = variables_there(xml, persistent, runs=runs)
    found = {} if nvram is None else {VARIABLES: nvram}
    lasting = [memory for memory in lasting_memory(xml) if memory.written] if runs else []
    return found | {f"{memory.what} {number}": memory.path for number, memory in enumerate(lasting)}


def _autostart(options: ManagedOptions, name: str, target: Connection) -> Iterator[str]:
    """libvirt keeps that beside the definition, and takes it nowhere."""
    if options.persistent:
        there = virsh(target.uri, "autostart", options.dname or name)
        yield f"the domain starts with this host (autostart), and at the destination only after: {there}"
    if not options.undefine_source:
        here = virsh(options.source_uri, "autostart", "--disable", name)
        yield f"it still would start with this host, from the images that it leaves here: {here}"


def _refused(options: ManagedOptions, error: LibvirtError) -> str:
    """What no look of ours finds, libvirt finds itself."""
    why = error.words.strip()
    defined = options.offline and options.persistent_xml is not None
    if options.xml is None and not defined:
        return f"libvirt would not migrate it: {why}"
    hint = f"begin with what {virsh(options.source_uri, 'dumpxml', '--migratable', options.domain)} prints"
    return f"libvirt would not migrate it with the XML of {'--persistent-xml' if defined else '--xml'}: {why} ({hint})"


def _not_reached(target: Connection, error: LibvirtError) -> str:
    return (
        f"with --p2p the source's libvirt itself must reach {target.uri}, with the keys and certificates of the user "
        f"that it runs as, and it does not: {error.words.strip()}"
    )


def variables_there(xml: str, persistent: str | None, *, runs: bool) -> str | None:
    """Where its UEFI variables are written to at the destination: by its QEMU, or by us where the definition says."""
    return nvram_of(xml if runs or persistent is None else persistent)[1]


async def chosen(domain: Domain, options: ManagedOptions, source: Connection) -> Domain:
    """The domain with the paths of disks that its XML names by pool and volume; left alone are also those on shared
    storage, unless they are named, and those that are not chosen.

    Raises `Refused` where --migrate-disks names none of its disks, or one that cannot be migrated.
    """
    wanted = options.selection.disks
    reasons = {disk.target: disk.left_alone for disk in domain.disks}
    for target in wanted or ():
        if target not in reasons:
            raise Refused(f"the domain has no disk {target} (it has: {', '.join(reasons) or 'none'})", disk=target)
        if (why := reasons[target]) is not None:
            raise _chosen_in_vain(target, why)
    named = {*(wanted or ()), *options.paths}
    disks = [await _as_chosen(disk, wanted, named, source) for disk in domain.disks]
    return replace(domain, disks=tuple(disks))


async def _as_chosen(
    disk: DomainDisk, wanted: tuple[str, ...] | None, named: set[str], source: Connection
) -> DomainDisk:
    if disk.left_alone is not None and not disk.written_here:
        return disk
    if disk.volume is not None:
        try:
            path = await volume_path(source, *disk.volume)
        except (Refused, LibvirtError):
            if disk.left_alone is None:
                raise
            return disk
        if not posixpath.isabs(path):
            why = f"{ELSEWHERE} (pool {disk.volume[0]})"
            if disk.target in (wanted or ()):
                raise _chosen_in_vain(disk.target, why)
            return replace(disk, left_alone=why, written_here=False)
        disk = replace(disk, path=path)
    if disk.left_alone is not None:
        return disk
    if wanted is not None and disk.target not in wanted:
        return replace(disk, left_alone=NOT_CHOSEN)
    if disk.path is not None and disk.target not in named and (kind := shared_file_system(disk.path)) is not None:
        return replace(disk, left_alone=f"it is on shared storage ({kind}); --migrate-disks or --disk has it copied")
    return disk


def _chosen_in_vain(target: str, why: str) -> Refused:
    return Refused(f"it is chosen by --migrate-disks, but cannot be migrated: {why}", disk=target)


async def _paths_there(domain: Domain, given: Domain, target: Connection) -> dict[str, str | None]:
    """What the disks that are left alone will lie in there, by the XML `given`, as far as it is known."""
    left = {disk.target for disk in domain.disks if disk.left_alone is not None}
    found = {disk.target: disk.path for disk in given.disks if disk.target in left}
    for disk in given.disks:
        if disk.volume is not None and disk.target in left:
            # Who lacks it is told by `missing`.
            with contextlib.suppress(Refused, LibvirtError):
                found[disk.target] = await volume_path(target, *disk.volume)
    return found


def memory_left(domain: Domain, *, runs: bool) -> Iterator[str]:
    """Memory that outlasts the guest, in files whose content does not come to the destination along with its RAM."""
    for memory in lasting_memory(domain.xml):
        if not (runs and memory.written) and not shared_file_system(memory.path):
            yield (
                f"its {memory.what} lies in {memory.path}, which is not copied: at the destination it would start "
                "with another one (copy it, and --unsafe permits that)"
            )


async def other_images(definition: Domain, running: Domain, source: Connection) -> dict[str, str]:
    """Where the definition has other images than the running domain, by target: it is to start with those."""
    now = {disk.target: disk for disk in running.disks if disk.left_alone is None}
    both = [(disk, now[disk.target]) for disk in definition.disks if disk.target in now]
    both = [(own, used) for own, used in both if own.volume is None or own.volume != used.volume]
    named = {own.volume for own, _ in both if own.volume is not None}
    files = await (await Volumes.known_to(source)).files(named) if named else {}
    found = {}
    for own, used in both:
        path = own.path if own.volume is None else files.get(own.volume)
        if used.path is not None and (path is None or os.path.realpath(path) != os.path.realpath(used.path)):
            found[own.target] = path or "none"
    return found


async def _definition(
    options: ManagedOptions,
    domain: Domain,
    own: str,
    paths: Mapping[str, str],
    block: Mapping[str, bool],
    source: Connection,
) -> tuple[str, list[str]]:
    """The XML that is to be defined, made of the domain's `own`, and warnings."""
    parsed = Domain.parse(own)
    others = await other_images(parsed, domain, source)
    running = {disk.target for disk in domain.disks}
    warnings = [
        f"disk {disk.target} is in the definition only, not in the running domain: its image is not copied"
        for disk in parsed.disks
        if disk.target not in running and disk.left_alone is None
    ]
    warnings += [
        f"disk {target}: the definition has another image than the running domain, {path}, and keeps it: it is not "
        "copied, and that with which the guest runs on is in no definition (--persistent-xml can name it)"
        for target, path in others.items()
    ]
    has = {disk.target for disk in parsed.disks}
    moved = {target: path for target, path in paths.items() if target in has and target not in others}
    return rewritten(own, moved, block, as_they_are=options.offline), warnings


async def definition_given(
    xml: str,
    options: ManagedOptions,
    domain: Domain,
    own: str,
    paths: Mapping[str, str],
    target: Connection,
    block: Mapping[str, bool] | None = None,
) -> tuple[str, list[str], list[str]]:
    """What is to be defined of --persistent-xml, warnings, problems: libvirt does not compare it with what runs.

    As of --xml, what tells how an image was read here goes where it arrives otherwise.
    """
    given = Domain.parse(xml)
    has = {disk.target: disk for disk in given.disks if disk.target in paths}
    problems = [
        *differing(given, Domain.parse(own), "--persistent-xml"),
        *misread(given, domain, "--persistent-xml", as_they_are=options.offline),
    ]
    for disk in has.values():
        try:
            says = await _path_there(disk, target)
        except Refused as error:
            problems.append(f"disk {disk.target}: --persistent-xml: {error}")
            continue
        if says is None or posixpath.normpath(says) != posixpath.normpath(paths[disk.target]):
            problems.append(
                f"disk {disk.target}: --persistent-xml says {says}, but its image will be {paths[disk.target]}"
            )
    plain = [disk.target for disk in has.values() if disk.encrypted and not options.offline]
    warnings = [
        f"disk {each}: --persistent-xml says that its image is encrypted, but it arrives, and is defined, in plain text"
        for each in plain
    ]
    moved = {each: paths[each] for each, disk in has.items() if disk.volume is None or each in plain}
    return rewritten(xml, moved, block, as_they_are=options.offline), warnings, problems


async def _path_there(disk: DomainDisk, target: Connection) -> str | None:
    if disk.volume is None:
        return disk.path
    pool, name = disk.volume
    return posixpath.join(await pool_directory(target, pool), name)


async def _lacking(agent: AgentClient, target: Connection, xml: str, paths: Mapping[str, str]) -> list[str]:
    lost = [*await missing(target, xml), *await absent_files(agent, xml, paths.values())]
    return [f"--persistent-xml: {each}; the domain would not start anew there" for each in lost]


async def absent_files(agent: AgentClient, xml: str, paths: Container[str], option: str = "--xml") -> list[str]:
    """What it uses besides `paths`, and is not there: kernel, firmware, bridges, what disks left alone lie in.

    `option`: that which takes other XML.
    """
    needed = {path: what for path, what in files_needed(xml).items() if path not in paths}
    problems = []
    for path, what in needed.items():
        if not await _is_there(agent, path):
            problems.append(f"{what}: {path} is not there at the destination; {option} can name another")
    template, nvram = nvram_of(xml)
    if template and nvram and not await _is_there(agent, nvram) and not await _is_there(agent, template):
        problems.append(f"the template of its UEFI variables, {template}, is not there at the destination")
    return problems


async def block_devices(agent: AgentClient, paths: Iterable[str]) -> dict[str, bool]:
    """Whether a block device is there, for each of these paths where anything is."""
    asked = [*paths]
    found = zip(asked, await identified(agent, asked), strict=True)
    return {path: each[0] == "device" for path, each in found if each is not None}


async def identified(agent: AgentClient, paths: list[str]) -> list[FileId | None]:
    """Nothing is known of files out of a confined agent's bounds, which it refuses to tell of along with the others."""
    try:
        return (await agent.expect(Files(paths), FilesReply)).ids
    except Refused:
        if len(paths) < 2:
            return [None] * len(paths)
        return [each for path in paths for each in await identified(agent, [path])]


async def backing_files(agent: AgentClient, images: list[str]) -> list[tuple[list[str], bool]]:
    """Of each of these qcow2 images there, as far as the agent tells, and whether that is all."""
    reply = await agent.expect(Below(images), BelowReply) if images else BelowReply([], [])
    return [*zip(reply.files, reply.whole, strict=True)]


async def _is_there(agent: AgentClient, path: str) -> bool:
    """What is out of a confined agent's bounds, so that nobody knows, counts as there."""
    try:
        return (await agent.expect(Files([path]), FilesReply)).ids[0] is not None
    except Refused:
        return True
