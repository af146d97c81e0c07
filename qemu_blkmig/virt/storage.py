"""libvirt's storage: pools, the directories that they are, and their volumes."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from qemu_blkmig.errors import Refused
from qemu_blkmig.virt.connection import Connection, LibvirtError, libvirt, virsh

log = logging.getLogger(__name__)

_DIRECTORIES = ("dir", "fs", "netfs")
"""Types of pools whose volumes are files."""


class NoStorage(Refused):
    """A libvirt has no storage driver, or none that answers, as where a modular one's virtstoraged is not there."""


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


@dataclass(frozen=True)
class _Pool:
    """An active pool; `directory`: of its volumes; `of_files`: that is what they are."""

    name: str
    handle: Any
    directory: str | None
    of_files: bool


async def _active_pools(connection: Connection) -> list[_Pool]:
    """Raises `NoStorage`."""
    try:
        handles = await connection.call(
            connection.handle.listAllStoragePools, libvirt().VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE
        )
    except LibvirtError as error:
        raise _no_storage(connection, error) or error from error
    told = await connection.call_all([handle.XMLDesc for handle in handles])
    # One that is gone meanwhile knows no volumes.
    return [_pool_of(handle, xml) for handle, xml in zip(handles, told, strict=True) if isinstance(xml, str)]


def _pool_of(handle: Any, xml: str) -> _Pool:
    root = ElementTree.fromstring(xml)
    path = root.findtext("./target/path")
    of_files = root.get("type") in _DIRECTORIES
    return _Pool(str(handle.name()), handle, posixpath.normpath(path) if path else None, of_files)


def _no_storage(connection: Connection, error: LibvirtError) -> NoStorage | None:
    """What an error means, where that is that nobody knows of any pool."""
    module = libvirt()
    if error.code not in (module.VIR_ERR_NO_SUPPORT, module.VIR_ERR_NO_CONNECT, module.VIR_ERR_SYSTEM_ERROR):
        return None
    return NoStorage(
        f"{connection.who} has no storage driver that answers: {error.words}",
        advice="install and start it there (systemctl enable --now virtstoraged.socket), or name paths, no pools",
    )


async def directories(connection: Connection) -> dict[str, str]:
    """The active pools whose volumes are files: name by directory; none where there is no storage driver."""
    try:
        pools = await _active_pools(connection)
    except NoStorage as error:
        log.info("%s", error)
        return {}
    return {pool.directory: pool.name for pool in pools if pool.directory and pool.of_files}


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
    told = ElementTree.fromstring(await connection.capabilities())
    for model in told.findall("./host/secmodel"):
        if own is None and model.findtext("model") == "dac":
            own = model.findtext(f"./baselabel[@type='{root.get('type')}']")
    numbers: Sequence[str] = (own or "").replace("+", "").split(":")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        return None
    return int(numbers[0]), int(numbers[1])


async def volume_path(connection: Connection, pool: str, volume: str) -> str:
    """Where a volume lies; no absolute path where its pool is network storage (RBD, Gluster, iSCSI that QEMU speaks).

    Raises `Refused` where there is no such one.
    """
    handle = await _pool(connection, pool)
    try:
        return str(await connection.call((await connection.call(handle.storageVolLookupByName, volume)).path))
    except LibvirtError as error:
        raise Refused(
            f"{connection.who}: pool {pool} has no volume {volume}: {error.words}",
            advice=f"if its file is there: {virsh(connection.uri, 'pool-refresh', pool)}",
        ) from error


class Volumes:
    """What pools know of their volumes: each is asked once. Make it by `known_to`."""

    def __init__(self, connection: Connection, pools: Mapping[str, _Pool], unknown: NoStorage | None = None) -> None:
        """`unknown`: why nothing is known of any."""
        self._connection = connection
        self._unknown = unknown
        self._pools = pools
        self._by_directory = {pool.directory: pool for pool in pools.values() if pool.directory}
        self._volumes: dict[str, Mapping[str, Any]] = {}

    @classmethod
    async def known_to(cls, connection: Connection) -> Volumes:
        """Raises what `Connection.call` does."""
        try:
            return cls(connection, {pool.name: pool for pool in await _active_pools(connection)})
        except NoStorage as error:
            return cls(connection, {}, error)

    async def files(self, named: Collection[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """Where these lie, each named by pool and volume, as far as they are known; or would, as far as their pool
        tells, if that is not active, or does not know them (yet). Raises `NoStorage`.
        """
        if named and self._unknown is not None:
            raise self._unknown
        known = [
            (each, handle)
            for each in named
            if each[0] in self._pools and (handle := (await self._of(self._pools[each[0]])).get(each[1]))
        ]
        paths = await self._connection.call_all([handle.path for _, handle in known])
        found = {each: path for (each, _), path in zip(known, paths, strict=True) if isinstance(path, str)}
        unknown = [each for each in named if each not in found]
        directories = {pool: await self._directory(pool) for pool in {pool for pool, _ in unknown}}
        return found | {
            (pool, volume): posixpath.join(directory, volume)
            for pool, volume in unknown
            if (directory := directories[pool]) is not None
        }

    async def _directory(self, pool: str) -> str | None:
        if pool in self._pools:
            return self._pools[pool].directory
        try:
            handle = await self._connection.call(self._connection.handle.storagePoolLookupByName, pool)
            return _pool_of(handle, await self._connection.call(handle.XMLDesc)).directory
        except LibvirtError:
            return None

    async def bases(self, images: Iterable[str]) -> dict[str, list[str]]:
        """The backing files, from the top, that pools know of those of these images that are their volumes."""
        found: dict[str, list[str]] = {image: [] for image in images}
        tops = {image: image for image in found}
        while tops:
            below = await self._below({*tops.values()})
            tops = {image: below[top] for image, top in tops.items() if top in below and below[top] not in found[image]}
            for image, base in tops.items():
                found[image].append(base)
        return found

    async def _below(self, images: Iterable[str]) -> dict[str, str]:
        """A volume that libvirt itself cannot read says nothing of any other."""
        known = []
        for image in images:
            pool = self._by_directory.get(posixpath.dirname(posixpath.normpath(image)))
            if pool is not None and (handle := (await self._of(pool)).get(posixpath.basename(image))):
                known.append((image, handle))
        told = await self._connection.call_all([handle.XMLDesc for _, handle in known])
        bases = {
            image: ElementTree.fromstring(xml).findtext("./backingStore/path")
            for (image, _), xml in zip(known, told, strict=True)
            if isinstance(xml, str)
        }
        return {image: base for image, base in bases.items() if base}

    async def _of(self, pool: _Pool) -> Mapping[str, Any]:
        if pool.name not in self._volumes:
            try:
                handles = await self._connection.call(pool.handle.listAllVolumes, 0)
            except LibvirtError as error:
                if error.code not in (libvirt().VIR_ERR_NO_STORAGE_POOL, libvirt().VIR_ERR_OPERATION_INVALID):
                    raise
                # It was stopped meanwhile.
                handles = []
            self._volumes[pool.name] = {str(handle.name()): handle for handle in handles}
        return self._volumes[pool.name]


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
            raise _no_storage(connection, error) or error from error
        raise Refused(
            f"{connection.who} has no storage pool {name}", advice=virsh(connection.uri, "pool-list", "--all")
        ) from error
    if not await connection.call(handle.isActive):
        raise Refused(
            f"{connection.who}: storage pool {name} is not active",
            advice=virsh(connection.uri, "pool-start", name),
        )
    return handle
