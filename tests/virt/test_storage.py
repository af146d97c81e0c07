"""Pools and volumes, of libvirt's own test driver, and whose images are."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from qemu_blkmig.errors import Refused
from qemu_blkmig.virt.connection import Connection, LibvirtError
from qemu_blkmig.virt.storage import (
    VolumeSpec,
    create_volume,
    delete_volume,
    directories,
    pool_directory,
    qemu_owner,
    refresh_pools,
    volume_path,
)

POOL = "default-pool"
DOMAIN = "<domain type='qemu'>{label}</domain>"


async def test_a_volume_is_made_found_by_its_pool_and_taken_back(daemonless: Connection) -> None:
    directory = await pool_directory(daemonless, POOL)
    assert (await directories(daemonless))[directory] == POOL
    await create_volume(daemonless, POOL, VolumeSpec("a.qcow2", "qcow2", 1 << 20))
    assert await volume_path(daemonless, POOL, "a.qcow2") == f"{directory}/a.qcow2"
    with pytest.raises(LibvirtError, match="already exists"):
        await create_volume(daemonless, POOL, VolumeSpec("a.qcow2", "qcow2", 1 << 20))
    await delete_volume(daemonless, POOL, "a.qcow2")
    await delete_volume(daemonless, POOL, "a.qcow2")
    with pytest.raises(Refused, match="pool default-pool has no volume"):
        await volume_path(daemonless, POOL, "a.qcow2")


async def test_a_pool_that_is_not_there_or_does_not_run_is_refused(daemonless: Connection) -> None:
    with pytest.raises(Refused, match="no storage pool fast"):
        await pool_directory(daemonless, "fast")
    await refresh_pools(daemonless, [f"{await pool_directory(daemonless, POOL)}/a", "/elsewhere/b"])
    daemonless.handle.storagePoolLookupByName(POOL).destroy()
    with pytest.raises(Refused, match="storage pool default-pool is not active"):
        await pool_directory(daemonless, POOL)
    assert POOL not in (await directories(daemonless)).values()


def test_a_volume_is_sparse_private_and_as_the_image_would_be() -> None:
    root = ElementTree.fromstring(VolumeSpec("o.qcow2", "qcow2", 5, 1 << 16, ("/b<&.raw", "raw"), (64055, 107)).xml())
    assert {each: root.findtext(each) for each in (
        "name", "capacity", "allocation", "target/compat", "target/clusterSize", "target/permissions/mode",
        "target/permissions/owner", "target/permissions/group", "backingStore/path",
    )} == {
        "name": "o.qcow2", "capacity": "5", "allocation": "0", "target/compat": "1.1", "target/clusterSize": "65536",
        "target/permissions/mode": "0600", "target/permissions/owner": "64055", "target/permissions/group": "107",
        "backingStore/path": "/b<&.raw",
    }  # fmt: skip
    bare = ElementTree.fromstring(VolumeSpec("r", "raw", 5).xml())
    assert bare.find("target/compat") is None and bare.find("backingStore") is None
    assert bare.find("target/permissions/owner") is None


@pytest.mark.parametrize(
    ("label", "owner"),
    [
        ("<seclabel type='static' model='dac'><label>+1000:+1001</label></seclabel>", (1000, 1001)),
        ("<seclabel type='static' model='dac'><label>vm:vm</label></seclabel>", None),
        ("", None),
    ],
)
async def test_a_domain_s_own_label_tells_whose_its_images_are(
    daemonless: Connection, label: str, owner: tuple[int, int] | None
) -> None:
    assert await qemu_owner(daemonless, DOMAIN.format(label=label)) == owner
