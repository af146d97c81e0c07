"""Where the images of a libvirt domain go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from qemu_blkmig.destination.protocol import Files, FilesReply
from qemu_blkmig.errors import Refused
from qemu_blkmig.job.arrangement import identified, image_paths, left_to_chance
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.virt.domain import Domain


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


def test_a_volume_whose_path_the_xml_does_not_say_is_refused() -> None:
    xml = "<domain><devices><disk type='volume'><source pool='p'/><target dev='vda'/></disk></devices></domain>"
    with pytest.raises(Refused, match="names no file or block device"):
        image_paths(Domain.parse(xml), {})


class Confined:
    """An agent that tells of files in /ours, and refuses every request that names another."""

    async def expect(self, op: Files, _: type[FilesReply]) -> FilesReply:
        """See `AgentClient`."""
        if not all(name.startswith("/ours/") for name in op.names):
            raise Refused("out of bounds")
        return FilesReply([("file", 1, int(name.rpartition("/")[2])) for name in op.names])


async def test_a_file_out_of_a_confined_agent_s_bounds_does_not_hide_the_others() -> None:
    found = await identified(cast("AgentClient", Confined()), ["/ours/1", "/theirs/2", "/ours/3"])
    assert found == [("file", 1, 1), None, ("file", 1, 3)]


def test_a_disk_that_is_left_out_and_not_shared_is_told_and_one_left_alone_for_another_reason_is_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.raw").touch()
    domain = _domain(vda=str(tmp_path / "a.raw"), vdb="/none")
    assert [*left_to_chance(domain)] == []
    left_out = tuple(replace(disk, left_alone="it is not chosen by --migrate-disks") for disk in domain.disks)
    (told,) = left_to_chance(replace(domain, disks=left_out))
    assert told.startswith("disk vda is left out of --migrate-disks") and "--unsafe" in told
