"""Images and libvirt's storage at the destination: who owns them, and which pool knows them; with two libvirtd."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from integration.lab import Disk
from integration.virthosts import AS_DEBIAN, OWNED_BY_HAND, two_virt_hosts
from integration.virtlab import IMAGES, Domain, VirtLab
from qemu_blkmig.demo.guest import Kernel

MIB = 1 << 20
UNHURRIED = ("--on-stall", "pause")


@pytest.fixture(
    scope="module",
    params=[AS_DEBIAN, pytest.param(OWNED_BY_HAND, marks=pytest.mark.thorough)],
    ids=["dynamic", "by-hand"],
)
def lab(request: pytest.FixtureRequest, kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[VirtLab]:
    """QEMUs run as a user of their own; what they boot is copied to where that one may read it, and libvirt own it.

    Each host has copies of its own: that user's group has another number on another system.
    """
    folder = Path(tempfile.mkdtemp(prefix="blkmig-boot-", dir="/var/tmp"))
    folder.chmod(0o755)
    try:
        with two_virt_hosts(qemu_conf=request.param) as hosts:
            theirs = hosts.far / "boot"
            theirs.mkdir(mode=0o755)
            hosts.run("mount", "--bind", theirs, folder, far=True)

            def readable(path: Path) -> Path:
                for place in (folder, theirs):
                    shutil.copyfile(path, place / path.name)
                return folder / path.name

            boot = replace(kernel, image=readable(kernel.image))
            made = VirtLab(hosts, boot, lambda agent: readable(initramfs(agent)))
            for far in (False, True):
                pool = "pool-define-as", "vm", "dir", "--target", IMAGES / "vm"
                for command in (pool, ("pool-build", "vm"), ("pool-start", "vm")):
                    hosts.virsh(*command, far=far)
            yield made
    finally:
        shutil.rmtree(folder)


def _boot(lab: VirtLab, *disks: Disk) -> Domain:
    """A guest whose images are QEMU's user's, as they must be where libvirt does not see to that."""
    for disk in disks:
        lab.hosts.run("chown", "libvirt-qemu:kvm", disk.path)
    return lab.boot(*disks)


def _volumes(lab: VirtLab) -> list[str]:
    """What hostb's pool knows."""
    return [line.split()[0] for line in lab.hosts.virsh("vol-list", "vm", far=True).splitlines() if line.strip()]


def _owner(lab: VirtLab, path: Path) -> str:
    return lab.hosts.run("stat", "-c", "%U:%G %a", path, far=True).strip()


def test_an_image_becomes_a_volume_that_qemu_s_user_owns_while_it_runs(lab: VirtLab) -> None:
    domain = _boot(lab, lab.disk("a.qcow2", 64 * MIB, data=[(MIB, 8 * MIB)]))
    # That its file is gone the pool has not noticed.
    lab.hosts.virsh("vol-create-as", "vm", "a.qcow2", "1M", far=True)
    lab.outside(IMAGES / "vm" / "a.qcow2", far=True).unlink()
    lab.migrate(domain, *UNHURRIED, "--target-pool", "vm").succeeded()
    image = IMAGES / "vm" / "a.qcow2"
    assert _volumes(lab) == ["a.qcow2"]
    assert _owner(lab, image) == "libvirt-qemu:kvm 600"
    assert "<format type='qcow2'/>" in lab.hosts.virsh("vol-dumpxml", "a.qcow2", "vm", far=True)
    lab.assert_arrived(domain, paths=[image])
    domain.destroy()
    lab.hosts.virsh("vol-delete", "a.qcow2", "vm", far=True)


def test_an_image_outside_of_pools_is_qemu_s_user_s_as_well(lab: VirtLab) -> None:
    domain = _boot(lab, lab.disk("b.raw", 64 * MIB, "raw", data=[(MIB, 8 * MIB)]))
    lab.migrate(domain, *UNHURRIED).succeeded()
    assert _volumes(lab) == []
    assert _owner(lab, IMAGES / "b.raw") == "libvirt-qemu:kvm 600"
    lab.assert_arrived(domain)
    domain.destroy()


def test_a_raw_image_and_an_overlay_on_a_shared_base_become_volumes(lab: VirtLab) -> None:
    base = lab.disk("base.qcow2", 64 * MIB, data=[(0, 8 * MIB)])
    shutil.copyfile(lab.outside(base.path, far=False), lab.outside(base.path, far=True))
    overlay = lab.disk("over.qcow2", 64 * MIB, data=[(20 * MIB, MIB)], backing=base)
    domain = _boot(lab, overlay, lab.disk("c.raw", 32 * MIB, "raw"))
    shutil.copyfile(lab.outside(base.path, far=True), lab.outside(IMAGES / "vm" / "base.qcow2", far=True))
    lab.migrate(domain, *UNHURRIED, "--target-pool", "vm", "--copy-storage-inc").succeeded()
    assert {"over.qcow2", "c.raw"} <= set(_volumes(lab))
    told = lab.hosts.run("qemu-img", "info", "-U", IMAGES / "vm" / "over.qcow2", far=True)
    assert "backing file: base.qcow2" in told
    lab.assert_arrived(domain, paths=[IMAGES / "vm" / "over.qcow2", IMAGES / "vm" / "c.raw"])
    domain.destroy()
    for volume in ("over.qcow2", "c.raw"):
        lab.hosts.virsh("vol-delete", volume, "vm", far=True)


def test_after_ctrl_c_neither_the_volume_nor_its_file_is_there(lab: VirtLab) -> None:
    domain = _boot(lab, lab.disk("d.qcow2", 64 * MIB, data=[(0, 48 * MIB)]))
    running = lab.attempt(domain, "--target-pool", "vm", "--bandwidth", "1")
    running.wait_copying()
    assert _volumes(lab) == ["d.qcow2"]
    running.signal(signal.SIGINT)
    running.outcome().failed(130, now="the incomplete images at the destination were removed")
    assert _volumes(lab) == []
    assert not lab.outside(IMAGES / "vm" / "d.qcow2", far=True).exists()
    assert lab.hosts.virsh("pool-info", "vm", far=True)
    lab.assert_stayed(domain)
    domain.destroy()
    lab.assert_nothing_left()


def test_a_suspended_job_keeps_its_volume_until_it_is_cleaned_up(lab: VirtLab) -> None:
    domain = _boot(lab, lab.disk("e.qcow2", 64 * MIB, data=[(0, 48 * MIB)]))
    running = lab.attempt(domain, "--target-pool", "vm", "--bandwidth", "1")
    running.wait_copying()
    running.signal(signal.SIGKILL)
    running.outcome()
    job = lab.job()
    assert _volumes(lab) == ["e.qcow2"]
    lab.tool("cleanup", job).succeeded()
    assert _volumes(lab) == []
    assert not lab.outside(IMAGES / "vm" / "e.qcow2", far=True).exists()
    lab.assert_stayed(domain)
    domain.destroy()
    lab.assert_nothing_left()
