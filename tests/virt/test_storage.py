"""Pools and volumes, of libvirt's own test driver, and whose images are."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from qemu_blkmig.errors import Refused
from qemu_blkmig.virt.acceptance import missing
from qemu_blkmig.virt.connection import Connection, LibvirtError, libvirt
from qemu_blkmig.virt.storage import (
    NoStorage,
    Volumes,
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
    with pytest.raises(Refused, match="pool default-pool has no volume") as caught:
        await volume_path(daemonless, POOL, "a.qcow2")
    assert caught.value.advice == f"if its file is there: virsh -c {daemonless.uri} pool-refresh {POOL}"


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


def _without_a_driver(daemonless: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """As libvirt 9.0 says it: without the driver's module; a modular one where virtstoraged is not there."""

    def fails(*_words: object) -> None:
        error = libvirt().libvirtError("")
        error.err = (code, 0, words, 2, "", "", "", 0, 0)
        raise error

    code, words = libvirt().VIR_ERR_NO_SUPPORT, "this function is not supported by the connection driver"
    for name in ("listAllStoragePools", "storagePoolLookupByName", "storageVolLookupByPath"):
        monkeypatch.setattr(daemonless.handle, name, fails)


async def test_a_libvirt_without_a_storage_driver_has_no_pools_where_none_is_needed(
    daemonless: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_a_driver(daemonless, monkeypatch)
    assert await directories(daemonless) == {}
    await refresh_pools(daemonless, ["/vm/a"])
    volumes = await Volumes.known_to(daemonless)
    assert await volumes.files([]) == {} and await volumes.bases(["/vm/a"]) == {"/vm/a": []}


async def test_what_needs_a_storage_driver_says_that_there_is_none(
    daemonless: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_a_driver(daemonless, monkeypatch)
    why = "libvirt has no storage driver that answers: this function is not supported"
    with pytest.raises(NoStorage, match=why) as refused:
        await pool_directory(daemonless, POOL)
    assert "virtstoraged" in str(refused.value.advice)
    with pytest.raises(NoStorage, match=why):
        await (await Volumes.known_to(daemonless)).files([(POOL, "a")])
    used = f"<domain><devices><disk type='volume'><source pool='{POOL}' volume='x'/></disk></devices></domain>"
    (lost,) = await missing(daemonless, used)
    assert lost.startswith(f"the destination cannot tell of storage pool {POOL}: this function is not supported")
