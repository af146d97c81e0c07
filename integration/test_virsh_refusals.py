"""What virsh-blkmigrate finds out before a byte is copied, with two real libvirtd."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.hosts import ADDRESSES, PORT
from integration.lab import Disk, LabError, wait_until
from integration.tool import Outcome, finish, start
from integration.virthosts import VirtHosts
from integration.virtlab import IMAGES, VIRSH, VirtLab
from qemu_blkmig.demo.guest import Kernel

MIB = 1 << 20
UUID = "c0ffee00-1111-2222-3333-44445555666{digit}"
# No kernel: the firmware that finds nothing to boot runs on.
XML = """
<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>
  <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
  <os{chosen}>{firmware}<type arch='x86_64' machine='{machine}'>hvm</type></os><features><acpi/></features>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{image}'/><target dev='vda' bus='virtio'/>
    </disk>
    {more}
    <memballoon model='none'/>
  </devices>
</domain>
"""
QEMU = "/usr/bin/qemu-system-x86_64"


class Idle:
    """A domain of hosta's that does nothing but run."""

    def __init__(self, lab: VirtLab, digit: int, **options: object) -> None:
        self.lab = lab
        self.name, self.uuid = f"idle{digit}", UUID.format(digit=digit)
        self.disk: Disk = lab.disk(f"{self.name}.qcow2", 16 * MIB, data=[(0, MIB)])
        lab.hosts.virsh("define", self.file(**options))
        lab.hosts.virsh("start", self.name)

    def xml(self, **changes: object) -> str:
        known: dict[str, object] = {
            "name": self.name, "uuid": self.uuid, "memory": 32, "machine": "pc-q35-7.2", "emulator": QEMU,
            "chosen": "", "firmware": "", "image": self.disk.path, "more": "",
        }  # fmt: skip
        return XML.format(**{**known, **changes})

    def file(self, **changes: object) -> Path:
        """Its XML, but for these changes, on hosta."""
        path = self.lab.hosts.near / "given.xml"
        path.write_text(self.xml(**changes))
        return path

    def define_far(self, **changes: object) -> None:
        """Define it, but for these changes, on hostb."""
        path = self.lab.hosts.far / "given.xml"
        path.write_text(self.xml(**changes))
        self.lab.hosts.virsh("define", path, far=True)

    def problems(self, *options: object) -> str:
        """What a dry run says against it; one without problems ends with 0."""
        outcome = self.lab.virsh(self.name, self.lab.target, "--dry-run", "--output", "json", *options)
        told = "; ".join(outcome.result["problems"])
        assert outcome.code == (3 if told else 0), outcome
        assert outcome.result["ready"] == (not told)
        return told


