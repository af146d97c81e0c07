"""libvirt's storage: pools, the directories that they are, and their volumes."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from qemu_blkmig.errors import Refused
from qemu_blkmig.virt.connection import Connection, LibvirtError, libvirt

_DIRECTORIES = ("dir", "fs", "netfs")
"""Types of pools whose volumes are files."""


@dataclass(frozen=True)
class VolumeSpec:
    """An image as libvirt is to make it; `size` in bytes. `owner`: uid and gid (None: libvirtd's own)."""

    name: str
    format: str
    size: int
    cluster_size: int | None = None
    backing: tuple[str, str] | None = None
    owner: tuple[int, int] | None = None

    def xml(self) -> str:
        """As virStorageVolCreateXML has it; sparse."""
        root = ElementTree.Element("volume")
        ElementTree.SubElement(root, "name").text = self.name
        ElementTree.SubElement(root, "capacity", unit="bytes").text = str(self.size)
        ElementTree.SubElement(root, "allocation", unit="bytes").text = "0"
        target = ElementTree.SubElement(root, "target")
        ElementTree.SubElement(target, "format", type=self.format)
        permissions = ElementTree.SubElement(target, "permissions")
        ElementTree.SubElement(permissions, "mode").text = "0600"
        for name, number in zip(("owner", "group"), self.owner or (), strict=False):
            ElementTree.SubElement(permissions, name).text = str(number)
        if self.format == "qcow2":
            ElementTree.SubElement(target, "compat").text = "1.1"
        if self.cluster_size is not None:
            ElementTree.SubElement(target, "clusterSize", unit="B").text = str(self.cluster_size)
        if self.backing is not None:
            backing = ElementTree.SubElement(root, "backingStore")
            ElementTree.SubElement(backing, "path").text = self.backing[0]
            ElementTree.SubElement(backing, "format", type=self.backing[1])
        return ElementTree.tostring(root, encoding="unicode")


async def directories(connection: Connection) -> dict[str, str]:
    """The active pools whose volumes are files: name by directory."""
    found = {}
    for pool in await connection.call(
        connection.handle.listAllStoragePools, libvirt().VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE
    ):
        root = ElementTree.fromstring(await connection.call(pool.XMLDesc))
        if root.get("type") in _DIRECTORIES and (path := root.findtext("./target/path")):
            found[posixpath.normpath(path)] = str(pool.name())
    return found


async def refresh_pools(connection: Connection, paths: Iterable[str]) -> None:
    """Have pools look what lies in their directories, where these files are. Raises what `Connection.call` does."""
    known = await directories(connection)
    for directory in {posixpath.dirname(posixpath.normpath(path)) for path in paths} & known.keys():
        handle = await _pool(connection, known[directory])
        await connection.call(handle.refresh, 0)


async def create_volume(connection: Connection, pool: str, spec: VolumeSpec) -> None:
    """Make a volume that is not there. Raises what `Connection.call` does."""
    handle = await _pool(connection, pool)
    try:
        await connection.call(handle.createXML, spec.xml(), 0)
    except LibvirtError as error:
        if error.code != libvirt().VIR_ERR_STORAGE_VOL_EXIST:
            raise
        # Of a file that was removed without it libvirt learns only now.
        await connection.call(handle.refresh, 0)
        await connection.call(handle.createXML, spec.xml(), 0)


async def delete_volume(connection: Connection, pool: str, name: str) -> None:
    """Delete it, and what of its file is still there; nothing where it is unknown. Raises what `call` does."""
    try:
        volume = await connection.call((await _pool(connection, pool)).storageVolLookupByName, name)
        await connection.call(volume.delete, 0)
    except LibvirtError as error:
        if error.code != libvirt().VIR_ERR_NO_STORAGE_VOL:
            raise


async def qemu_owner(connection: Connection, domain_xml: str) -> tuple[int, int] | None:
    """The user and group that QEMU will run as there, and libvirt's DAC gives its images to; None where unknown."""
    root = ElementTree.fromstring(domain_xml)
    own = root.findtext("./seclabel[@model='dac'][@type='static']/label")
    told = ElementTree.fromstring(await connection.call(connection.handle.getCapabilities))
    for model in told.findall("./host/secmodel"):
        if own is None and model.findtext("model") == "dac":
            own = model.findtext(f"./baselabel[@type='{root.get('type')}']")
    numbers: Sequence[str] = (own or "").replace("+", "").split(":")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        return None
    return int(numbers[0]), int(numbers[1])


async def volume_path(connection: Connection, pool: str, volume: str) -> str:
    """Where a volume lies. Raises `Refused` where there is no such one."""
    handle = await _pool(connection, pool)
    try:
        return str(await connection.call((await connection.call(handle.storageVolLookupByName, volume)).path))
    except LibvirtError as error:
        raise Refused(f"{connection.who}: pool {pool} has no volume {volume}: {error}") from error


async def volume_files(connection: Connection, volumes: Iterable[tuple[str, str]]) -> set[str]:
    """Where these lie, each named by pool and volume, as far as they are known there."""
    found = set()
    for pool, volume in volumes:
        with contextlib.suppress(Refused):
            found.add(await volume_path(connection, pool, volume))
    return found


async def with_bases(connection: Connection, images: Iterable[str]) -> set[str]:
    """These images, and the backing files that pools know of those that are their volumes."""
    found: set[str] = set()
    waiting = [*images]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += await _base(connection, path)
    return found


async def _base(connection: Connection, path: str) -> list[str]:
    try:
        volume = await connection.call(connection.handle.storageVolLookupByPath, path)
        base = ElementTree.fromstring(await connection.call(volume.XMLDesc)).findtext("./backingStore/path")
    except LibvirtError:
        # No volume, or one that libvirt itself cannot read, which says nothing of any other.
        return []
    return [base] if base else []


async def pool_directory(connection: Connection, name: str) -> str:
    """The directory that a pool's volumes lie in. Raises `Refused` where it is none, or not active."""
    handle = await _pool(connection, name)
    root = ElementTree.fromstring(await connection.call(handle.XMLDesc))
    path = root.findtext("./target/path")
    if path is None:
        raise Refused(
            f"{connection.who}: the volumes of pool {name} ({root.get('type')}) are no files or devices there"
        )
    return path


async def _pool(connection: Connection, name: str) -> Any:
    module = libvirt()
    try:
        handle = await connection.call(connection.handle.storagePoolLookupByName, name)
    except LibvirtError as error:
        if error.code != module.VIR_ERR_NO_STORAGE_POOL:
            raise
        raise Refused(
            f"{connection.who} has no storage pool {name}", advice=f"virsh -c {connection.uri} pool-list"
        ) from error
    if not await connection.call(handle.isActive):
        raise Refused(
            f"{connection.who}: storage pool {name} is not active",
            advice=f"virsh -c {connection.uri} pool-start {name}",
        )
    return handle
