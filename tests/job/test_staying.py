"""Disks that are not copied: which are told of, because the destination may have another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from qemu_blkmig.destination.protocol import Files, FilesReply
from qemu_blkmig.errors import Refused
from qemu_blkmig.job import staying as module
from qemu_blkmig.job.staying import NOT_CHOSEN, staying
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.virt.domain import Domain


class There:
    """The agent of a host with /dev/lun, which is called so, and whose bounds are /dev."""

    def __init__(self, *names: str) -> None:
        self.names = names

    async def expect(self, op: Files, _: type[FilesReply]) -> FilesReply:
        """See `AgentClient`."""
        (name,) = op.names
        if not name.startswith("/dev/"):
            raise Refused("out of bounds")
        return FilesReply([("device", 1, 0)], op.names, [list(self.names) if name == "/dev/lun" else []])


async def told(
    disk: str, *names: str, not_chosen: bool = False, there: str | None = "/dev/lun"
) -> tuple[dict[str, str], list[str]]:
    """What is told of this disk of a domain."""
    domain = Domain.parse(f"<domain><devices>{disk}</devices></domain>")
    if not_chosen:
        domain = replace(domain, disks=tuple(replace(each, left_alone=NOT_CHOSEN) for each in domain.disks))
    return await staying(domain, {"vdb": there}, cast("AgentClient", There(*names)))


async def test_a_file_that_is_left_out_is_told_unless_it_is_copied(tmp_path: Path) -> None:
    disk = f"<disk type='file'><source file='{tmp_path}/a.raw'/><target dev='vdb'/></disk>"
    assert await told(disk) == ({}, [])
    _, (lost,) = await told(disk, not_chosen=True)
    assert lost.startswith(f"disk vdb is left out of --migrate-disks, but {tmp_path}/a.raw is not on shared storage")
    assert "--unsafe" in lost


@pytest.mark.parametrize("mark", ["<shareable/>", ""])
async def test_what_is_left_alone_for_another_reason_but_written_to_is_told_unless_it_is_on_shared_storage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mark: str
) -> None:
    device = "" if mark else " device='lun'"
    disk = f"<disk type='file'{device}><source file='{tmp_path}/a'/><target dev='vdb'/>{mark}</disk>"
    _, (lost,) = await told(disk)
    why = "it is shared with other guests" if mark else "it is a SCSI device passed through"
    assert lost.startswith(f"disk vdb is left alone, for {why}") and "--unsafe" in lost
    assert await told(disk.replace("</disk>", "<readonly/></disk>")) == ({}, [])
    monkeypatch.setattr(module, "shared_file_system", lambda _: "nfs4")
    assert await told(disk) == ({}, [])


@pytest.mark.parametrize("how", ["", "lun", "shareable"])
async def test_a_device_that_is_left_alone_stays_only_if_both_hosts_are_known_to_see_it(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    lun, mark = " device='lun'" if how == "lun" else "", "<shareable/>" if how == "shareable" else ""
    disk = f"<disk type='block'{lun}><source dev='/dev/lun'/><target dev='vdb'/>{mark}</disk>"
    monkeypatch.setattr(module, "file_id", lambda _: ("device", 7, 0))
    monkeypatch.setattr(module, "names_everywhere", lambda _: ["serial 1", "wwid eui.1"])
    shared, lost = await told(disk, "wwid eui.1", not_chosen=not how)
    assert shared == {"vdb": "/dev/lun is the same device at both hosts (wwid eui.1)"} and lost == []
    for names, there in ((["serial 1"], "/dev/lun"), ([], "/dev/lun"), (["wwid eui.1"], "/x"), (["wwid eui.1"], None)):
        shared, (told_of,) = await told(disk, *names, not_chosen=not how, there=there)
        assert shared == {} and "/dev/lun is not known to be the same device at both hosts" in told_of


@pytest.mark.parametrize(
    ("disk", "why"),
    [
        ("type='nvme'><source type='pci' namespace='1'/>", "an NVMe device of this host"),
        ("type='vhostuser'><source type='unix' path='/run/spdk'/>", "served by a process of this host (/run/spdk)"),
        ("type='vhostvdpa'><source dev='/dev/vhost-vdpa-0'/>", "a vDPA device of this host (/dev/vhost-vdpa-0)"),
        ("type='dir'><source dir='/srv'/>", "a directory of this host (/srv)"),
        (
            "type='network'><source protocol='nbd'><host transport='unix' socket='/run/nbd'/></source>",
            "served by a process of this host (/run/nbd)",
        ),
        (
            "type='network'><source protocol='iscsi' name='i'><host name='127.0.0.1' port='3260'/></source>",
            "served by a process of this host (127.0.0.1)",
        ),
        ("type='later'><source/>", "where its storage is cannot be told of its type, later"),
    ],
)
async def test_storage_of_this_host_that_cannot_be_copied_is_told_unless_it_is_read_only(disk: str, why: str) -> None:
    shared, (lost,) = await told(f"<disk {disk}<target dev='vdb'/></disk>")
    assert shared == {} and lost.startswith("disk vdb cannot be copied: ")
    assert why in lost and "--unsafe" in lost
    assert await told(f"<disk {disk}<target dev='vdb'/><readonly/></disk>") == ({}, [])


@pytest.mark.parametrize("hosts", ["", "<host name='ceph1'/>", "<host name='ceph1'/><host name='localhost'/>"])
async def test_storage_of_a_cluster_may_stay_where_it_is(hosts: str) -> None:
    disk = f"<disk type='network'><source protocol='rbd' name='p/x'>{hosts}</source><target dev='vdb'/></disk>"
    assert await told(disk) == ({}, [])