@pytest.fixture(scope="module")
def lab(virt: VirtHosts, kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[VirtLab]:
    yield VirtLab(virt, kernel, initramfs)


@pytest.fixture(scope="module")
def idle(lab: VirtLab) -> Idle:
    return Idle(lab, 1)


@pytest.fixture(autouse=True)
def nothing_touched(lab: VirtLab) -> Iterator[None]:
    """hostb has no image and no domain more than before."""

    def there() -> list[object]:
        return [sorted(lab.outside(IMAGES, far=True).iterdir()), lab.hosts.domains(far=True)]

    before = there()
    yield
    assert there() == before


@pytest.fixture
def defined(lab: VirtLab) -> Iterator[list[str]]:
    """Names of domains of hostb's that are to be forgotten."""
    names: list[str] = []
    yield names
    for name in names:
        lab.hosts.virsh("undefine", name, far=True)


def test_a_domain_that_can_move_is_ready_and_its_xml_for_the_destination_is_shown(idle: Idle) -> None:
    elsewhere = "/var/lib/libvirt/images/elsewhere.qcow2"
    outcome = idle.lab.virsh(idle.name, idle.lab.target, "--persistent", "--disk", f"vda={elsewhere}", "--dry-run",
                       "--output", "json").succeeded()  # fmt: skip
    assert outcome.result["ready"]
    assert [disk["destination"] for disk in outcome.result["disks"]] == [elsewhere]
    for xml in (outcome.result["xml"], outcome.result["persistent_xml"]):
        assert elsewhere in xml and str(idle.disk.path) not in xml


def test_a_definition_that_the_destination_s_libvirt_would_not_take_is_refused(idle: Idle) -> None:
    given = ("--persistent", "--persistent-xml")
    assert idle.problems(*given, idle.file()) == ""
    address = "<address type='pci' domain='0x0000' bus='0x00' slot='0x05' function='0x0'/>"
    twice = f"<video><model type='vga'/>{address}</video><watchdog model='i6300esb'>{address}</watchdog>"
    told = idle.problems(*given, idle.file(more=twice))
    assert "would not define it as --persistent-xml says: XML error: Attempted double use of PCI Address" in told


def test_another_domain_of_that_name_or_a_renamed_one_of_that_uuid_is_in_the_way(
    idle: Idle, defined: list[str]
) -> None:
    idle.define_far(uuid=UUID.format(digit=9), image="/none")
    told = idle.problems()
    assert f"another domain called {idle.name}" in told
    assert idle.problems("--dname", "other") == ""
    # A migration says the same, and so does libvirt, but only when all is copied.
    idle.lab.virsh(idle.name, idle.lab.target).failed(3, f"another domain called {idle.name}", "--dname")
    with pytest.raises(LabError, match="already exists with uuid"):
        idle.lab.hosts.virsh("migrate", "--live", "--unsafe", idle.name, "qemu+tcp://hostb/system")
    idle.lab.hosts.virsh("undefine", idle.name, far=True)
    idle.define_far(name="renamed", image="/none")
    assert "under another name, renamed" in idle.problems()
    assert idle.problems("--dname", "renamed") == ""
    idle.lab.hosts.virsh("undefine", "renamed", far=True)
    # Its own definition, as it was left by an earlier migration, hinders nothing.
    idle.define_far()
    defined.append(idle.name)
    assert idle.problems() == ""


def test_the_image_of_another_domain_there_is_never_overwritten_though_that_does_not_run(
    idle: Idle, defined: list[str]
) -> None:
    idle.define_far(name="other", uuid=UUID.format(digit=8))
    defined.append("other")
    assert f"{idle.disk.path} is used by domain other" in idle.problems()
    other_path = "name another path there (--disk TARGET=PATH)"
    idle.lab.virsh(idle.name, idle.lab.target).failed(3, "is used by domain other", "next: mend that", other_path)
    base = IMAGES / "base-of-other.qcow2"
    for words in ((base, "16M"), ("-b", base, "-F", "qcow2", idle.disk.path)):
        idle.lab.hosts.run("qemu-img", "create", "-q", "-f", "qcow2", *words, far=True)
    told = idle.problems("--disk", f"vda={base}")
    idle.lab.hosts.run("rm", base, idle.disk.path, far=True)
    assert f"{base} is used by domain other" in told
    small = IMAGES / "small.qcow2"
    idle.lab.hosts.run("qemu-img", "create", "-q", "-f", "qcow2", small, "1M", far=True)
    outcome = idle.lab.virsh(idle.name, idle.lab.target, "--disk", f"vda={small}")
    idle.lab.hosts.run("rm", small, far=True)
    outcome.failed(3, f"{small} holds {MIB} bytes", "next: mend that", other_path)
    assert idle.problems("--disk", "vda=/var/lib/libvirt/images/free.qcow2") == ""


def test_the_uefi_variables_of_another_domain_there_are_never_overwritten(idle: Idle) -> None:
    nvram = "/var/lib/libvirt/qemu/nvram/idle_VARS.fd"
    loader = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>"
    firmware = f"{loader}<nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>{nvram}</nvram>"
    idle.define_far(name="other", uuid=UUID.format(digit=8), image="/free.qcow2", firmware=firmware)
    try:
        told = idle.problems("--xml", idle.file(firmware=firmware))
        assert f"disk UEFI variables: {nvram} is used by domain other" in told
    finally:
        idle.lab.hosts.virsh("undefine", "other", "--nvram", far=True)


def test_a_machine_type_an_emulator_a_network_and_files_that_are_not_there_are_all_told(lab: VirtLab) -> None:
    private = Path("/var/lib/libvirt/qemu-of-hosta")
    lab.outside(private, far=False).symlink_to(QEMU)
    iso = IMAGES / "hosta.iso"
    lab.outside(iso, far=False).write_bytes(bytes(2048))
    cdrom = f"<disk type='file' device='cdrom'><source file='{iso}'/><target dev='sda' bus='sata'/></disk>"
    idle = Idle(lab, 2, emulator=private, more=cdrom)
    try:
        told = idle.problems()
        assert f"Cannot check QEMU binary {private}" in told
        assert f"disk sda: {iso} is not there at the destination" in told
        network = (
            "<interface type='network'><source network='lan'/></interface>"
            "<interface type='bridge'><source bridge='br-lan'/></interface>"
            "<interface type='bridge'><source bridge='lo'/></interface>"
            "<interface type='direct'><source dev='eno9' mode='bridge'/></interface>"
            "<interface type='direct'><source dev='lo' mode='bridge'/></interface>"
        )
        told = idle.problems("--xml", idle.file(machine="pc-q35-99.0", more=network))
        assert "the machine 'pc-q35-99.0' is not supported" in told
        assert "the destination has no network lan" in told
        assert "bridge br-lan: " in told and "bridge lo: " not in told
        assert "network device eno9: " in told and "network device lo: " not in told
        assert "its disks are vda, the domain's are sda, vda" in told
        assert "its name is x" in idle.problems("--xml", idle.file(name="x"))
    finally:
        lab.hosts.virsh("destroy", idle.name)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("32768</memory>", "65536</memory>", "max memory 65536 does not match source 32768"),
        ("placement='static'>1<", "placement='static'>2<", "vCPU max 2 does not match source 1"),
        ("<target dev='vda' bus='virtio'/>", "<target dev='vda' bus='virtio'/><readonly/>", "disk access mode"),
        ("<target dev='vda' bus='virtio'/>", "<target dev='vda' bus='virtio'/><serial>x</serial>", "disk serial x"),
        ("pc-q35-7.2", "pc-q35-7.1", "machine type pc-q35-7.1 does not match"),
        ("qemu64", "qemu32", "CPU model qemu32 does not match"),
        ("<acpi/>", "<acpi/><apic/>", "feature 'apic' differs"),
        ("32768</currentMemory>", "16384</currentMemory>", None),
        ("<name>", "<title>another</title><name>", None),
    ],
)
def test_xml_that_libvirt_would_refuse_is_told_and_no_other(idle: Idle, old: str, new: str, why: str | None) -> None:
    xml = idle.lab.hosts.virsh("dumpxml", idle.name, "--migratable")
    assert old in xml
    given = idle.lab.hosts.near / "altered.xml"
    given.write_text(xml.replace(old, new, 1))
    told = idle.problems("--xml", given)
    assert (why in told and "begin with what virsh dumpxml --migratable" in told) if why else not told, told
    assert idle.lab.hosts.domains()[idle.name] == "running"
    assert "None" in idle.lab.hosts.virsh("domjobinfo", idle.name)


