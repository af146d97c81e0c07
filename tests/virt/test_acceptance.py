"""What a destination's libvirt would refuse: asked of libvirt's own test driver, which needs no daemon."""

from __future__ import annotations

from collections import Counter
from typing import Any
from xml.etree import ElementTree

import pytest

from qemu_blkmig.virt.acceptance import conflicts, differing, is_defined, misread, missing, used_by_others
from qemu_blkmig.virt.connection import Connection, libvirt
from qemu_blkmig.virt.domain import Domain
from qemu_blkmig.virt.storage import VolumeSpec, create_volume, pool_directory, volume_path

POOL = "default-pool"

UUID = "c0ffee00-1111-2222-3333-444455556666"
OTHER = "c0ffee11-1111-2222-3333-444455556666"
DEFINED = """<domain type='test'><name>{name}</name><uuid>{uuid}</uuid><memory>4096</memory><os><type>hvm</type></os>
<devices><disk type='file'><source file='/vm/a.qcow2'/><target dev='vda'/></disk></devices></domain>"""
USES = """<domain><devices>
<interface type='network'><source network='{network}'/></interface>
<disk type='volume'><source pool='{pool}' volume='x'/><target dev='vda'/></disk></devices></domain>"""


async def _define(daemonless: Connection, name: str, uuid: str) -> None:
    await daemonless.call(daemonless.handle.defineXML, DEFINED.format(name=name, uuid=uuid))


async def test_a_free_name_and_uuid_are_no_conflict(daemonless: Connection) -> None:
    assert await conflicts(daemonless, UUID, "web1") == []
    assert not await is_defined(daemonless, UUID)


async def test_an_active_domain_of_that_uuid_is_in_the_way_whatever_it_is_called(daemonless: Connection) -> None:
    running = await daemonless.domain("test")
    (found,) = await conflicts(daemonless, running.UUIDString(), "test")
    assert "it is active: test" in found


async def test_another_domain_of_that_name_is_in_the_way(daemonless: Connection) -> None:
    (found,) = await conflicts(daemonless, UUID, "test")
    assert "another domain called test" in found and "--dname" in found


async def test_a_definition_of_that_uuid_may_stay_under_the_same_name_only(daemonless: Connection) -> None:
    await _define(daemonless, "web1", UUID)
    assert await conflicts(daemonless, UUID, "web1") == []
    assert await is_defined(daemonless, UUID)
    (found,) = await conflicts(daemonless, UUID, "web2")
    assert "--dname web1" in found


async def test_a_state_that_was_saved_there_would_go_on_with_newer_disks(daemonless: Connection) -> None:
    await _define(daemonless, "web 1", UUID)
    saved = await daemonless.domain("web 1")
    saved.create()
    saved.managedSave()
    (found,) = await conflicts(daemonless, UUID, "web 1")
    saved.managedSaveRemove()
    assert "a saved state of this domain" in found
    assert f"virsh -c {daemonless.uri} managedsave-remove 'web 1'" in found


async def _alone(images: list[str]) -> list[tuple[list[str], bool]]:
    return [([], False) for _ in images]


async def test_a_base_that_only_its_overlay_tells_of_is_in_use(daemonless: Connection) -> None:
    async def below(images: list[str]) -> list[tuple[list[str], bool]]:
        assert images == ["/vm/a.qcow2"]
        return [(["/bases/debian.qcow2"], True)]

    xml = DEFINED.format(name="other", uuid=OTHER).replace("<source", "<driver name='qemu' type='qcow2'/><source")
    await daemonless.call(daemonless.handle.defineXML, xml)
    (found,) = await used_by_others(daemonless, "another", {"vda": "/bases/debian.qcow2"}, _unknown, below)
    assert found == "disk vda: /bases/debian.qcow2 is used by domain other at the destination"


async def _unknown(paths: list[str]) -> list[None]:
    return [None] * len(paths)


async def test_an_image_of_another_domain_is_in_use_though_that_does_not_run(daemonless: Connection) -> None:
    await _define(daemonless, "other", OTHER)
    (found,) = await used_by_others(daemonless, "another", {"vdb": "/vm//a.qcow2", "vdc": "/vm/b"}, _unknown, _alone)
    assert found == "disk vdb: /vm//a.qcow2 is used by domain other at the destination (there: /vm/a.qcow2)"
    assert await used_by_others(daemonless, OTHER, {"vdb": "/vm/a.qcow2"}, _unknown, _alone) == [], (
        "its own is no other's"
    )


async def test_an_image_that_another_domain_knows_by_another_name_is_in_use(daemonless: Connection) -> None:
    async def same(paths: list[str]) -> list[str]:
        return [path.replace("/vm/", "/link/") for path in paths]

    await _define(daemonless, "other", OTHER)
    (found,) = await used_by_others(daemonless, "another", {"vda": "/link/a.qcow2"}, same, _alone)
    assert found == "disk vda: /link/a.qcow2 is used by domain other at the destination (there: /vm/a.qcow2)"


