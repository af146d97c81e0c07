"""Where the images of a libvirt domain go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast
from unittest.mock import AsyncMock, Mock

import pytest

from qemu_blkmig.destination.protocol import Files, FilesReply
from qemu_blkmig.errors import Refused
from qemu_blkmig.job import arrangement
from qemu_blkmig.job.arrangement import (
    Arrangement,
    block_devices,
    chosen,
    definition_given,
    identified,
    image_paths,
    memory_left,
    other_images,
    renewed,
    with_variables,
)
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import Selection
from qemu_blkmig.job.place import Local
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.virt.connection import Connection
from qemu_blkmig.virt.domain import Domain
from qemu_blkmig.virt.storage import VolumeSpec, create_volume, pool_directory


def _domain(vda: str = "/a/root.qcow2", vdb: str = "/b/data.raw") -> Domain:
    return Domain.parse(
        f"""<domain><name>web1</name><devices>
        <disk type='file' device='disk'><source file='{vda}'/><target dev='vda'/></disk>
        <disk type='file' device='disk'><source file='{vdb}'/><target dev='vdb'/></disk>
        <disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/></disk></devices></domain>"""
    )


def test_a_disk_keeps_its_path_unless_another_is_named_and_a_cdrom_goes_nowhere() -> None:
    assert image_paths(_domain(), {"vdb": "/c/x"}) == {"vda": "/a/root.qcow2", "vdb": "/c/x"}


def test_a_directory_takes_what_has_no_path_of_its_own() -> None:
    assert image_paths(_domain(), {"vdb": "/c/x"}, directory="/pool") == {"vda": "/pool/root.qcow2", "vdb": "/c/x"}


def test_the_xml_for_the_destination_comes_first() -> None:
    given = _domain(vda="/x/1", vdb="/x/2")
    assert image_paths(_domain(), {}, given, directory="/pool") == {"vda": "/x/1", "vdb": "/x/2"}


def test_a_named_path_that_contradicts_the_xml_is_refused() -> None:
    with pytest.raises(Refused, match="but the XML for the destination says /x/1"):
        image_paths(_domain(), {"vda": "/y"}, _domain(vda="/x/1"))


@pytest.mark.parametrize(("target", "why"), [("vdz", "has no disk vdz"), ("sda", "it is a cdrom")])
def test_a_path_for_a_disk_that_is_not_migrated_is_refused(target: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        image_paths(_domain(), {target: "/y"})


def test_two_disks_that_would_share_one_file_are_refused() -> None:
    with pytest.raises(Refused, match="goes to /pool/root too"):
        image_paths(_domain(vda="/a/root", vdb="/b/root"), {}, directory="/pool")


def test_two_spellings_of_a_path_are_one_file() -> None:
    with pytest.raises(Refused, match=r"goes to /vm//a/\. too"):
        image_paths(_domain(), {"vda": "/vm/a", "vdb": "/vm//a/."})


def test_a_volume_whose_path_the_xml_does_not_say_is_refused() -> None:
    xml = "<domain><devices><disk type='volume'><source pool='p'/><target dev='vda'/></disk></devices></domain>"
    with pytest.raises(Refused, match="names no file or block device"):
        image_paths(Domain.parse(xml), {})


LOCKED = "<source file='{}'><encryption format='luks'><secret uuid='c0ffee'/></encryption></source>"


def _as_given(source: str, *, offline: bool = False) -> tuple[Domain, Domain, ManagedOptions]:
    """What the user's XML says of vda by `source`, the domain, whose vda is encrypted, and how it is to move."""
    plain = _domain()
    vda = "<source file='/a/root.qcow2'/>"
    running = Domain.parse(plain.xml.replace(vda, LOCKED.format("/a/root.qcow2")))
    options = ManagedOptions("web1", "qemu+ssh://b/system", Local("/"), persistent=True, offline=offline)
    return Domain.parse(plain.xml.replace(vda, source)), running, options


async def _defined(given: Domain, own: Domain, options: ManagedOptions) -> tuple[str, list[str], list[str]]:
    paths = {"vda": "/there/root", "vdb": "/b/data.raw"}
    return await definition_given(given.xml, options, own, own.xml, paths, cast("Connection", None))


async def test_a_definition_that_is_given_says_of_a_disk_in_plain_text_that_it_is() -> None:
    xml, (warning,), problems = await _defined(*_as_given(LOCKED.format("/there/root")))
    assert problems == [] and "disk vda: --persistent-xml says that its image is encrypted" in warning
    assert "encryption" not in xml and Domain.parse(xml).disks[0].path == "/there/root"


