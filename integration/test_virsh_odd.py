"""Domains and storage that are not as usual: what libvirt does not know of, devices of odd names, other definitions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from integration.devices import called, loop_device
from integration.lab import Disk
from integration.virtlab import IMAGES, VirtLab

MIB = 1 << 20
LINK = IMAGES / "odd-lun"


@pytest.fixture
def lun(virtlab: VirtLab) -> Iterator[Path]:
    """A block device of each host's own, of sectors of 4096 bytes, known by a link outside of /dev."""
    images = [virtlab.outside(IMAGES / "odd-lun.raw", far=far) for far in (False, True)]
    with loop_device(images[0], 32 * MIB, 4096) as near, loop_device(images[1], 32 * MIB, 4096) as far:
        for device, there in ((near, False), (far, True)):
            virtlab.hosts.run("ln", "-s", device, LINK, far=there)
        yield LINK
        for there in (False, True):
            virtlab.hosts.run("rm", LINK, far=there)


def test_a_disk_that_only_qemu_s_own_arguments_name_is_not_left_behind_unawares(virtlab: VirtLab, lun: Path) -> None:
    stick = virtlab.disk("odd, stick #1.raw", 16 * MIB, "raw")
    virtlab.outside(stick.path, far=False).write_bytes(random.randbytes(16 * MIB))
    own = virtlab.disk("odd-own.raw", 16 * MIB, "raw")
    more = (
        f"<disk type='file'><driver name='qemu' type='raw'/><source file='{stick.path}'/><target dev='sda' bus='usb'/>"
        f"</disk><disk type='block'><driver name='qemu' type='raw' cache='none'/><source dev='{lun}'/>"
        "<target dev='vdb' bus='virtio'/></disk>"
    )
    drive = f"file={own.path},format=raw,if=none,id=own"
    arguments = ("-drive", drive, "-device", "virtio-blk-pci,drive=own,id=owndev,bus=pcie.0,addr=0x1e")
    given = "".join(f"<qemu:arg value='{each}'/>" for each in arguments)

    def alter(xml: str) -> str:
        return xml.replace("<serial", f"{more}<serial", 1).replace("</qemu:c", f"{given}</qemu:c")

    domain = virtlab.boot(virtlab.disk("odd-root.qcow2", 64 * MIB, data=[(MIB, 8 * MIB)]), alter=alter)
    told = f"disk own ({own.path}) is none that libvirt knows of"
    virtlab.migrate(domain).failed(3, told, "--unsafe", now="nothing was touched")
    virtlab.outside(own.path, far=True).write_bytes(bytes(16 * MIB))
    result = virtlab.migrate(domain, "--unsafe", "--persistent", "--output", "json").succeeded().result
    assert {disk["name"] for disk in result["disks"]} == {"vda", "vdb", "sda"}
    ends = [virtlab.outside(stick.path, far=far).read_bytes() for far in (False, True)]
    assert ends[0] == ends[1]
    virtlab.assert_arrived(replace(domain, disks=(*domain.disks, Disk(lun, "raw", 32 * MIB))))
    virtlab.hosts.virsh("start", domain.name, far=True)
    domain.wait_for_writing(far=True)
    domain.destroy()


@pytest.fixture
def san(virtlab: VirtLab) -> Iterator[tuple[Path, str]]:
    """A block device that both hosts see, and what it is known by."""
    wwid, link = "naa.6001405abcdef0123456789abcdef012", IMAGES / "odd-san"
    image = virtlab.outside(IMAGES / "odd-san.raw", far=False)
    with loop_device(image, 32 * MIB, 512) as device, called(virtlab.hosts, device, wwid):
        for far in (False, True):
            virtlab.hosts.run("ln", "-s", device, link, far=far)
        yield link, f"device/wwid {wwid}"
        for far in (False, True):
            virtlab.hosts.run("rm", link, far=far)


def test_a_lun_that_both_hosts_see_is_not_copied_onto_itself_but_stays_where_it_is(
    virtlab: VirtLab, san: tuple[Path, str]
) -> None:
    lun, known = san
    more = (
        f"<disk type='block'><driver name='qemu' type='raw' cache='none'/><source dev='{lun}'/>"
        "<target dev='vdb' bus='virtio'/></disk>"
    )
    root = virtlab.disk("odd-local.qcow2", 64 * MIB, data=[(MIB, 8 * MIB)])
    domain = virtlab.boot(root, alter=lambda xml: xml.replace("<serial", f"{more}<serial", 1))
    told = f"{lun} is the same device at both hosts ({known})"
    virtlab.migrate(domain).failed(3, f"disk vdb: {told}", "--migrate-disks", now="nothing was touched")
    result = virtlab.migrate(domain, "--migrate-disks", "vda", "--output", "json").succeeded().result
    assert [disk["name"] for disk in result["disks"]] == ["vda"]
    assert f"disk vdb is left alone: it is not chosen by --migrate-disks; {told}" in result["warnings"]
    virtlab.assert_arrived(replace(domain, disks=(*domain.disks, Disk(lun, "raw", 32 * MIB))))
    domain.destroy()


def test_the_definition_keeps_an_image_of_its_own_and_metadata_byte_for_byte(virtlab: VirtLab) -> None:
    disk = virtlab.disk("odd-now.raw", 32 * MIB, "raw", data=[(MIB, MIB)])
    domain = virtlab.boot(disk)
    following: Disk = virtlab.disk("odd-next.qcow2", 32 * MIB)
    metadata = '<a:x xmlns:a="urn:a" xmlns:b="urn:b" of="b:y"><![CDATA[<y>]]></a:x>'
    xml = virtlab.hosts.virsh("dumpxml", "--inactive", domain.name).replace(str(disk.path), str(following.path))
    xml = xml.replace("type='raw'", "type='qcow2'", 1).replace("<memory", f"<metadata>{metadata}</metadata><memory", 1)
    given = virtlab.hosts.near / "next.xml"
    given.write_text(xml)
    virtlab.hosts.virsh("define", given)
    virtlab.hosts.virsh("autostart", domain.name)
    told = virtlab.migrate(domain, "--persistent", "--undefinesource", "--output", "json").succeeded()
    warnings = "\n".join(told.result["warnings"])
    assert f"disk vda: the definition has another image than the running domain, {following.path}" in warnings
    assert f"{following.path} is not there at the destination; --persistent-xml can name another" in warnings
    assert f"autostart {domain.name}" in warnings and "--disable" not in warnings
    defined = virtlab.hosts.virsh("dumpxml", "--inactive", domain.name, far=True)
    assert metadata in defined
    assert f"<driver name='qemu' type='qcow2'/>\n      <source file='{following.path}'/>" in defined
    virtlab.assert_arrived(domain)
    domain.destroy()