async def test_a_volume_of_another_domain_is_in_use_and_so_is_its_backing_file(daemonless: Connection) -> None:
    await create_volume(daemonless, POOL, VolumeSpec("top.qcow2", "qcow2", 1 << 20, backing=("/vm/base.raw", "raw")))
    disk = f"<disk type='volume'><source pool='{POOL}' volume='top.qcow2'/><target dev='vdb'/></disk>"
    xml = DEFINED.format(name="other", uuid=OTHER).replace("</devices>", f"{disk}</devices>")
    await daemonless.call(daemonless.handle.defineXML, xml)
    top = await volume_path(daemonless, POOL, "top.qcow2")
    found = await used_by_others(daemonless, "another", {"vda": top, "vdb": "/vm/base.raw"}, _unknown, _alone)
    assert found == [
        f"disk vda: {top} is used by domain other at the destination",
        "disk vdb: /vm/base.raw is used by domain other at the destination",
    ]


async def test_what_another_domain_that_runs_is_to_have_next_time_is_in_use(daemonless: Connection) -> None:
    await _define(daemonless, "other", OTHER)
    other = await daemonless.domain("other")
    other.create()
    await daemonless.call(
        daemonless.handle.defineXML, DEFINED.format(name="other", uuid=OTHER).replace("/vm/a.", "/vm/next.")
    )
    for path in ("/vm/a.qcow2", "/vm/next.qcow2"):
        (found,) = await used_by_others(daemonless, "another", {"vda": path}, _unknown, _alone)
        assert found == f"disk vda: {path} is used by domain other at the destination"


@pytest.mark.parametrize("active", [True, False])
async def test_a_volume_of_another_domain_is_in_use_though_its_pool_is_not_active_or_does_not_know_it(
    daemonless: Connection, active: bool
) -> None:
    async def below(images: list[str]) -> list[tuple[list[str], bool]]:
        return [(["/bases/debian.qcow2"] if image.endswith("/x.qcow2") else [], True) for image in images]

    disk = (
        f"<disk type='volume'><driver type='qcow2'/><source pool='{POOL}' volume='x.qcow2'/><target dev='vdb'/></disk>"
        "<disk type='volume'><source pool='none' volume='x'/><target dev='vdc'/></disk>"
    )
    xml = DEFINED.format(name="other", uuid=OTHER).replace("</devices>", f"{disk}</devices>")
    await daemonless.call(daemonless.handle.defineXML, xml)
    pool = daemonless.handle.storagePoolLookupByName(POOL)
    directory = ElementTree.fromstring(pool.XMLDesc()).findtext("./target/path")
    if not active:
        pool.destroy()
    found = [
        await used_by_others(daemonless, "another", {"vda": path}, _unknown, below)
        for path in (f"{directory}/x.qcow2", "/bases/debian.qcow2")
    ]
    if not active:
        pool.create()
    assert [len(each) for each in found] == [1, 1]
    assert all("is used by domain other" in told for (told,) in found)


