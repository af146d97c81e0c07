"""What the destination of a libvirt-managed domain will be: where the image of each of its disks goes."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass

from qemu_blkmig.errors import Refused
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.plan import Placed
from qemu_blkmig.virt.connection import Connection, libvirt
from qemu_blkmig.virt.domain import Domain, rewritten


def image_paths(
    domain: Domain, named: Mapping[str, str], given: Domain | None = None, pool: str | None = None
) -> dict[str, str]:
    """Where each disk that is migrated goes, by its target: the path in the XML `given` for the destination, else the
    one `named` for it, else in the directory `pool` under its own file name, else the path it has at the source.

    Raises `Refused` when `named` is of no disk that is migrated or contradicts `given`, when a disk has no path, and
    when two disks would share one.
    """
    for target in named:
        _check_migrated(domain, target)
    paths: dict[str, str] = {}
    for disk in domain.disks:
        if disk.left_alone is not None:
            continue
        path = named.get(disk.target) or _default(disk.path, pool)
        if given is not None:
            path = _given(given, disk.target, named.get(disk.target))
        if path is None:
            raise Refused(
                "its XML names no file or block device", disk=disk.target, advice="name its path at the destination"
            )
        if path in paths.values():
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


def _default(path: str | None, pool: str | None) -> str | None:
    if path is None or pool is None:
        return path
    return posixpath.join(pool, posixpath.basename(path))


@dataclass(frozen=True)
class Arrangement:
    """What is agreed with the destination's libvirt."""

    paths: Mapping[str, str]
    xml: str
    persistent_xml: str | None
    left_alone: tuple[tuple[str, str], ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def placed(self, domain: Domain) -> dict[str, Placed]:
        """Where the images go, by the ids that the disks' devices have in the QEMU of the running `domain`."""
        aliases = {disk.target: disk.alias for disk in domain.disks}
        return {aliases[target] or "": Placed(target, path) for target, path in self.paths.items()}


async def arrange(options: ManagedOptions, domain: Domain, source: Connection, target: Connection) -> Arrangement:
    """What the destination gets. Raises `Refused` where an image has no place, and what `Connection.call` raises."""
    module = libvirt()
    handle = await source.domain(domain.uuid)
    flags = module.VIR_DOMAIN_XML_SECURE | module.VIR_DOMAIN_XML_MIGRATABLE
    paths = image_paths(domain, options.paths)
    xml = options.xml or await source.call(handle.XMLDesc, flags)
    persistent = None
    if options.persistent:
        persistent = rewritten(await source.call(handle.XMLDesc, flags | module.VIR_DOMAIN_XML_INACTIVE), paths)
    return Arrangement(paths, rewritten(xml, paths), persistent)