ASK = """
import asyncio, json, sys
from qemu_blkmig.virt.acceptance import lacks
from qemu_blkmig.virt.connection import Connection
from qemu_blkmig.virt.domain import Domain

async def ask():
    target = await Connection.open("qemu+tcp://hostb/system", "the destination's libvirt")
    domain = Domain.parse(sys.argv[1])
    return await lacks(target, domain, domain)

print(json.dumps(asyncio.run(ask())))
"""


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("qemu64", None),
        ("Skylake-Server", "the CPU is incompatible with host CPU: Host CPU does not provide required features"),
        ("Deep-Thought", "Unknown CPU model Deep-Thought"),
    ],
)
def test_a_cpu_that_the_destination_cannot_give_is_told(idle: Idle, model: str, why: str | None) -> None:
    xml = idle.xml().replace("<model>qemu64</model>", f"<model>{model}</model>")
    asked = subprocess.run([*idle.lab.entering, sys.executable, "-c", ASK, xml], check=True, stdout=subprocess.PIPE)
    told = json.loads(asked.stdout)
    assert len(told) == (why is not None)
    assert all(why is not None and why in each for each in told), told


def test_pages_labels_and_a_tpm_that_the_destination_does_not_offer_are_told(idle: Idle) -> None:
    lab = idle.lab
    tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
    devices = f"{tpm}<graphics type='vnc'/><video><model type='vga'/></video>"

    def told(xml: str) -> str:
        file = lab.hosts.near / "given.xml"
        file.write_text(xml)
        return idle.problems("--xml", file)

    def offered() -> bool:
        found = told(idle.xml(more=devices))
        assert "graphics" not in found and "video model" not in found
        return "offers no emulated TPM (is swtpm installed there?" not in found

    label = "<seclabel type='static' model='selinux'><label>system_u:system_r:svirt_t:s0:c1,c2</label></seclabel>"
    found = told(idle.xml().replace("</devices>", f"</devices>{label}"))
    assert "the destination has no security driver selinux, of which this domain has a static label" in found
    pages = "<memoryBacking><hugepages><page size='2048' unit='KiB'/></hugepages></memoryBacking><vcpu>"
    found = told(idle.xml().replace("<vcpu>", pages))
    assert "the destination has 0 free pages of 2 MiB, the guest needs 16 (" in found
    assert offered()
    lab.hosts.run("mount", "--bind", "/dev/null", "/usr/bin/swtpm", far=True)
    try:
        lab.hosts.stop_libvirtd(far=True)
        lab.hosts.start_libvirtd(far=True)
        assert not offered()
    finally:
        lab.hosts.run("umount", "/usr/bin/swtpm", far=True)
        lab.hosts.stop_libvirtd(far=True)
        lab.hosts.start_libvirtd(far=True)


