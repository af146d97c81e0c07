"""What the destination's libvirt would refuse about a domain, asked of it before a byte is copied.

libvirt itself finds out when the guest's RAM is to be moved, after the disks. What it accepts and refuses was seen on
libvirt 9.0: a domain that is defined there under the same name and UUID is accepted, and replaced if the migration is
persistent; the same name or UUID in another domain, or a running one, is not.
"""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from xml.etree import ElementTree

from qemu_blkmig.virt.connection import Connection, LibvirtError, libvirt, virsh
from qemu_blkmig.virt.domain import Domain, image_files, rooted
from qemu_blkmig.virt.offered import drivers_lacking, not_offered, static_labels
from qemu_blkmig.virt.storage import Volumes

Identify = Callable[[list[str]], Awaitable[Sequence[Hashable | None]]]
Below = Callable[[list[str]], Awaitable[Sequence[tuple[Sequence[str], bool]]]]

BROKEN_OFF = 30.0
"""Seconds in which a libvirt notices that a migration to it has broken off, and ends the domain: by its keepalive, 5 s
each, or when ssh does."""
_POLL = 0.2


async def same_daemon(source: Connection, target: Connection) -> bool:
    """Whether both are the same host's libvirt, as the host's UUID tells (virConnectGetCapabilities)."""
    told = [await end.capabilities() for end in (source, target)]
    uuids = [ElementTree.fromstring(xml).findtext("./host/uuid") for xml in told]
    return uuids[0] is not None and uuids[0] == uuids[1]


async def conflicts(target: Connection, uuid: str, name: str) -> list[str]:
    """Domains there that are in the way of one with this UUID and name.

    One that waits for a migration is given `BROKEN_OFF` seconds to end, as after a move that broke off.
    """
    deadline = asyncio.get_running_loop().time() + BROKEN_OFF
    while await _waits(target, uuid) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - libvirt does it
        await asyncio.sleep(_POLL)
    by_uuid = await _found(target, target.handle.lookupByUUIDString, uuid)
    by_name = await _found(target, target.handle.lookupByName, name)
    if by_uuid is not None and await target.call(by_uuid.isActive):
        waits = ", waiting for a migration" if await _waits(target, uuid) else ""
        return [f"the destination has a domain of this UUID already, and it is active{waits}: {by_uuid.name()}"]
    if by_uuid is not None and by_uuid.name() != name:
        return [
            f"the destination has defined a domain of this UUID under another name, {by_uuid.name()}: undefine it "
            f"there, or name it by --dname {by_uuid.name()}"
        ]
    if by_name is not None and by_name.UUIDString() != uuid:
        renaming = virsh(target.uri, "domrename", name)
        return [
            f"the destination has another domain called {name} (UUID {by_name.UUIDString()}): --dname gives this one "
            f"another name there, or {renaming} NEW-NAME that one"
        ]
    if by_uuid is not None and await target.call(by_uuid.hasManagedSaveImage):
        return [
            "the destination has a saved state of this domain, from which its next start there would go on, with disks "
            f"that are newer: {virsh(target.uri, 'managedsave-remove', by_uuid.name())}"
        ]
    return []


async def _waits(target: Connection, uuid: str) -> bool:
    module = libvirt()
    domain = await _found(target, target.handle.lookupByUUIDString, uuid)
    try:
        told = None if domain is None else tuple(await target.call(domain.state))
    except LibvirtError:
        return False
    return told == (module.VIR_DOMAIN_PAUSED, module.VIR_DOMAIN_PAUSED_MIGRATION)


async def is_defined(target: Connection, uuid: str) -> bool:
    """Whether a domain of this UUID is defined there."""
    found = await _found(target, target.handle.lookupByUUIDString, uuid)
    return found is not None and bool(await target.call(found.isPersistent))


