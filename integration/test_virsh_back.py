"""A domain moves to hostb, and back: nothing that it left there, or finds there, is in its way, and no hook is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from integration.hosts import ADDRESSES, PORT, PYTHON_B, REPOSITORY, TIED
from integration.lab import LabError, assert_records_sound
from integration.thorough import also
from integration.tool import Outcome, finish, start
from integration.virthosts import AS_DEBIAN
from integration.virtlab import IMAGES, POOL, Domain, VirtLab, pooled_laboratory
from qemu_blkmig.demo.guest import Kernel

MIB = 1 << 20
OPTIONS = ("--persistent", "--undefinesource", "--target-pool", POOL, "--downtime", "10000", "--on-stall", "pause")
SSHD = """
Port {port}
PidFile none
HostKey {near}/ssh/key
AuthorizedKeysFile {near}/ssh/back.pub
StrictModes no
UsePAM no
PasswordAuthentication no
SetEnv "PYTHONPATH={repository}" "QEMU_BLKMIG_STATE_DIR={near}/state" "PATH={near}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""
SSH = """
Host hosta
    HostName {address}
    IdentityFile {far}/etc/back
    UserKnownHostsFile {far}/etc/known_hosts
    StrictHostKeyChecking yes
"""


class _BothWays:
    """hosta has an sshd, too, which hostb's root may use, and both have libvirt's hook of ours."""

    def __init__(self, lab: VirtLab) -> None:
        self.lab = lab
        hosts, near, far = lab.hosts, lab.hosts.near, lab.hosts.far
        places = {"near": near, "far": far, "port": PORT, "address": ADDRESSES["hosta"], "repository": REPOSITORY}
        key = far / "etc" / "back"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        (near / "ssh" / "back.pub").write_text(key.with_suffix(".pub").read_text())
        host_key = (near / "ssh" / "key.pub").read_text()
        (far / "etc" / "known_hosts").write_text(f"[{ADDRESSES['hosta']}]:{PORT} {host_key}")
        (far / "etc" / "ssh_config").write_text(SSH.format(**places))
        (near / "sshd_config").write_text(SSHD.format(**places))
        (near / "bin").mkdir()
        tool = near / "bin" / "qemu-blkmig"
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m qemu_blkmig "$@"\n')
        tool.chmod(0o755)
        hosts.run("mount", "--bind", far / "etc" / "ssh_config", "/etc/ssh/ssh_config", far=True)
        hosts.run("mkdir", "-p", "/run/sshd")
        command = ["/usr/sbin/sshd", "-D", "-f", near / "sshd_config", "-E", near / "sshd.log"]
        self.sshd = subprocess.Popen([*TIED, *hosts.enter, *map(str, command)])
        for far_end in (False, True):
            self.tool("hooks", "install", far=far_end)
            hosts.stop_libvirtd(far=far_end)
            hosts.start_libvirtd(far=far_end)

    def _entering(self, *, far: bool) -> list[str]:
        hosts = self.lab.hosts
        state = (hosts.far if far else hosts.near) / "state"
        enter = hosts.enter_far if far else hosts.enter
        return [*enter, "env", f"PYTHONPATH={REPOSITORY}", f"QEMU_BLKMIG_STATE_DIR={state}"]

    def tool(self, *words: object, far: bool = False) -> Outcome:
        """Run qemu-blkmig there."""
        python = PYTHON_B if far else sys.executable
        return finish(start([*self._entering(far=far), python, "-m", "qemu_blkmig", *map(str, words)])).succeeded()

    def there(self, domain: Domain, *options: object) -> Outcome:
        """From hosta to hostb."""
        return self._move(domain, "hostb", *options)

    def back(self, domain: Domain, *options: object) -> Outcome:
        """From hostb to hosta."""
        return self._move(domain, "hosta", *options)

    def _move(self, domain: Domain, to: str, *options: object) -> Outcome:
        far = to == "hosta"
        python = PYTHON_B if far else sys.executable
        words = ["-m", "qemu_blkmig.cli.virsh_blkmigrate", "--live", domain.name, f"qemu+ssh://{to}:{PORT}/system"]
        return finish(start([*self._entering(far=far), python, *words, *OPTIONS, *map(str, options)]))


@pytest.fixture(scope="module")
def ways(kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[_BothWays]:
    with pooled_laboratory(AS_DEBIAN, kernel, initramfs) as lab:
        ways = _BothWays(lab)
        try:
            yield ways
        finally:
            ways.sshd.kill()
            ways.sshd.wait()


def is_at(domain: Domain, host: str) -> None:
    """It is there, defined, writes, and the other host knows it no more."""
    far = host == "hostb"
    assert domain.runs() == [host]
    assert domain.state(far=not far) is None
    assert "yes" in domain.lab.hosts.virsh("dominfo", domain.name, far=far).split("Persistent:")[1].splitlines()[0]
    domain.wait_for_writing(far=far, more=20)


@pytest.mark.parametrize("afterwards", ["keep", *also("rename", "delete")])
def test_a_domain_moves_there_and_back_and_there_again(ways: _BothWays, afterwards: str) -> None:
    lab, virsh = ways.lab, ways.lab.hosts.virsh
    name = f"{afterwards}.qcow2"
    image = IMAGES / POOL / name
    domain = lab.boot_owned(lab.disk(f"{POOL}/{name}", 64 * MIB, data=[(MIB, 8 * MIB)]))
    virsh("pool-refresh", POOL)
    definition = lab.hosts.near / "defined.xml"
    definition.write_text(virsh("dumpxml", "--inactive", domain.name))
    ways.there(domain, "--source-images", afterwards).succeeded()
    is_at(domain, "hostb")
    assert name in lab.volumes() and (name in lab.volumes(far=False)) == (afterwards == "keep")
    virsh("define", definition)
    with pytest.raises(LabError, match="is old" if afterwards == "keep" else "No such file"):
        virsh("start", domain.name)
    told = ways.back(domain, "--source-images", afterwards).succeeded().stdout
    assert "the domain is defined at the destination already: that definition is replaced" in told
    assert ("is there already: it is overwritten" in told) == (afterwards == "keep")
    is_at(domain, "hosta")
    assert name in lab.volumes(far=False) and (name in lab.volumes()) == (afterwards == "keep")
    assert lab.owner(image, far=False).startswith("libvirt-qemu:kvm ")
    ways.tool("guard", domain.name)
    virsh("destroy", domain.name)
    disk = replace(domain.disks[0], path=lab.outside(image, far=False))
    assert_records_sound(disk, max(domain.acked(), domain.acked(far=True)))
    virsh("start", domain.name)
    domain.wait_for_writing()
    ways.there(domain, "--source-images", afterwards).succeeded()
    is_at(domain, "hostb")
    domain.destroy()
    lab.assert_nothing_left()