def test_a_domain_with_snapshots_or_checkpoints_or_a_job_under_way_does_not_leave(lab: VirtLab) -> None:
    idle = Idle(lab, 3)
    try:
        checkpoint = lab.hosts.near / "checkpoint.xml"
        checkpoint.write_text("<domaincheckpoint><name>c1</name></domaincheckpoint>")
        lab.hosts.virsh("checkpoint-create", idle.name, checkpoint)
        assert "no domain with checkpoints, and it has 1" in idle.problems()
        lab.hosts.virsh("checkpoint-delete", idle.name, "c1")
        assert idle.problems() == ""
        lab.hosts.virsh("snapshot-create-as", idle.name, "s1", "--disk-only")
        assert "no domain with snapshots, and it has 1" in idle.problems()
        lab.hosts.virsh("snapshot-delete", idle.name, "s1", "--metadata")
        backup = lab.hosts.near / "backup.xml"
        backup.write_text(
            f"<domainbackup mode='pull'><server transport='unix' socket='{IMAGES}/pull.sock'/></domainbackup>"
        )
        lab.hosts.virsh("backup-begin", idle.name, backup)
        assert "a backup of this domain is under way" in idle.problems()
        lab.hosts.virsh("domjobabort", idle.name)
        lab.hosts.virsh("blockcopy", idle.name, "vda", IMAGES / "copy.qcow2", "--transient-job")
        assert "job" in idle.problems()
        lab.hosts.virsh("blockjob", idle.name, "vda", "--abort")
        assert idle.problems() == ""
    finally:
        lab.hosts.virsh("destroy", idle.name)


def test_the_same_libvirt_under_another_name_is_no_destination(idle: Idle) -> None:
    own = "qemu+unix:///system?socket=/run/libvirt/libvirt-sock"
    outcome = idle.lab.virsh(idle.name, own, "--agent", "local:/", "--dry-run", "--output", "json")
    assert "are the same host's libvirt" in outcome.result["problems"][0]


