"""libvirt's storage: pools, the directories that they are, and their volumes."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from qemu_blkmig.errors import Refused
from qemu_blkmig.virt.connection import Connection, LibvirtError, libvirt


async def volume_path(connection: Connection, pool: str, volume: str) -> str:
    """Where a volume lies. Raises `Refused` where there is no such one."""
    handle = await _pool(connection, pool)
    try:
        return str(await connection.call((await connection.call(handle.storageVolLookupByName, volume)).path))
    except LibvirtError as error:
        raise Refused(f"{connection.who}: pool {pool} has no volume {volume}: {error}") from error


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