async def lacks(target: Connection, there: Domain, running: Domain | None) -> list[str]:
    """What the libvirt and QEMU there would lack: emulator, machine type, devices, security driver, CPU.

    The CPU is that of the `running` guest: in the form that libvirt migrates, it may name features that even the
    source has not given it. None: it does not run, and gets what CPU there is when it starts.
    """
    root = rooted(there.xml)
    kind, machine = root.get("type", ""), root.find("./os/type")
    told = machine.attrib if machine is not None else {}
    which = [root.findtext("./devices/emulator"), told.get("arch"), told.get("machine"), kind]
    try:
        offered = await target.call(target.handle.getDomainCapabilities, *which)
    except LibvirtError as error:
        return [f"the destination cannot run this domain: {error}"]
    found = [*not_offered(offered, there.xml)]
    if static_labels(there.xml):
        found += drivers_lacking(await target.capabilities(), there.xml)
    return found + ([] if running is None else await _cpu_lacks(target, rooted(running.xml).find("./cpu"), which))


async def _cpu_lacks(target: Connection, cpu: ElementTree.Element | None, which: list[str | None]) -> list[str]:
    module = libvirt()
    if cpu is None or cpu.get("mode") == "host-passthrough":
        return []
    text = ElementTree.tostring(cpu, encoding="unicode")
    try:
        await target.call(
            target.handle.compareHypervisorCPU, *which, text, module.VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE
        )
    except LibvirtError as error:
        if error.code == module.VIR_ERR_NO_SUPPORT:
            return []
        return [f"the destination cannot give the guest its CPU: {error}"]
    return []


async def missing(target: Connection, xml: str) -> list[str]:
    """Networks, storage pools and secrets that the domain uses and that are not there, or not active."""
    module, handle = libvirt(), target.handle
    root = rooted(xml)
    networks = {each.get("network") for each in root.findall("./devices/interface[@type='network']/source")}
    pools = {each.get("pool") for each in root.findall("./devices/disk[@type='volume']/source")}
    secrets = {each.get("uuid") for each in root.iter("secret")}
    secrets |= {each.get("secret") for each in root.findall("./devices/tpm/backend/encryption")}
    lost = []
    for kind, names, lookup in (
        ("network", networks, handle.networkLookupByName),
        ("storage pool", pools, handle.storagePoolLookupByName),
    ):
        for name in sorted(each for each in names if each):
            try:
                found = await _found(target, lookup, name, module.VIR_ERR_NO_NETWORK, module.VIR_ERR_NO_STORAGE_POOL)
                if found is None:
                    lost.append(f"the destination has no {kind} {name}")
                elif not await target.call(found.isActive):
                    lost.append(f"the destination's {kind} {name} is not active")
            except LibvirtError as error:
                # As where the daemon that knows them is not there.
                lost.append(f"the destination cannot tell of {kind} {name}: {error.words}")
    for uuid in sorted(each for each in secrets if each):
        if await _found(target, handle.secretLookupByUUIDString, uuid, module.VIR_ERR_NO_SECRET) is None:
            lost.append(f"the destination has no secret {uuid}")
    return lost


async def used_by_others(
    target: Connection, uuid: str, paths: Mapping[str, str], identify: Identify, below: Below
) -> list[str]:
    """Images that domains there, running or not, use: what would be overwritten is another guest's.

    `identify`: what tells the files at these paths there from all others, None where there is none. `below`: the
    backing files of these qcow2 images there, and whether these are all: libvirt tells only those of running domains,
    and of pools' volumes, one by one.
    """
    theirs = await _images_of_others(target, uuid, below)
    named = {posixpath.normpath(path): disk for disk, path in paths.items()}
    ids = await identify([*paths.values(), *(path for path, _ in theirs)])
    there = {each: disk for disk, each in zip(paths, ids, strict=False) if each is not None}
    used = {}
    for (path, name), each in zip(theirs, ids[len(paths) :], strict=True):
        disk = named.get(posixpath.normpath(path)) or there.get(each)
        if disk is not None:
            known_as = "" if path == paths[disk] else f" (there: {path})"
            used[disk, name] = f"disk {disk}: {paths[disk]} is used by domain {name} at the destination{known_as}"
    return [*used.values()]


