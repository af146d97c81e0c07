"""Domains that do not run: their images are copied, and they are defined at the destination; with two libvirtd."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.hosts import PORT
from integration.lab import Disk, LabError, wait_until
from integration.virtlab import IMAGES, Domain, VirtLab
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20
ENDS = ("--offline", "--persistent")


@pytest.fixture
def off(virtlab: VirtLab) -> Iterator[Domain]:
    """A domain with two disks that has run and does not any more."""
    disks = (
        virtlab.disk("root.qcow2", 64 * MIB, data=[(MIB, MIB), (48 * MIB, 8 * MIB)]),
        virtlab.disk("data.raw", 32 * MIB, "raw"),
    )
    domain = virtlab.boot(*disks, orders=Orders(rate=50))
    virtlab.hosts.virsh("destroy", domain.name)
    yield domain
    domain.destroy()
    for far in (False, True):
        for disk in disks:
            virtlab.outside(disk.path, far=far).unlink(missing_ok=True)


def _content(virtlab: VirtLab, disk: Disk, path: Path, *, far: bool) -> str:
    """What the guest would see."""
    raw = virtlab.hosts.near / "content"
    command = ["qemu-img", "convert", "-f", disk.format, "-O", "raw"]
    subprocess.run([*command, virtlab.outside(path, far=far), raw], check=True)
    return hashlib.sha256(raw.read_bytes()).hexdigest()


def test_a_domain_that_does_not_run_is_copied_and_defined_there_and_starts(virtlab: VirtLab, off: Domain) -> None:
    elsewhere = IMAGES / "elsewhere.raw"
    checked = virtlab.virsh(
        off.name, virtlab.target, *ENDS, "--disk", f"vdb={elsewhere}", "--dry-run", "--output", "json"
    )
    assert [disk["destination"] for disk in checked.succeeded().result["disks"]] == [
        str(off.disks[0].path),
        str(elsewhere),
    ]
    assert not virtlab.images_there(off)
    told = virtlab.virsh(
        off.name, virtlab.target, *ENDS, "--undefinesource", "--dname", "moved", "--disk", f"vdb={elsewhere}",
        "--output", "json",
    ).succeeded()  # fmt: skip
    assert {disk["name"] for disk in told.result["disks"]} == {"vda", "vdb"}
    assert told.result["guest"] == "domain moved is defined at the destination and does not run"
    assert off.state() is None
    assert virtlab.hosts.domains(far=True)["moved"] == "shut off"
    for disk, path in zip(off.disks, (off.disks[0].path, elsewhere), strict=True):
        assert _content(virtlab, disk, path, far=True) == _content(virtlab, disk, disk.path, far=False)
    xml = virtlab.hosts.virsh("dumpxml", "moved", far=True)
    assert str(elsewhere) in xml and str(off.disks[1].path) not in xml
    virtlab.hosts.virsh("start", "moved", far=True)
    off.wait_for_writing(far=True)
    virtlab.hosts.virsh("destroy", "moved", far=True)
    virtlab.hosts.virsh("undefine", "moved", far=True)
    virtlab.assert_nothing_left()


def test_one_that_is_cut_off_goes_on_where_it_is_certain(virtlab: VirtLab, off: Domain) -> None:
    images = [virtlab.outside(disk.path, far=False) for disk in off.disks]
    # Of what was written to just now nobody can tell later whether it was written to again.
    wait_until(lambda: max(path.stat().st_ctime for path in images) < time.time() - 2, "the images to have rested")
    running = virtlab.attempt(off, *ENDS, "--bandwidth", "1M")
    running.wait_event(lambda event: event.get("percent", 0) >= 50, "the data in the second half of the first disk")
    running.signal(signal.SIGKILL)
    job = virtlab.job()
    assert f"qemu-blkmig resume {job}" in running.outcome().stderr
    assert off.state(far=True) is None and len(virtlab.images_there(off)) == 2
    result = virtlab.virsh("--resume", job, "--bandwidth", "1000", "--output", "json").succeeded().result
    assert sum(disk["resumed"] for disk in result["disks"]) >= 32 * MIB
    for disk, told in zip(off.disks, result["disks"], strict=True):
        assert told["copied"] + told["zeroed"] + told["skipped"] + told["resumed"] == disk.size
        assert _content(virtlab, disk, disk.path, far=True) == _content(virtlab, disk, disk.path, far=False)
    assert off.state(far=True) == "shut off"
    virtlab.assert_nothing_left()


@pytest.mark.parametrize("way", [(), ("--p2p",)])
def test_without_undefinesource_it_stays_defined_here_and_that_is_told(
    virtlab: VirtLab, off: Domain, way: tuple[str, ...]
) -> None:
    told = virtlab.virsh(off.name, virtlab.target, *ENDS, *way).succeeded()
    assert "still defined here: start it on one host only" in told.stdout
    assert (off.state(), off.state(far=True)) == ("shut off", "shut off")


def test_a_domain_that_runs_is_not_moved_offline_nor_one_that_does_not_online(virtlab: VirtLab, off: Domain) -> None:
    virtlab.virsh(off.name, virtlab.target).failed(3, "does not run", "--offline --persistent moves one that does not")
    virtlab.virsh(off.name, virtlab.target, "--offline").failed(2, "--offline needs --persistent")
    virtlab.hosts.virsh("start", off.name)
    virtlab.virsh(off.name, virtlab.target, *ENDS).failed(3, f"domain {off.name} runs", "without --offline")
    assert not virtlab.images_there(off)


def test_one_that_libvirt_has_moved_away_does_not_overwrite_what_it_has_written_there(
    virtlab: VirtLab, off: Domain
) -> None:
    virtlab.hosts.virsh("start", off.name)
    for disk in off.disks:
        virtlab.hosts.run("qemu-img", "create", "-q", "-f", disk.format, disk.path, disk.size, far=True)
    move = ("migrate", "--unsafe", "--copy-storage-all", "--persistent")
    virtlab.hosts.virsh(*move, off.name, virtlab.target)
    off.wait_for_writing(far=True, more=20)
    virtlab.hosts.virsh("destroy", off.name, far=True)
    before = [_content(virtlab, disk, disk.path, far=True) for disk in off.disks]
    command = (off.name, virtlab.target, *ENDS)
    virtlab.virsh(*command).failed(
        3, "libvirt has moved the domain away", "--ignore-ownership", now="nothing was touched"
    )
    assert before == [_content(virtlab, disk, disk.path, far=True) for disk in off.disks]
    virtlab.virsh(*command, "--ignore-ownership").succeeded()
    assert before != [_content(virtlab, disk, disk.path, far=True) for disk in off.disks]


def test_images_onto_which_libvirt_has_moved_the_domain_stay_when_a_job_that_rests_is_given_up(
    virtlab: VirtLab, off: Domain
) -> None:
    running = virtlab.attempt(off, *ENDS, "--bandwidth", "8")
    running.wait_copying()
    running.signal(signal.SIGHUP)
    running.outcome().failed(128 + signal.SIGHUP)
    virtlab.hosts.virsh("start", off.name)
    off.wait_for_writing()
    for disk in off.disks:
        if not virtlab.outside(disk.path, far=True).exists():
            virtlab.hosts.run("qemu-img", "create", "-q", "-f", disk.format, disk.path, disk.size, far=True)
    virtlab.hosts.virsh("migrate", "--unsafe", "--copy-storage-all", "--persistent", off.name, virtlab.target)
    off.wait_for_writing(far=True, more=20)
    virtlab.hosts.virsh("destroy", off.name, far=True)
    before = [_content(virtlab, disk, disk.path, far=True) for disk in off.disks]
    told = virtlab.tool("cleanup", virtlab.job()).succeeded().stdout
    assert "what it wrote since is there alone" in told, told
    assert before == [_content(virtlab, disk, disk.path, far=True) for disk in off.disks]


def test_they_go_where_nobody_has_written_to_them(virtlab: VirtLab, off: Domain) -> None:
    running = virtlab.attempt(off, *ENDS, "--bandwidth", "8")
    running.wait_copying()
    running.signal(signal.SIGHUP)
    running.outcome().failed(128 + signal.SIGHUP)
    virtlab.tool("cleanup", virtlab.job()).succeeded()
    assert not virtlab.images_there(off)


def test_a_domain_that_is_started_meanwhile_cannot_or_is_not_defined_there(virtlab: VirtLab, off: Domain) -> None:
    running = virtlab.attempt(off, *ENDS, "--bandwidth", "1")
    running.wait_copying()
    # Its disks are held by the copy; an admin who takes them away from it may start it.
    with pytest.raises(LabError, match="lock"):
        virtlab.hosts.virsh("start", off.name)
    xml = virtlab.hosts.virsh("dumpxml", off.name)
    for number, disk in enumerate(off.disks):
        spare = IMAGES / f"spare{number}"
        xml = xml.replace(str(disk.path), str(spare))
        virtlab.hosts.run("qemu-img", "create", "-q", "-f", disk.format, spare, "64M")
    (virtlab.hosts.near / "other.xml").write_text(xml)
    virtlab.hosts.virsh("define", virtlab.hosts.near / "other.xml")
    virtlab.hosts.virsh("start", off.name)
    wait_until(lambda: off.state() == "running", "the domain", 30)
    outcome = running.outcome()
    assert outcome.code in (1, 3), outcome
    assert off.state(far=True) is None
    virtlab.hosts.virsh("destroy", off.name)


def test_an_encrypted_image_is_copied_as_it_is_with_its_key_or_not_at_all(virtlab: VirtLab, off: Domain) -> None:
    plain = virtlab.hosts.virsh("dumpxml", "--inactive", off.name)
    secret = "c0ffee00-1111-2222-3333-444455556666"
    key = f"<encryption format='luks'><secret type='passphrase' uuid='{secret}'/></encryption>"
    qcow2, raw = off.disks
    for disk, told in ((raw, f"has no secret {secret}"), (qcow2, "disk vda is encrypted within its qcow2 image")):
        file = virtlab.hosts.near / "encrypted.xml"
        file.write_text(plain.replace(f"<source file='{disk.path}'/>", f"<source file='{disk.path}'>{key}</source>"))
        virtlab.hosts.virsh("define", file)
        checked = virtlab.virsh(off.name, virtlab.target, *ENDS, "--allow-plaintext", "--dry-run", "--output", "json")
        assert told in "; ".join(checked.result["problems"])
        for xml in ("xml", "persistent_xml"):
            assert secret in checked.result[xml]


def test_a_volume_that_a_pool_knows_is_copied_too_and_a_domain_with_nothing_to_copy_is_not_moved(
    virtlab: VirtLab,
) -> None:
    """Of one that runs its QEMU tells the file; of this one nobody but the pool."""
    places = [IMAGES / name for name in ("off-file.qcow2", "off-pool/off-volume.qcow2")]
    virtlab.hosts.virsh("pool-define-as", "off", "dir", "--target", places[1].parent)
    virtlab.hosts.virsh("pool-build", "off")
    virtlab.hosts.virsh("pool-start", "off")
    virtlab.hosts.run("mkdir", places[1].parent, far=True)
    disks = [virtlab.disk(str(path.relative_to(IMAGES)), MIB, data=[(0, MIB)]) for path in places]
    sources = (("file", f"file='{disks[0].path}'"), ("volume", "pool='off' volume='off-volume.qcow2'"))
    written = "".join(
        f"<disk type='{kind}'><driver type='qcow2'/><source {source}/><target dev='vd{letter}'/></disk>"
        for letter, (kind, source) in zip("ab", sources, strict=True)
    )
    virtlab.hosts.virsh("pool-refresh", "off")
    _define_bare(virtlab, written)
    told = virtlab.virsh("off", virtlab.target, *ENDS, "--undefinesource", "--output", "json").succeeded()
    assert {disk["name"] for disk in told.result["disks"]} == {"vda", "vdb"}
    for disk in disks:
        assert _content(virtlab, disk, disk.path, far=True) == _content(virtlab, disk, disk.path, far=False)
    assert f"<source file='{disks[1].path}'/>" in virtlab.hosts.virsh("dumpxml", "off", far=True)
    virtlab.hosts.virsh("undefine", "off", far=True)
    _define_bare(virtlab, "")
    virtlab.virsh("off", virtlab.target, *ENDS).failed(
        3,
        "none of the domain's disks is to be copied: virsh migrate",
        "run virsh migrate in place of this command",
        now="nothing was touched",
    )
    virtlab.hosts.virsh("undefine", "off")
    virtlab.hosts.virsh("pool-destroy", "off")
    virtlab.hosts.virsh("pool-undefine", "off")


def _define_bare(virtlab: VirtLab, disks: str) -> None:
    file = virtlab.hosts.near / "bare.xml"
    file.write_text(
        "<domain type='qemu'><name>off</name><memory>32768</memory>"
        f"<os><type arch='x86_64'>hvm</type></os><devices>{disks}</devices></domain>"
    )
    virtlab.hosts.virsh("define", file)


def test_a_saved_state_is_not_left_behind(virtlab: VirtLab, off: Domain) -> None:
    virtlab.hosts.virsh("start", off.name)
    virtlab.hosts.virsh("managedsave", off.name)
    virtlab.virsh(off.name, virtlab.target, *ENDS, "--undefinesource").failed(
        3, "its state was saved here", now="nothing was touched"
    )
    virtlab.hosts.virsh("managedsave-remove", off.name)
    assert not virtlab.images_there(off)


@pytest.mark.parametrize("named", [">{}", " type='file'><source file='{}'/>"])
def test_uefi_variables_are_copied_and_a_tpm_with_a_state_is_refused(virtlab: VirtLab, off: Domain, named: str) -> None:
    nvram = Path("/var/lib/libvirt/qemu/nvram/off.fd")
    variables = os.urandom(528 << 10)
    virtlab.outside(nvram, far=False).write_bytes(variables)
    firmware = (
        "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>"
        f"<nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'{named.format(nvram)}</nvram>"
    )
    tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
    xml = virtlab.hosts.virsh("dumpxml", off.name).replace("</type>", f"</type>{firmware}", 1)
    file = virtlab.hosts.near / "uefi.xml"
    file.write_text(xml.replace("</devices>", f"{tpm}</devices>"))
    virtlab.hosts.virsh("define", file)
    uuid = virtlab.hosts.virsh("domuuid", off.name).strip()
    state = Path("/var/lib/libvirt/swtpm") / uuid / "tpm2" / "tpm2-00.permall"
    virtlab.outside(state, far=False).parent.mkdir(parents=True)
    virtlab.outside(state, far=False).write_bytes(b"state")
    # libvirt's URI does not tell how images get there, so --agent does.
    words = (off.name, "qemu+tcp://hostb/system", "--agent", f"ssh://hostb:{PORT}", *ENDS, "--output", "json")
    virtlab.virsh(*words).failed(3, "its TPM has a state", str(state.parent.parent))
    assert not virtlab.images_there(off)
    virtlab.outside(state, far=False).unlink()
    virtlab.outside(state, far=False).parent.rmdir()
    told = virtlab.virsh(*words).succeeded()
    assert "UEFI variables" in {disk["name"] for disk in told.result["disks"]}
    assert virtlab.outside(nvram, far=True).read_bytes() == variables
    assert off.state(far=True) == "shut off"
    for far in (False, True):
        virtlab.hosts.virsh("undefine", off.name, "--nvram", far=far)


def test_uefi_variables_that_the_definition_does_not_name_come_along_under_the_name_there(
    virtlab: VirtLab, off: Domain
) -> None:
    """libvirt 9.0 chooses the firmware at each start, and only then names the file."""
    file = virtlab.hosts.near / "efi.xml"
    file.write_text(virtlab.hosts.virsh("dumpxml", off.name).replace("<os>", "<os firmware='efi'>"))
    virtlab.hosts.virsh("define", file)
    virtlab.hosts.virsh("start", off.name, "--paused")
    virtlab.hosts.virsh("destroy", off.name)
    nvram = Path("/var/lib/libvirt/qemu/nvram")
    here = virtlab.outside(nvram / f"{off.name}_VARS.fd", far=False)
    variables = os.urandom(here.stat().st_size)
    here.write_bytes(variables)
    told = virtlab.virsh(off.name, virtlab.target, *ENDS, "--dname", "moved", "--output", "json").succeeded()
    assert "UEFI variables" in {disk["name"] for disk in told.result["disks"]}
    virtlab.hosts.virsh("start", "moved", "--paused", far=True)
    there = nvram / "moved_VARS.fd"
    assert f">{there}</nvram>" in virtlab.hosts.virsh("dumpxml", "moved", far=True)
    assert virtlab.outside(there, far=True).read_bytes() == variables
    virtlab.hosts.virsh("destroy", "moved", far=True)
    virtlab.hosts.virsh("undefine", "moved", "--nvram", far=True)
    virtlab.hosts.virsh("undefine", off.name, "--nvram")


def test_the_definition_that_is_given_for_the_destination_is_what_is_defined_there(
    virtlab: VirtLab, off: Domain
) -> None:
    file = virtlab.hosts.near / "titled.xml"
    file.write_text(virtlab.hosts.virsh("dumpxml", off.name).replace("<memory", "<title>as given</title><memory", 1))
    for option in ("--persistent-xml", "--xml"):
        virtlab.virsh(off.name, virtlab.target, *ENDS, option, file).succeeded()
        assert "<title>as given</title>" in virtlab.hosts.virsh("dumpxml", off.name, far=True)
        virtlab.hosts.virsh("undefine", off.name, far=True)
        for disk in off.disks:
            virtlab.outside(disk.path, far=True).unlink()


def test_a_definition_that_libvirt_would_refuse_is_told_before_anything_is_copied(
    virtlab: VirtLab, off: Domain
) -> None:
    file = virtlab.hosts.near / "larger.xml"
    file.write_text(
        re.sub(r"(<(?:memory|currentMemory) [^>]*>)\d+<", r"\g<1>204800<", virtlab.hosts.virsh("dumpxml", off.name))
    )
    for option in ("--persistent-xml", "--xml"):
        virtlab.virsh(off.name, virtlab.target, *ENDS, "--undefinesource", option, file).failed(
            3, f"libvirt would not migrate it with the XML of {option}: ", "204800", now="nothing was touched"
        )
    assert (off.state(), off.state(far=True)) == ("shut off", None)
    assert not virtlab.images_there(off)