async def test_a_definition_that_is_given_says_of_a_disk_that_is_copied_as_it_is_that_it_is_encrypted() -> None:
    xml, warnings, problems = await _defined(*_as_given(LOCKED.format("/there/root"), offline=True))
    assert (warnings, problems) == ([], []) and "encryption" in xml
    _, _, (problem,) = await _defined(*_as_given("<source file='/there/root'/>", offline=True))
    assert problem.startswith("disk vda: --persistent-xml says that its image is not encrypted, but it will be")


async def test_a_definition_that_is_given_may_spell_a_path_otherwise_but_not_say_another() -> None:
    for path, told in (("/there//./root", []), ("/a/root", ["says /a/root, but its image will be /there/root"])):
        _, _, problems = await _defined(*_as_given(f"<source file='{path}'/>"))
        assert [each.partition("--persistent-xml ")[2] for each in problems] == told


class Confined:
    """An agent that tells of files in /ours, and refuses every request that names another."""

    async def expect(self, op: Files, _: type[FilesReply]) -> FilesReply:
        """See `AgentClient`."""
        if not all(name.startswith("/ours/") for name in op.names):
            raise Refused("out of bounds")
        return FilesReply(
            [("file", 1, int(name.rpartition("/")[2])) for name in op.names], op.names, [[] for _ in op.names]
        )


async def test_a_file_out_of_a_confined_agent_s_bounds_does_not_hide_the_others() -> None:
    found = await identified(cast("AgentClient", Confined()), ["/ours/1", "/theirs/2", "/ours/3"])
    assert found == [("file", 1, 1), None, ("file", 1, 3)]


async def test_a_volume_is_where_its_pool_says_and_one_of_a_cluster_is_not_of_this_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def path(_: Connection, pool: str, volume: str) -> str:
        if volume == "gone":
            raise Refused("no such volume")
        return f"/{pool}/{volume}" if pool == "files" else f"{pool}/{volume}"

    monkeypatch.setattr(arrangement, "volume_path", path)
    volumes = (
        ("files", "a", ""),
        ("cluster", "b", ""),
        ("files", "c", "<shareable/>"),
        ("files", "gone", "<shareable/>"),
    )
    disks = "".join(
        f"<disk type='volume'><source pool='{pool}' volume='{volume}'/><target dev='{volume}'/>{more}</disk>"
        for pool, volume, more in volumes
    )
    domain = Domain.parse(f"<domain><devices>{disks}</devices></domain>")
    options = ManagedOptions("web1", "qemu+ssh://b/system", Local("/"))
    found = (await chosen(domain, options, cast("Connection", None))).disks
    assert [disk.path for disk in found] == ["/files/a", None, "/files/c", None]
    assert [disk.written_here for disk in found] == [True, False, True, True]
    assert found[0].left_alone is None and found[1].left_alone == "its storage is not on this host (pool cluster)"


class Named:
    """An agent with a file, a device, and nothing else."""

    async def expect(self, op: Files, _: type[FilesReply]) -> FilesReply:
        """See `AgentClient`."""
        known = {"/file": ("file", 1, 1), "/device": ("device", 2, 0)}
        return FilesReply([known.get(name) for name in op.names], op.names, [[] for _ in op.names])


async def test_of_what_is_there_it_is_known_whether_it_is_a_block_device() -> None:
    found = await block_devices(cast("AgentClient", Named()), ["/device", "/none", "/file"])
    assert found == {"/device": True, "/file": False}


async def test_where_the_definition_has_another_image_than_the_running_domain_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.raw").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a.raw")
    running = _domain(vda=str(tmp_path / "a.raw"))
    for named, told in (("a.raw", {}), ("link", {}), ("b.raw", {"vda": str(tmp_path / "b.raw")})):
        definition = _domain(vda=str(tmp_path / named))
        assert await other_images(definition, running, cast("Connection", None)) == told


