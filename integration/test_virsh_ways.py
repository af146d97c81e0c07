"""Other ways to ask for a domain's migration: as a SOURCE of qemu-blkmig, by its id, with disks past ssh."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

from integration.hosts import PORT
from integration.lab import Disk
from integration.virtlab import IMAGES, Domain, VirtLab
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20


def test_a_domain_is_a_source_of_qemu_blkmig_and_its_images_go_to_the_directory(
    virtlab: VirtLab, domain: Domain
) -> None:
    there = IMAGES / "new"
    virtlab.hosts.run("mkdir", there, far=True)
    ends = [f"libvirt:{domain.name}", f"ssh://hostb:{PORT}{there}"]
    checked = virtlab.tool("check", *ends, "--output", "json").succeeded()
    image = there / domain.disks[0].path.name
    assert [disk["destination"] for disk in checked.result["disks"]] == [str(image)]
    virtlab.tool("migrate", *ends, "--downtime", 3000).succeeded()
    virtlab.assert_arrived(domain, paths=[image])
    virtlab.assert_nothing_left()


def test_a_domain_is_known_by_its_id_too_and_ram_goes_where_virsh_has_it(virtlab: VirtLab, domain: Domain) -> None:
    number = virtlab.hosts.virsh("domid", domain.name).strip()
    virtlab.virsh(
        number, "--live", virtlab.target, "--verbose", "tcp://hostb:49171", "--listen-address", "0.0.0.0"
    ).succeeded()
    virtlab.assert_arrived(domain)


def test_disks_go_past_ssh_where_that_is_asked_for(virtlab: VirtLab, domain: Domain) -> None:
    virtlab.migrate(domain, "--data", "tls://").succeeded()
    virtlab.assert_arrived(domain)


def test_an_io_error_that_stops_the_guest_ends_it_where_that_is_asked_for(virtlab: VirtLab) -> None:
    tight = IMAGES / "tight"
    virtlab.hosts.run("mkdir", tight)
    virtlab.hosts.run("mount", "-t", "tmpfs", "-o", "size=16m", "none", tight)
    try:
        virtlab.hosts.run("qemu-img", "create", "-q", "-f", "raw", tight / "t.raw", 32 * MIB)
        disks = (
            virtlab.disk("ways-large.raw", 64 * MIB, "raw", data=[(0, 48 * MIB)]),
            Disk(tight / "t.raw", "raw", 32 * MIB),
        )
        stopping = "type='raw' error_policy='stop'/>"
        domain = virtlab.boot(*disks, orders=Orders(rate=50), alter=lambda xml: xml.replace("type='raw'/>", stopping))
        elsewhere = "--disk", f"vdb={IMAGES / 'ways-t.raw'}"
        running = virtlab.attempt(domain, "--abort-on-error", "--bandwidth", "1", *elsewhere)
        running.wait_copying()
        virtlab.hosts.run("sh", "-c", f"cat /dev/zero > {tight}/fill || true")
        running.outcome().failed(1, "stopped by an I/O error", now="the guest is at the source, paused")
        assert not virtlab.images_there(domain)
        domain.destroy()
        virtlab.assert_nothing_left()
    finally:
        virtlab.hosts.run("umount", "-l", tight)


def test_disks_that_are_not_to_be_copied_are_left_alone_and_listed(virtlab: VirtLab) -> None:
    root, spare = virtlab.disk("ways-root.qcow2", 64 * MIB), virtlab.disk("ways-spare.raw", 16 * MIB, "raw")
    names = {name: IMAGES / f"ways-{name}" for name in ("iso", "fixed", "shared")}
    for path in names.values():
        for far in (False, True):
            virtlab.outside(path, far=far).write_bytes(bytes(MIB))
    virtlab.outside(spare.path, far=True).write_bytes(bytes(16 * MIB))
    more = "".join(
        f"<disk type='file' device='{device}'><driver name='qemu' type='raw'{cache}/><source file='{names[name]}'/>"
        f"<target dev='{target}' bus='{bus}'/>{mark}</disk>"
        for name, device, target, bus, mark, cache in (
            ("iso", "cdrom", "sda", "sata", "<readonly/>", ""),
            ("fixed", "disk", "vdx", "virtio", "<readonly/>", ""),
            ("shared", "disk", "vdy", "virtio", "<shareable/>", " cache='none'"),
        )
    )
    domain = virtlab.boot(root, spare, alter=lambda xml: xml.replace("<serial", f"{more}<serial", 1))
    words = (domain.name, virtlab.target, "--migrate-disks", "vda", "--unsafe", "--output", "json")
    virtlab.migrate(domain, "--migrate-disks", "vda").failed(3, "disk vdb is left out", now="nothing was touched")
    checked = virtlab.virsh(*words, "--dry-run").succeeded()
    assert {each["target"]: each["why"] for each in checked.result["left_alone"]} == {
        "sda": "it is a cdrom",
        "vdb": "it is not chosen by --migrate-disks",
        "vdx": "it is read-only",
        "vdy": "it is shared with other guests (<shareable/>)",
    }
    virtlab.virsh(domain.name, virtlab.target, "--migrate-disks", "vda,vdx").failed(
        3, "cannot be migrated", "read-only"
    )
    before = virtlab.outside(spare.path, far=True).read_bytes()
    told = virtlab.migrate(domain, "--migrate-disks", "vda", "--unsafe", "--output", "json").succeeded()
    assert [disk["name"] for disk in told.result["disks"]] == ["vda"]
    assert domain.runs() == ["hostb"]
    assert virtlab.outside(names["fixed"], far=True).read_bytes() == bytes(MIB)
    assert before == bytes(16 * MIB)
    virtlab.hosts.virsh("destroy", domain.name, far=True)
    domain.destroy()


def test_the_user_s_xml_says_where_images_go_and_what_is_defined(virtlab: VirtLab, domain: Domain) -> None:
    there, old = IMAGES / "by-xml.qcow2", str(domain.disks[0].path)
    given = virtlab.hosts.near / "for-there.xml"
    xml = virtlab.hosts.virsh("dumpxml", domain.name, "--migratable").replace(old, str(there))
    given.write_text(xml.replace("<name>", "<title>moved by XML</title><name>", 1))
    defined = virtlab.hosts.near / "defined-there.xml"
    inactive = virtlab.hosts.virsh("dumpxml", domain.name, "--migratable", "--inactive")
    defined.write_text(inactive)
    words = ("--persistent", "--xml", given, "--persistent-xml", defined)
    virtlab.migrate(domain, *words).failed(3, f"--persistent-xml says {old}, but its image will be {there}")
    defined.write_text(inactive.replace(old, str(there)).replace("<name>", "<title>defined</title><name>", 1))
    virtlab.migrate(domain, *words).succeeded()
    assert "<title>moved by XML</title>" in virtlab.hosts.virsh("dumpxml", domain.name, far=True)
    assert "<title>defined</title>" in virtlab.hosts.virsh("dumpxml", domain.name, "--inactive", far=True)
    virtlab.assert_arrived(domain, paths=[there])


def test_a_disk_that_arrives_in_plain_text_is_defined_so_whatever_the_user_s_xml_says(virtlab: VirtLab) -> None:
    """Else the domain would not start again there: its secret is not there, and its image not encrypted."""
    secret, path = "c0ffee00-1111-2222-3333-444455556666", IMAGES / "locked.luks"
    locked = ("--object", "secret,id=key,data=sesame", "-o", "key-secret=key,iter-time=10", path, "64M")
    virtlab.hosts.run("qemu-img", "create", "-q", "-f", "luks", *locked)
    file = virtlab.hosts.near / "secret.xml"
    file.write_text(f"<secret ephemeral='no' private='no'><uuid>{secret}</uuid></secret>")
    virtlab.hosts.virsh("secret-define", file)
    virtlab.hosts.virsh("secret-set-value", secret, base64.b64encode(b"sesame").decode())
    key = f"<encryption format='luks'><secret type='passphrase' uuid='{secret}'/></encryption>"
    disk = Disk(path, "raw", 64 << 20)
    domain = virtlab.boot(disk, alter=lambda xml: xml.replace(f"'{path}'/>", f"'{path}'>{key}</source>"))
    defined = virtlab.hosts.near / "defined-there.xml"
    defined.write_text(virtlab.hosts.virsh("dumpxml", domain.name, "--migratable", "--inactive"))
    words = ("--allow-plaintext", "--persistent", "--persistent-xml", defined, "--verbose")
    told = virtlab.migrate(domain, *words).succeeded()
    assert "disk vda: --persistent-xml says that its image is encrypted, but it arrives" in told.stderr
    virtlab.assert_arrived(domain)
    virtlab.hosts.virsh("start", domain.name, far=True)
    assert domain.state(far=True) == "running"
    domain.destroy()


def test_a_destination_whose_libvirt_knows_no_pools_is_moved_to_unless_one_is_named(
    virtlab: VirtLab, domain: Domain
) -> None:
    (drivers,) = Path("/usr/lib").glob("*/libvirt/connection-driver")
    without = virtlab.hosts.far / "drivers"
    shutil.copytree(drivers, without, ignore=shutil.ignore_patterns("*storage*"))
    virtlab.hosts.run("mount", "--bind", without, drivers, far=True)
    virtlab.hosts.stop_libvirtd(far=True)
    virtlab.hosts.start_libvirtd(far=True)
    try:
        why = "the destination's libvirt has no storage driver that answers"
        virtlab.migrate(domain, "--target-pool", "vm").failed(3, why, "virtstoraged", now="nothing was touched")
        virtlab.migrate(domain, "--persistent").succeeded()
        virtlab.assert_arrived(domain)
    finally:
        virtlab.hosts.stop_libvirtd(far=True)
        virtlab.hosts.run("umount", drivers, far=True)
        virtlab.hosts.start_libvirtd(far=True)