async def _images_of_others(target: Connection, uuid: str, below: Below) -> list[tuple[str, str]]:
    """Each with the name of its domain. A call for each domain, two for one that runs, and few besides: they may be
    hundreds, far away.
    """
    others = await _other_domains(target, uuid)
    disks = [(disk, other.name) for other in others for disk in other.disks]
    volumes = await Volumes.known_to(target)
    files = await volumes.files({disk.volume for disk, _ in disks if disk.volume is not None})
    images = [(path, other.name) for other in others for path in sorted(image_files(other.xml))]
    images += [(files[disk.volume], name) for disk, name in disks if disk.volume in files]
    stacked = [disk for disk, _ in disks if disk.format == "qcow2"]
    named = {disk.path if disk.volume is None else files.get(disk.volume) for disk in stacked}
    overlays = sorted(path for path in named if path)
    told = dict(zip(overlays, await below(overlays), strict=True))
    untold = {path for path, _ in images if path not in told or not told[path][1]}
    known = await volumes.bases(untold)
    found = [
        (each, name)
        for path, name in images
        for each in (path, *known.get(path, ()), *(told[path][0] if path in told else ()))
    ]
    return [*dict.fromkeys(found)]


async def _other_domains(target: Connection, uuid: str) -> list[Domain]:
    """As they are, and once more as they will be the next time where they run."""
    handles = await target.call(target.handle.listAllDomains, 0)
    others = [handle for handle in handles if handle.UUIDString() != uuid]
    asked = [partial(handle.XMLDesc, 0) for handle in others]
    asked += [partial(handle.XMLDesc, libvirt().VIR_DOMAIN_XML_INACTIVE) for handle in others if handle.ID() != -1]
    found = []
    for told in await target.call_all(asked):
        if isinstance(told, LibvirtError):
            if told.code != libvirt().VIR_ERR_NO_DOMAIN:
                raise told
        else:
            found.append(Domain.parse(told))
    return found


async def _found(target: Connection, lookup: Any, name: str, *codes: int) -> Any:
    """What a lookup finds; None where there is no such thing."""
    try:
        return await target.call(lookup, name)
    except LibvirtError as error:
        if error.code in (codes or (libvirt().VIR_ERR_NO_DOMAIN,)):
            return None
        raise


def differing(given: Domain, own: Domain, option: str) -> Iterable[str]:
    """What XML that the user gives must have in common with the domain's own."""
    if given.uuid and _digits(given.uuid) != _digits(own.uuid):
        yield f"{option}: its UUID is {given.uuid}, the domain's is {own.uuid}"
    if given.name != own.name:
        yield f"{option}: its name is {given.name}, the domain's is {own.name}; --dname renames it"
    theirs, ours = {disk.target for disk in given.disks}, {disk.target for disk in own.disks}
    if theirs != ours:
        yield f"{option}: its disks are {', '.join(sorted(theirs))}, the domain's are {', '.join(sorted(ours))}"


def _digits(uuid: str) -> str:
    """libvirt takes a UUID in capitals and without its hyphens, too."""
    return uuid.replace("-", "").strip().lower()


def misread(given: Domain, own: Domain, option: str, *, as_they_are: bool) -> Iterable[str]:
    """Images that a QEMU with the XML that the user gives would take for something else than what arrives.

    `as_they_are`: encrypted ones arrive encrypted, else in plain text (see `rewritten`).
    """
    moved = {disk.target: disk for disk in own.disks if disk.left_alone is None}
    for disk in given.disks:
        if (here := moved.get(disk.target)) is None:
            continue
        if disk.format != here.format:
            yield (
                f"disk {disk.target}: {option} says that its image is {disk.format}, but it will be "
                f"{here.format}, as it is here"
            )
        if as_they_are and disk.encrypted != here.encrypted:
            says, is_it = ("not ", "") if here.encrypted else ("", "not ")
            yield (
                f"disk {disk.target}: {option} says that its image is {says}encrypted, but it will {is_it}be, as it is "
                "here"
            )
