"""Images and libvirt's storage at the destination: who owns them, and which pool knows them; with two libvirtd."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.virthosts import AS_DEBIAN, OWNED_BY_HAND
from integration.virtlab import IMAGES, VirtLab, pooled_laboratory
from qemu_blkmig.demo.guest import Kernel

MIB = 1 << 20
UNHURRIED = ("--on-stall", "pause")


@pytest.fixture(
    scope="module",
    params=[AS_DEBIAN, pytest.param(OWNED_BY_HAND, marks=pytest.mark.thorough)],
    ids=["dynamic", "by-hand"],
)
def lab(request: pytest.FixtureRequest, kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[VirtLab]:
    """Each way of libvirt's to see to images' owners."""
    with pooled_laboratory(request.param, kernel, initramfs) as made:
        yield made


def test_an_image_becomes_a_volume_that_qemu_s_user_owns_while_it_runs(lab: VirtLab) -> None:
    domain = lab.boot_owned(lab.disk("a.qcow2", 64 * MIB, data=[(MIB, 8 * MIB)]))
    # That its file is gone the pool has not noticed.
    lab.hosts.virsh("vol-create-as", "vm", "a.qcow2", "1M", far=True)
    lab.outside(IMAGES / "vm" / "a.qcow2", far=True).unlink()
    lab.migrate(domain, *UNHURRIED, "--target-pool", "vm").succeeded()
    image = IMAGES / "vm" / "a.qcow2"
    assert lab.volumes() == ["a.qcow2"]
    assert lab.owner(image) == "libvirt-qemu:kvm 600"
    assert "<format type='qcow2'/>" in lab.hosts.virsh("vol-dumpxml", "a.qcow2", "vm", far=True)
    lab.assert_arrived(domain, paths=[image])
    domain.destroy()
    lab.hosts.virsh("vol-delete", "a.qcow2", "vm", far=True)


@pytest.mark.parametrize("afterwards", ["rename", "delete"])
def test_what_became_of_the_source_s_image_its_pool_knows(lab: VirtLab, afterwards: str) -> None:
    domain = lab.boot_owned(lab.disk(f"vm/{afterwards}.qcow2", 64 * MIB, data=[(MIB, MIB)]))
    lab.hosts.virsh("pool-refresh", "vm")
    assert lab.volumes(far=False) == [f"{afterwards}.qcow2"]
    lab.migrate(domain, *UNHURRIED, "--source-images", afterwards).succeeded()
    left = lab.volumes(far=False)
    lab.assert_arrived(domain)
    domain.destroy()
    lab.hosts.virsh("vol-delete", f"{afterwards}.qcow2", "vm", far=True)
    for name in left:
        lab.hosts.virsh("vol-delete", name, "vm")
    assert f"{afterwards}.qcow2" not in left
    assert any(name.startswith(f"{afterwards}.qcow2.moved-") for name in left) == (afterwards == "rename")


def test_an_image_outside_of_pools_is_qemu_s_user_s_as_well(lab: VirtLab) -> None:
    domain = lab.boot_owned(lab.disk("b.raw", 64 * MIB, "raw", data=[(MIB, 8 * MIB)]))
    lab.migrate(domain, *UNHURRIED).succeeded()
    assert lab.volumes() == []
    assert lab.owner(IMAGES / "b.raw") == "libvirt-qemu:kvm 600"
    lab.assert_arrived(domain)
    domain.destroy()


def test_a_raw_image_and_an_overlay_on_a_shared_base_become_volumes(lab: VirtLab) -> None:
    base = lab.disk("base.qcow2", 64 * MIB, data=[(0, 8 * MIB)])
    shutil.copyfile(lab.outside(base.path, far=False), lab.outside(base.path, far=True))
    overlay = lab.disk("over.qcow2", 64 * MIB, data=[(20 * MIB, MIB)], backing=base)
    domain = lab.boot_owned(overlay, lab.disk("c.raw", 32 * MIB, "raw"))
    shutil.copyfile(lab.outside(base.path, far=True), lab.outside(IMAGES / "vm" / "base.qcow2", far=True))
    lab.migrate(domain, *UNHURRIED, "--target-pool", "vm", "--copy-storage-inc").succeeded()
    assert {"over.qcow2", "c.raw"} <= set(lab.volumes())
    told = lab.hosts.run("qemu-img", "info", "-U", IMAGES / "vm" / "over.qcow2", far=True)
    assert "backing file: base.qcow2" in told
    lab.assert_arrived(domain, paths=[IMAGES / "vm" / "over.qcow2", IMAGES / "vm" / "c.raw"])
    domain.destroy()
    for volume in ("over.qcow2", "c.raw"):
        lab.hosts.virsh("vol-delete", volume, "vm", far=True)


def test_after_ctrl_c_neither_the_volume_nor_its_file_is_there(lab: VirtLab) -> None:
    domain = lab.boot_owned(lab.disk("d.qcow2", 64 * MIB, data=[(0, 48 * MIB)]))
    running = lab.attempt(domain, "--target-pool", "vm", "--bandwidth", "1")
    running.wait_copying()
    assert lab.volumes() == ["d.qcow2"]
    running.signal(signal.SIGINT)
    running.outcome().failed(130, now="the incomplete images at the destination were removed")
    assert lab.volumes() == []
    assert not lab.outside(IMAGES / "vm" / "d.qcow2", far=True).exists()
    assert lab.hosts.virsh("pool-info", "vm", far=True)
    lab.assert_stayed(domain)
    domain.destroy()
    lab.assert_nothing_left()


def test_a_suspended_job_keeps_its_volume_until_it_is_cleaned_up(lab: VirtLab) -> None:
    domain = lab.boot_owned(lab.disk("e.qcow2", 64 * MIB, data=[(0, 48 * MIB)]))
    running = lab.attempt(domain, "--target-pool", "vm", "--bandwidth", "1")
    running.wait_copying()
    running.signal(signal.SIGKILL)
    running.outcome()
    job = lab.job()
    assert lab.volumes() == ["e.qcow2"]
    lab.tool("cleanup", job).succeeded()
    assert lab.volumes() == []
    assert not lab.outside(IMAGES / "vm" / "e.qcow2", far=True).exists()
    lab.assert_stayed(domain)
    domain.destroy()
    lab.assert_nothing_left()
