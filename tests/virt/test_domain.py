"""What is read in a domain's XML, and what of it is changed."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from qemu_blkmig.errors import Refused
from qemu_blkmig.virt.domain import (
    Domain,
    files_needed,
    gives_devices_back,
    image_files,
    lasting_memory,
    nvram_of,
    rewritten,
    without_secrets,
)

XML = """
<domain type='kvm' id='3'>
  <name>web1</name>
  <uuid>6f3c1f2e-3d2c-4b7e-9b0f-1d2e3f4a5b6c</uuid>
  <os><nvram template='/usr/share/OVMF/OVMF_VARS.fd'>/var/lib/libvirt/qemu/nvram/web1_VARS.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='/vm/web1.qcow2' index='2'/>
      <backingStore type='file'><format type='raw'/><source file='/vm/base.raw'/><backingStore/></backingStore>
      <target dev='vda' bus='virtio'/><alias name='virtio-disk0'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/><source dev='/dev/vg/web1'/><target dev='vdb' bus='virtio'/>
    </disk>
    {more}
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
  </devices>
</domain>
"""


def test_disks_nvram_and_tpm_are_found() -> None:
    domain = Domain.parse(XML.format(more=""))
    assert (domain.name, domain.nvram, domain.tpm) == ("web1", "/var/lib/libvirt/qemu/nvram/web1_VARS.fd", True)
    assert [(disk.target, disk.alias, disk.path, disk.format, disk.left_alone) for disk in domain.disks] == [
        ("vda", "virtio-disk0", "/vm/web1.qcow2", "qcow2", None),
        ("vdb", None, "/dev/vg/web1", "raw", None),
    ]


def test_uefi_variables_are_named_as_text_or_as_a_disk_s_image_is() -> None:
    xml = "<domain><name>web1</name><os><nvram{}</nvram></os><devices/></domain>"
    for named in (
        ">/vars.fd",
        " template='/t.fd' type='file'>\n    <source file='/vars.fd'/>\n  ",
        " type='block'><source dev='/vars.fd'/>",
    ):
        assert Domain.parse(xml.format(named)).nvram == nvram_of(xml.format(named))[1] == "/vars.fd"
        assert image_files(xml.format(named)) == {"/vars.fd"}
    assert Domain.parse(xml.format(" template='/t.fd'>")).nvram is None


@pytest.mark.parametrize(
    ("disk", "why"),
    [
        ("<disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/></disk>", "cdrom"),
        ("<disk device='floppy'><source file='/f'/><target dev='fda'/></disk>", "it is a floppy; what the guest has"),
        ("<disk device='floppy'><target dev='fda'/></disk>", "it is a floppy"),
        ("<disk type='file' device='disk'><target dev='vdc'/></disk>", "empty"),
        ("<disk type='file'><source file='/x'/><target dev='vdc'/><readonly/></disk>", "read-only"),
        ("<disk type='file'><source file='/x'/><target dev='vdc'/><shareable/></disk>", "shared"),
        ("<disk type='file'><source file='/x'/><target dev='vdc'/><transient/></disk>", "dropped"),
        ("<disk type='network'><source protocol='rbd' name='p/x'/><target dev='vdc'/></disk>", "network"),
        (
            "<disk type='dir'><source dir='/srv'/><target dev='vdc'/><readonly/></disk>",
            "a directory of this host (/srv)",
        ),
        ("<disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sdc'/></disk>", "passed through"),
    ],
)
def test_what_is_left_alone_and_why(disk: str, why: str) -> None:
    found = Domain.parse(XML.format(more=disk)).disks[-1]
    assert found.left_alone is not None
    assert why in found.left_alone


def test_only_the_named_disks_move_and_the_rest_stays_as_it_was() -> None:
    domain = Domain.parse(XML.format(more=""))
    moved = Domain.parse(rewritten(domain.xml, {"vda": "/new/web1.qcow2"}))
    assert [disk.path for disk in moved.disks] == ["/new/web1.qcow2", "/dev/vg/web1"]
    first = ElementTree.fromstring(moved.xml).find("./devices/disk")
    assert first is not None
    assert first.find("backingStore") is None
    driver = first.find("driver")
    assert driver is not None
    assert driver.get("discard") == "unmap"
    assert [child.tag for child in first] == ["driver", "source", "target", "alias"]


def test_a_file_may_become_a_block_device_and_the_other_way_round() -> None:
    text = rewritten(XML.format(more=""), {"vda": "/dev/vg/new", "vdb": "/new/b.raw"})
    kinds = [(disk.get("type"), dict(source.attrib)) for disk in ElementTree.fromstring(text).findall("./devices/disk")
             if (source := disk.find("source")) is not None]  # fmt: skip
    assert kinds == [("block", {"dev": "/dev/vg/new"}), ("file", {"file": "/new/b.raw"})]


@pytest.mark.parametrize("block", [True, False])
def test_what_is_known_of_a_path_counts_not_its_name(block: bool) -> None:
    """Block devices have links in other directories, and what lies in /dev may be a file."""
    paths = {"vda": "/srv/lun1", "vdb": "/dev/image"}
    text = rewritten(XML.format(more=""), paths, dict.fromkeys(paths.values(), block))
    kinds = {disk.get("type") for disk in ElementTree.fromstring(text).findall("./devices/disk")}
    assert kinds == {"block" if block else "file"}
    assert [disk.path for disk in Domain.parse(text).disks] == [*paths.values()]


def test_all_but_the_disks_that_move_stays_byte_for_byte() -> None:
    told = "<metadata><!-- ours --><a:x xmlns:a='urn:a' xmlns:b='urn:b' of='b:y'><![CDATA[<é>]]></a:x></metadata>"
    xml = "<?xml version='1.0' encoding='ISO-8859-1'?>\n" + XML.format(more="<disk/>").strip().replace(
        "<os>", f"{told}<os>"
    )
    text = rewritten(xml, {"vdb": "/new/é"})
    begin, end = xml.index("<disk type='block'"), xml.index("<disk/>")
    assert text.startswith(xml[xml.index("\n<domain") : begin]) and text.endswith(xml[end:])
    assert [disk.path for disk in Domain.parse(text).disks] == ["/vm/web1.qcow2", "/new/é", None]


PERSISTENT = """<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <cpu><numa><cell id='0' memAccess='shared'/><cell id='1'/></numa></cpu>
  <devices>
    <memory model='nvdimm'><source><path>/pm/a</path></source><target><node>0</node></target></memory>
    <memory model='nvdimm' access='private'><source><path>/pm/b</path></source><target><node>0</node></target></memory>
    <memory model='virtio-pmem'><source><path>/pm/c</path></source><target/></memory>
    <memory model='dimm'><target><node>0</node></target></memory>
    <pstore backend='acpi-erst'><path>/pm/d</path></pstore>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-drive'/><qemu:arg value='if=none,format=raw,file=/q/a,,b'/>
    <qemu:arg value='-blockdev'/><qemu:arg value='{"driver": "file", "filename":"/q/c"}'/>
    <qemu:arg value='-hda'/><qemu:arg value='/q/d'/><qemu:arg value='virtio-blk-pci,drive=x/y'/>
  </qemu:commandline>