async def test_volumes_that_the_definition_names_are_looked_for_in_one_look_at_the_pools(
    daemonless: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Mock(wraps=daemonless.handle.listAllStoragePools)
    monkeypatch.setattr(daemonless.handle, "listAllStoragePools", look)
    disk = "<disk type='volume' device='disk'><source pool='default-pool' volume='{0}'/><target dev='{0}'/></disk>"
    disks = "".join(disk.format(target) for target in ("vda", "vdb"))
    definition = Domain.parse(f"<domain><name>web1</name><devices>{disks}</devices></domain>")
    there = await pool_directory(daemonless, "default-pool")
    told = await other_images(definition, _domain(vda=f"{there}/vda"), daemonless)
    assert (told, look.call_count) == ({"vdb": f"{there}/vdb"}, 1)


@pytest.mark.parametrize(("access", "runs", "told"), [("shared", True, 0), ("shared", False, 1), ("private", True, 1)])
def test_memory_that_outlasts_the_guest_is_not_left_behind_unless_it_comes_along_with_its_ram(
    access: str, runs: bool, told: int
) -> None:
    memory = f"<memory model='nvdimm' access='{access}'><source><path>/pm/a</path></source></memory>"
    domain = Domain.parse(f"<domain><devices>{memory}</devices></domain>")
    found = [*memory_left(domain, runs=runs)]
    assert len(found) == told
    assert all(each.startswith("its nvdimm lies in /pm/a, which is not copied") for each in found)


EFI = "<domain><name>web1</name><os firmware='efi'><type>hvm</type>{}</os><devices/></domain>"


@pytest.mark.parametrize(
    ("offline", "dname", "named"),
    [
        (True, None, "/var/lib/libvirt/qemu/nvram/web1_VARS.fd"),
        (True, "new", "/var/lib/libvirt/qemu/nvram/new_VARS.fd"),
        # libvirt, by itself, would take the same.
        (False, None, None),
        (False, "new", "/live.fd"),
    ],
)
def test_the_definition_names_the_uefi_variables_that_came_along(
    offline: bool, dname: str | None, named: str | None
) -> None:
    options = ManagedOptions("web1", "x", Local("/"), persistent=True, offline=offline, dname=dname)
    domain, live = Domain.parse(EFI.format("<nvram>/here.fd</nvram>")), EFI.format("<nvram>/live.fd</nvram>")
    ends = ("qemu:///system", "qemu+ssh://b/system")
    xml, problems = with_variables(EFI.format(""), options, domain, live, *ends)
    assert (Domain.parse(xml).nvram, problems) == (named, [])
    for untouched in (live, EFI.format("").replace("efi", "bios")):
        assert with_variables(untouched, options, domain, live, *ends) == (untouched, [])


def test_uefi_variables_that_would_come_to_nobody_knows_where_are_told() -> None:
    options = ManagedOptions("web1", "x", Local("/"), persistent=True, offline=True)
    ends = ("qemu:///system", "qemu+ssh://b/session")
    domain, xml = Domain.parse(EFI.format("<nvram>/here.fd</nvram>")), EFI.format("")
    same, (problem,) = with_variables(xml, options, domain, xml, *ends)
    assert same == xml and "UEFI variables are in /here.fd" in problem and "--persistent-xml" in problem
    assert with_variables(xml, options, replace(domain, nvram=None), xml, *ends) == (xml, [])


RBD = """<pool type='rbd'><name>ceph</name><source><host name='mon1'/><name>vms</name></source></pool>"""


async def test_a_volume_of_a_pool_that_is_network_storage_stays_where_it_is(daemonless: Connection) -> None:
    daemonless.handle.storagePoolCreateXML(RBD)
    await create_volume(daemonless, "ceph", VolumeSpec("web1", "raw", 1 << 20))
    disk = "<disk type='volume'><source pool='ceph' volume='web1'/><target dev='vda'/></disk>"
    domain = Domain.parse(f"<domain><devices>{disk}</devices></domain>")
    options = ManagedOptions("web1", "x", Local("/"))
    (left,) = (await chosen(domain, options, daemonless)).disks
    assert left.left_alone == "its storage is not on this host (pool ceph)"
    assert image_paths(replace(domain, disks=(left,)), {}) == {}
    named = replace(options, selection=Selection(disks=("vda",)))
    with pytest.raises(Refused, match=r"chosen by --migrate-disks, but cannot be migrated: its storage is not"):
        await chosen(domain, named, daemonless)


async def test_what_was_changed_meanwhile_comes_along_but_no_disk_that_was_not_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def xml(title: str, *targets: str) -> str:
        disks = "".join(f"<disk><source file='/{each}'/><target dev='{each}'/></disk>" for each in targets)
        return f"<domain><name>web1</name><title>{title}</title><devices>{disks}</devices></domain>"

    monkeypatch.setattr(arrangement, "block_devices", AsyncMock(return_value={}))
    options = ManagedOptions("web1", "qemu+ssh://hostb/system", Local("/"))
    domain, there = Domain.parse(xml("old", "vda")), Arrangement({"vda": "/there"}, "as it was", None)
    for now, come in ((("vda",), "<title>new</title>"), (("vda", "vdb"), "as it was")):
        source = AsyncMock()
        source.call.return_value = xml("new", *now)
        found, told = await renewed(there, options, domain, source, cast(AgentClient, None))
        assert come in found.xml and not told