def test_uefi_variables_and_the_tpm_s_state_arrive(lab: VirtLab) -> None:
    for far in (False, True):
        conf = (lab.hosts.far if far else lab.hosts.near) / "libvirt" / "etc" / "qemu.conf"
        conf.write_text(conf.read_text() + 'swtpm_user = "root"\nswtpm_group = "root"\n')
        lab.hosts.stop_libvirtd(far=far)
        lab.hosts.start_libvirtd(far=far)
    nvram = Path("/var/lib/libvirt/qemu/nvram/idle4.fd")
    firmware = (
        "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>"
        f"<nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>{nvram}</nvram>"
    )
    tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
    idle = Idle(lab, 4, memory=256, firmware=firmware, more=tpm)
    template = _digest(Path("/usr/share/OVMF/OVMF_VARS_4M.fd"))
    variables = lab.outside(nvram, far=False)
    wait_until(lambda: _digest(variables) != template, "the firmware to write its variables", 120)
    _at_rest(variables)
    told = lab.virsh(idle.name, lab.target, "--persistent", "--undefinesource").succeeded()
    assert idle.name not in lab.hosts.domains()
    assert _digest(lab.outside(nvram, far=True)) == _digest(variables), told.stderr
    state = Path("/var/lib/libvirt/swtpm") / idle.uuid / "tpm2" / "tpm2-00.permall"
    assert lab.outside(state, far=True).stat().st_size > 1000
    lab.hosts.virsh("destroy", idle.name, far=True)
    lab.hosts.virsh("undefine", idle.name, "--nvram", far=True)
    for path in lab.outside(IMAGES, far=True).iterdir():
        path.unlink()


def test_a_destination_that_only_this_command_reaches_is_none_peer_to_peer(idle: Idle) -> None:
    names = idle.lab.hosts.near / "names"
    names.write_text(f"127.0.0.1 localhost\n{ADDRESSES['hostb']} hostb hostc\n")
    knowing = ["unshare", "-m", "sh", "-c", f'mount --bind {names} /etc/hosts && exec "$@"', "sh"]

    def outcome(host: str, *options: str) -> Outcome:
        words = [idle.name, f"qemu+tcp://{host}/system", "--agent", f"ssh://hostb:{PORT}", *options]
        return finish(start([*idle.lab.entering, *knowing, *VIRSH, *words]))

    for reached in (("hostc",), ("hostb", "--p2p")):
        outcome(*reached, "--dry-run").succeeded()
    outcome("hostc", "--p2p").failed(
        3, "the source's libvirt itself must reach qemu+tcp://hostc/system", now="nothing was touched"
    )
    assert idle.lab.hosts.domains()[idle.name] == "running"


def test_under_another_name_it_starts_again_with_the_uefi_variables_that_came_along(lab: VirtLab) -> None:
    idle = Idle(lab, 5, memory=256, chosen=" firmware='efi'")
    nvram = Path("/var/lib/libvirt/qemu/nvram/idle5_VARS.fd")
    assert f">{nvram}</nvram>" in lab.hosts.virsh("dumpxml", idle.name)
    lab.virsh(idle.name, lab.target, "--persistent", "--undefinesource", "--dname", "renamed").succeeded()
    lab.hosts.virsh("destroy", "renamed", far=True)
    variables = _digest(lab.outside(nvram, far=True))
    lab.hosts.virsh("start", "renamed", "--paused", far=True)
    assert f">{nvram}</nvram>" in lab.hosts.virsh("dumpxml", "renamed", far=True)
    assert _digest(lab.outside(nvram, far=True)) == variables
    lab.hosts.virsh("destroy", "renamed", far=True)
    lab.hosts.virsh("undefine", "renamed", "--nvram", far=True)
    for path in lab.outside(IMAGES, far=True).iterdir():
        path.unlink()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _at_rest(path: Path) -> None:
    """Wait until nothing has been written to it for a while."""

    def unchanged() -> bool:
        before = path.stat().st_mtime_ns
        time.sleep(3)
        return path.stat().st_mtime_ns == before

    wait_until(unchanged, "the firmware to be done", 120)