async def test_a_volume_of_another_domain_that_libvirt_cannot_read_hinders_nobody(
    daemonless: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = await pool_directory(daemonless, POOL)
    await create_volume(daemonless, POOL, VolumeSpec("a.qcow2", "qcow2", 1 << 20))
    xml = DEFINED.format(name="other", uuid=OTHER).replace("/vm/", f"{directory}/")
    await daemonless.call(daemonless.handle.defineXML, xml)

    def fails(volume: Any, _flags: int = 0) -> None:
        raise libvirt().libvirtError(f"cannot open volume '{volume.name()}': Stale file handle")

    monkeypatch.setattr(libvirt().virStorageVol, "XMLDesc", fails)
    assert await used_by_others(daemonless, "another", {"vda": "/vm/b"}, _unknown, _alone) == []
    assert len(await used_by_others(daemonless, "another", {"vda": f"{directory}/a.qcow2"}, _unknown, _alone)) == 1


async def test_libvirt_is_asked_for_each_domain_once_and_for_what_the_agent_cannot_read(
    daemonless: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over ssh each call takes as long as the way there and back."""
    directory = await pool_directory(daemonless, POOL)
    await create_volume(daemonless, POOL, VolumeSpec("top", "qcow2", 1 << 20, backing=("/vm/base", "raw")))
    for number in range(40):
        disks = (
            f"<disk type='file'><driver type='qcow2'/><source file='{directory}/{number}'/><target dev='vdb'/></disk>"
        )
        disks += f"<disk type='volume'><source pool='{POOL}' volume='top'/><target dev='vdc'/></disk>"
        xml = DEFINED.format(name=f"vm{number}", uuid=f"{OTHER[:-2]}{number:02}").replace(
            "</devices>", f"{disks}</devices>"
        )
        await daemonless.call(daemonless.handle.defineXML, xml)
    await create_volume(daemonless, POOL, VolumeSpec("39", "qcow2", 1 << 20, backing=("/vm/other", "raw")))

    async def below(images: list[str]) -> list[tuple[list[str], bool]]:
        return [([], not image.endswith("/39")) for image in images]

    calls = counted(monkeypatch)
    found = await used_by_others(daemonless, "another", {"vda": "/vm/base", "vdb": "/vm/other"}, _unknown, below)
    assert len(found) == 41
    assert calls == {
        # Libvirt's own test domain runs, and is asked for its definition, too.
        "listAllDomains": 1, "virDomain.XMLDesc": 42, "listAllStoragePools": 1, "virStoragePool.XMLDesc": 1,
        "listAllVolumes": 1, "path": 1, "virStorageVol.XMLDesc": 2,
    }  # fmt: skip


REMOTE = {
    "virConnect": ("listAllDomains", "listAllStoragePools", "storageVolLookupByPath", "storagePoolLookupByName"),
    "virDomain": ("XMLDesc",),
    "virStoragePool": ("XMLDesc", "isActive", "listAllVolumes", "storageVolLookupByName"),
    "virStorageVol": ("XMLDesc", "path"),
}
"""What the daemon is asked for by the classes of the binding."""


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count these calls."""
    calls: Counter[str] = Counter()
    for kind, names in REMOTE.items():
        for name in names:
            call = getattr(getattr(libvirt(), kind), name)
            known_as = f"{kind}.XMLDesc" if name == "XMLDesc" else name

            def counting(*words: Any, call: Any = call, known_as: str = known_as) -> Any:
                calls[known_as] += 1
                return call(*words)

            monkeypatch.setattr(getattr(libvirt(), kind), name, counting)
    return calls


async def test_networks_and_pools_that_are_not_there_or_do_not_run_are_told(daemonless: Connection) -> None:
    assert await missing(daemonless, USES.format(network="default", pool="default-pool")) == []
    assert await missing(daemonless, USES.format(network="lan", pool="fast")) == [
        "the destination has no network lan",
        "the destination has no storage pool fast",
    ]
    await daemonless.call(daemonless.handle.networkLookupByName("default").destroy)
    assert await missing(daemonless, USES.format(network="default", pool="default-pool")) == [
        "the destination's network default is not active"
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": "web2"}, "its name is web2, the domain's is web1"),
        ({"uuid": UUID.replace("c0", "d0")}, "its UUID is d0ffee00"),
    ],
)
def test_xml_that_is_not_of_this_domain_is_told(change: dict[str, str], why: str) -> None:
    own = {"name": "web1", "uuid": UUID}
    found = list(differing(Domain.parse(DEFINED.format(**{**own, **change})), Domain.parse(DEFINED.format(**own)), "-"))
    assert len(found) == 1 and why in found[0]


@pytest.mark.parametrize("spelled", [UUID.upper(), UUID.replace("-", ""), f"\n{UUID} "])
def test_xml_may_spell_the_uuid_as_libvirt_takes_it(spelled: str) -> None:
    given, own = (Domain.parse(DEFINED.format(name="web1", uuid=uuid)) for uuid in (spelled, UUID))
    assert not [*differing(given, own, "--xml")]


def test_xml_with_other_disks_is_told() -> None:
    root = ElementTree.fromstring(DEFINED.format(name="web1", uuid=UUID))
    given = Domain.parse(ElementTree.tostring(root, encoding="unicode").replace("vda", "vdb"))
    (found,) = differing(given, Domain.parse(DEFINED.format(name="web1", uuid=UUID)), "--xml")
    assert found == "--xml: its disks are vdb, the domain's are vda"


def test_xml_that_says_another_format_than_the_image_will_have_is_told() -> None:
    own = DEFINED.format(name="web1", uuid=UUID).replace("<source", "<driver name='qemu' type='qcow2'/><source")
    given = own.replace("type='qcow2'", "type='raw'")
    (found,) = misread(Domain.parse(given), Domain.parse(own), "--xml", as_they_are=False)
    assert found == "disk vda: --xml says that its image is raw, but it will be qcow2, as it is here"
    alone = own.replace("<target", "<readonly/><target")
    given = alone.replace("qcow2'/>", "raw'/>")
    assert not [*misread(Domain.parse(given), Domain.parse(alone), "--xml", as_they_are=False)]


def test_xml_must_say_of_an_image_that_is_copied_as_it_is_whether_it_is_encrypted() -> None:
    plain = Domain.parse(DEFINED.format(name="web1", uuid=UUID))
    locked = Domain.parse(plain.xml.replace("a.qcow2'/>", "a.qcow2'><encryption format='luks'/></source>"))
    for given, own, told in (
        (plain, locked, "is not encrypted, but it will be,"),
        (locked, plain, "is encrypted, but it will not be,"),
    ):
        (found,) = misread(given, own, "--xml", as_they_are=True)
        assert told in found
        assert not [*misread(given, own, "--xml", as_they_are=False)], "it arrives in plain, and what says else goes"