</domain>"""


def test_memory_that_outlasts_the_guest_is_found_and_whether_its_file_gets_what_is_written() -> None:
    found = [(each.path, each.written) for each in lasting_memory(PERSISTENT)]
    assert found == [("/pm/a", True), ("/pm/b", False), ("/pm/c", False), ("/pm/d", True)]
    common = PERSISTENT.replace("<cpu>", "<memoryBacking><access mode='shared'/></memoryBacking><cpu>")
    assert [each.written for each in lasting_memory(common)] == [True, False, True, True]


def test_files_of_lasting_memory_and_of_arguments_for_qemu_are_in_use() -> None:
    assert image_files(PERSISTENT) == {"/pm/a", "/pm/b", "/pm/c", "/pm/d", "/q/a,b", "/q/c", "/q/d"}


def test_what_a_source_says_of_the_place_stays_and_of_the_contents_where_they_are_copied_as_they_are() -> None:
    said = "<seclabel model='dac' relabel='no'/><encryption format='luks'/><slices><slice offset='0'/></slices>"
    xml = XML.format(more="").replace(
        "<source file='/vm/web1.qcow2' index='2'/>",
        f"<source file='/vm/web1.qcow2' startupPolicy='optional' index='2'>{said}</source>",
    )
    for as_they_are, stays in ((False, ["seclabel"]), (True, ["seclabel", "encryption", "slices"])):
        text = rewritten(xml, {"vda": "/new/a"}, as_they_are=as_they_are)
        source = ElementTree.fromstring(text).find("./devices/disk/source")
        assert source is not None
        assert [child.tag for child in source] == stays
        assert source.attrib == {"file": "/new/a", "startupPolicy": "optional"}


@pytest.mark.parametrize("as_they_are", [False, True])
def test_a_key_and_a_password_of_the_disk_itself_are_as_those_of_its_source(as_they_are: bool) -> None:
    said = "<auth username='a'><secret usage='b'/></auth><encryption format='luks'><secret uuid='c'/></encryption>"
    plain = XML.format(more="")
    xml = plain.replace("<target dev='vda'", f"{said}<target dev='vda'")
    assert [Domain.parse(each).disks[0].encrypted for each in (plain, xml)] == [False, True]
    moved = ElementTree.fromstring(rewritten(xml, {"vda": "/new/a"}, as_they_are=as_they_are)).find("./devices/disk")
    assert moved is not None and moved.find("auth") is None
    assert (moved.find("encryption") is not None) == as_they_are


@pytest.mark.parametrize("xml", ["<domain", "<network/>"])
def test_what_is_no_domain_is_refused(xml: str) -> None:
    with pytest.raises(Refused):
        Domain.parse(xml)


def test_a_disk_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="no disk vdz"):
        rewritten(XML.format(more=""), {"vdz": "/x"})


def test_what_is_shown_has_no_secrets_and_is_otherwise_the_same() -> None:
    xml = """<domain><devices>
    <graphics type='vnc' passwd='a&quot;b>1' port='5900' passwdValidTo='2030-01-01T00:00:00'><listen/></graphics>
    <graphics passwd = "it's" type="spice"/>
    <disk type='network'><source protocol='https' name='x'>
      <cookies><cookie name='session'>c&lt;3</cookie><cookie name='b'><![CDATA[d4]]></cookie></cookies>
    </source></disk></devices></domain>"""
    shown = without_secrets(xml)
    for secret in ("a&quot;b>1", "it's", "c&lt;3", "<![CDATA[d4]]>"):
        assert secret in xml and secret not in shown
        xml = xml.replace(secret, "***")
    assert shown == xml
    assert without_secrets(XML) == XML


def test_the_host_s_ends_of_devices_are_among_what_a_host_must_have() -> None:
    vf = "<address type='pci' domain='0x0000' bus='0x3b' slot='0x0a' function='0x1'/>"
    transient = "<teaming type='transient' persistent='ua-net'/>"
    devices = (
        "<interface type='direct'><source dev='eno1' mode='bridge'/></interface>"
        "<interface type='direct'><source network='lan' dev='eno2' mode='bridge'/></interface>"
        f"<interface type='hostdev' managed='yes'><source>{vf}</source>{transient}</interface>"
        f"<hostdev mode='subsystem' type='pci'><source>{vf.replace('3b', '3c')}</source>{transient}</hostdev>"
        f"<hostdev mode='subsystem' type='pci'><source>{vf.replace('3b', '3d')}</source></hostdev>"
        f"<hostdev mode='subsystem' type='pci'><source>{vf.replace('0x3b', 'odd')}</source>{transient}</hostdev>"
    )
    assert files_needed(f"<domain><devices>{devices}</devices></domain>") == {
        "/sys/class/net/eno1/address": "network device eno1",
        "/sys/bus/pci/devices/0000:3b:0a.1/vendor": "PCI device 0000:3b:0a.1",
        "/sys/bus/pci/devices/0000:3c:0a.1/vendor": "PCI device 0000:3c:0a.1",
    }


def test_a_guest_gives_a_device_back_where_it_is_one_of_a_pair() -> None:
    team = "<domain><devices><hostdev><teaming type='{}'/></hostdev></devices></domain>"
    assert gives_devices_back(team.format("transient")) and not gives_devices_back(team.format("persistent"))
    assert not gives_devices_back("<domain><devices/></domain>")
