"""libvirt's hook under a real libvirt, on two hosts: what starts, what does not, and what virsh says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.hosts import PYTHON_B, REPOSITORY
from integration.lab import LabError
from integration.virthosts import VirtHosts
from qemu_blkmig.destination import ownership

UUID = "c0ffee00-1111-2222-3333-44445555666"
OTHER = """#!/bin/sh
echo "$@" >> {log}
[ "$2" = migrate ] && exec sed 's/<on_crash>destroy/<on_crash>restart/'
exit 0
"""
# No kernel: what boots does not matter, and the firmware that finds nothing to boot runs on.
DOMAIN = """
<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>32</memory><vcpu>1</vcpu>
  <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{image}'/><target dev='vda' bus='virtio'/>
    </disk>
    <memballoon model='none'/>
  </devices>
</domain>
"""


class Hooked:
    """Two hosts of libvirt, both with the hook; each test takes domains and images of its own from them."""

    def __init__(self, hosts: VirtHosts) -> None:
        self.hosts = hosts
        self.calls = hosts.far / "hook.calls"
        self._count = 0
        for far in (False, True):
            if far:
                # A hook of somebody else is there before ours.
                hook = hosts.far / "libvirt" / "etc" / "hooks" / "qemu"
                hook.parent.mkdir(parents=True, exist_ok=True)
                hook.write_text(OTHER.format(log=self.calls))
                hook.chmod(0o755)
            told = self.tool("hooks", "install", far=far)
            assert ("reload" in told) == (not far), told
            # What libvirt has been told to look for counts from its next start on.
            hosts.stop_libvirtd(far=far)
            hosts.start_libvirtd(far=far)

    def state(self, *, far: bool) -> Path:
        return (self.hosts.far if far else self.hosts.near) / "state"

    def tool(self, *words: object, far: bool = False) -> str:
        return self.hosts.run(
            *self.environment(far=far), PYTHON_B if far else sys.executable, "-m", "qemu_blkmig", *words, far=far
        )

    def environment(self, *, far: bool) -> list[str]:
        return ["env", f"PYTHONPATH={REPOSITORY}", f"QEMU_BLKMIG_STATE_DIR={self.state(far=far)}"]

    def image(self, name: str, *, far: bool = False) -> str:
        path = (self.hosts.far if far else self.hosts.near) / name
        # hosta does not see hostb's folder, but from outside both can be written.
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "16M"], check=True)
        return str(path)

    def define(self, image: str, *, far: bool = False) -> tuple[str, str]:
        """A new domain with this image; its name and UUID."""
        self._count += 1
        name, uuid = f"web{self._count}", f"{UUID}{self._count:x}"
        file = (self.hosts.far if far else self.hosts.near) / f"{name}.xml"
        file.write_text(DOMAIN.format(name=name, uuid=uuid, image=image))
        self.hosts.virsh("define", file, far=far)
        return name, uuid

    def fails(self, *words: object, far: bool = False) -> str:
        """What virsh says when it fails."""
        with pytest.raises(LabError) as caught:
            self.hosts.virsh(*words, far=far)
        return str(caught.value)

    def migrate(self, name: str) -> tuple[object, ...]:
        return ("migrate", "--live", "--unsafe", "--persistent", name, "qemu+tcp://hostb/system")


@pytest.fixture(scope="module")
def hooked(virt: VirtHosts) -> Iterator[Hooked]:
    yield Hooked(virt)


def test_a_domain_that_moved_or_is_incomplete_does_not_start_and_virsh_says_why(hooked: Hooked) -> None:
    image = hooked.image("a")
    name, uuid = hooked.define(image)
    ownership.move(image, "1a2b", "vda", "hostb:/new/a", ownership.Guest(name, uuid))
    told = hooked.fails("start", name)
    assert f"disk vda: {image} is old: job 1a2b moved domain {name} away to hostb:/new/a" in told
    record = str(ownership.path_of(image))
    assert f"start {name} on hostb" in told and f"rm '{record}'" in told
    assert hooked.hosts.domains()[name] == "shut off"
    with pytest.raises(LabError, match="is old"):
        hooked.tool("guard", uuid)
    ownership.announce(image, "1a2b", "vda", "hostc:/old/a")
    assert "is incomplete: job 1a2b was filling it from hostc:/old/a" in hooked.fails("start", name)
    assert "is incomplete" in hooked.fails("create", hooked.hosts.near / f"{name}.xml")
    ownership.complete(image, "1a2b")
    hooked.tool("guard", name)
    hooked.hosts.virsh("start", name)
    # What runs already goes on when libvirt starts anew, whatever is recorded.
    ownership.move(image, "1a2b", "vda", "hostb:/new/a")
    hooked.hosts.stop_libvirtd(far=False)
    hooked.hosts.start_libvirtd(far=False)
    assert hooked.hosts.domains()[name] == "running"
    hooked.hosts.virsh("destroy", name)


def test_the_incomplete_base_of_a_whole_image_is_found(hooked: Hooked) -> None:
    base, image = hooked.image("base"), str(hooked.hosts.near / "top")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image], check=True)
    name, _ = hooked.define(image)
    ownership.announce(base, "1a2b", "vda", "hostc:/old/base")
    assert f"{base} is incomplete" in hooked.fails("start", name)
    assert hooked.hosts.domains()[name] == "shut off"


def test_a_volume_of_a_pool_is_found(hooked: Hooked) -> None:
    pool = hooked.hosts.near / "pool"
    pool.mkdir()
    image = hooked.image("pool/v")
    hooked.hosts.virsh("pool-create-as", "images", "dir", "--target", pool)
    name, _ = hooked.define(image)
    file = hooked.hosts.near / f"{name}.xml"
    text = file.read_text().replace("type='file'", "type='volume'")
    file.write_text(text.replace(f"file='{image}'", "pool='images' volume='v'"))
    hooked.hosts.virsh("define", file)
    ownership.move(image, "1a2b", "vda", "hostb:/new/v")
    assert f"{image} is old" in hooked.fails("start", name)
    ownership.remove(image)
    hooked.hosts.virsh("start", name)
    hooked.hosts.virsh("destroy", name)


def test_only_the_job_s_migration_starts_on_its_incomplete_image_where_the_job_wants_it(hooked: Hooked) -> None:
    hosts = hooked.hosts
    image = hooked.image("m")
    name, uuid = hooked.define(image)
    hosts.virsh("start", name)
    new = hooked.image("new's & image", far=True)
    ownership.announce(new, "1a2b", "vda", f"hosta:{image}")
    # Without a word of the job the domain comes as it is: to images that are not there.
    hooked.fails(*hooked.migrate(name))
    assert hosts.domains()[name] == "running" and name not in hosts.domains(far=True)

    twin = DOMAIN.format(name=name, uuid=uuid, image=new.replace("&", "&amp;").replace("'", "&apos;"))
    (hosts.far / "twin.xml").write_text(twin)
    words = [*hooked.environment(far=True), PYTHON_B, "-c", EXPECT, uuid, name, new]
    expecting = subprocess.Popen([*hosts.enter_far, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert expecting.stdin and expecting.stdout and expecting.stdout.readline() == b"expected\n"
    assert "is incomplete" in hooked.fails("create", hosts.far / "twin.xml", far=True)
    # That attempt has ended, and with it what was expected: the job says it before each attempt of its own.
    assert hooked.calls.read_text().splitlines()[-1].startswith(f"{name} release end")
    expecting.stdin.write(b"again\n")
    expecting.stdin.flush()
    assert expecting.stdout.readline() == b"expected\n"
    hosts.virsh(*hooked.migrate(name))
    expecting.stdin.close()
    assert expecting.wait(20) == 0
    assert hosts.domains(far=True)[name] == "running" and hosts.domains()[name] == "shut off"
    xml = hosts.virsh("dumpxml", name, far=True)
    assert "new&apos;s &amp; image" in xml and image not in xml
    # What the other hook did to it is in it, too.
    assert "<on_crash>restart" in xml
    assert [line.split()[1] for line in hooked.calls.read_text().splitlines()[-4:]] == [
        "migrate", "prepare", "start", "started",
    ]  # fmt: skip
    hosts.virsh("destroy", name, far=True)
    # What libvirt keeps of a persistent domain is the source's word: --persistent-xml rewrites that, no hook does.
    assert image in hosts.virsh("dumpxml", name, far=True)
    assert "is incomplete" in hooked.fails("create", hosts.far / "twin.xml", far=True)
    noted = json.loads(hooked.tool("status", "1a2b", "--output", "json", far=True))["libvirt"]
    assert [line.split()[1] for line in noted][-4:] == ["migrate", "prepare", "start", "started"]
    ownership.complete(new, "1a2b")
    hosts.virsh("create", hosts.far / "twin.xml", far=True)
    hosts.virsh("destroy", name, far=True)


def test_a_migration_that_fails_is_noted_and_the_domain_expected_no_more(hooked: Hooked) -> None:
    hosts = hooked.hosts
    image = hooked.image("f")
    name, uuid = hooked.define(image)
    hosts.virsh("start", name)
    gone = str(hosts.far / "not-there")
    words = [*hooked.environment(far=True), PYTHON_B, "-c", EXPECT, uuid, name, gone]
    expecting = subprocess.Popen([*hosts.enter_far, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert expecting.stdin and expecting.stdout and expecting.stdout.readline() == b"expected\n"
    assert "not-there" in hooked.fails(*hooked.migrate(name))
    expecting.stdin.close()
    assert expecting.wait(20) == 0
    assert hosts.domains()[name] == "running" and name not in hosts.domains(far=True)
    told = hooked.tool("status", "1a2b", far=True)
    assert "another host's" in told and f"release end ({name})" in told
    assert [path.suffix for path in (hooked.state(far=True) / "domains").iterdir()] == [".log"]
    hosts.virsh("destroy", name)


def test_without_the_hook_or_its_state_directory_all_is_as_libvirt_has_it(hooked: Hooked) -> None:
    image = hooked.image("n")
    name, _ = hooked.define(image)
    shutil.rmtree(hooked.state(far=False), ignore_errors=True)
    hooked.hosts.virsh("start", name)
    hooked.hosts.virsh("destroy", name)
    ownership.path_of(image).write_text("{")
    assert "cannot be read" in hooked.fails("start", name)
    assert "not installed" in hooked.tool("hooks", "remove")
    hooked.hosts.virsh("start", name)
    hooked.hosts.virsh("destroy", name)
    hooked.tool("hooks", "install", "--chain")
    assert "cannot be read" in hooked.fails("start", name)


EXPECT = """
import sys
from qemu_blkmig.destination.expecting import Expecting
from qemu_blkmig.destination.protocol import Domain, Expect
agent, (uuid, name, path) = Expecting(), sys.argv[1:]
while True:
    agent.expect(Expect(Domain(name, uuid), {"vda": path}, "hosta"), "1a2b")
    print("expected", flush=True)
    if not sys.stdin.readline():
        break
agent.end()
"""
