"""`--flatten no` for domains: the layers above a shared base arrive one by one; with two libvirtd."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from integration.hosts import PORT
from integration.lab import Disk, assert_records_sound, wait_until
from integration.network import Network
from integration.virthosts import AS_DEBIAN
from integration.virtlab import IMAGES, POOL, Domain, VirtLab, pooled_laboratory
from qemu_blkmig.demo.guest import Kernel, Orders

MIB = 1 << 20
SIZE = 64 * MIB
KEPT = ("--on-stall", "pause", "--copy-storage-inc", "--flatten", "no")
OWNED = "libvirt-qemu:kvm 600"


@pytest.fixture(scope="module")
def lab(kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[VirtLab]:
    """libvirt sees to owners, and there are pools."""
    with pooled_laboratory(AS_DEBIAN, kernel, initramfs) as made:
        yield made


@pytest.fixture
def snapshots(lab: VirtLab) -> Iterator[Domain]:
    """A guest upon base <- first <- second <- top, of which libvirt made the upper two as external snapshots."""
    base = lab.disk("base", SIZE, data=[(0, 8 * MIB)])
    first = lab.disk("first", SIZE, data=[(20 * MIB, 8 * MIB)], backing=base)
    domain = lab.boot_owned(first, orders=Orders(rate=100, span=MIB))
    for name in ("second", "top"):
        spec = f"vda,file={IMAGES / name}"
        lab.hosts.virsh("snapshot-create-as", domain.name, "--disk-only", "--no-metadata", "--diskspec", spec)
        domain.wait_for_writing(more=20)
    # Of what was written to just now nobody can tell later whether it was written to again.
    layers = [lab.outside(IMAGES / name, far=False) for name in ("first", "second")]
    wait_until(lambda: max(path.stat().st_ctime for path in layers) < time.time() - 2, "the layers to have rested")
    yield replace(domain, disks=(Disk(IMAGES / "top", "qcow2", SIZE),))
    domain.destroy()
    _clear(lab, "base", "first", "second", "top", "flat")


def _clear(lab: VirtLab, *names: str) -> None:
    """Forget these images, with what is recorded of them, and jobs."""
    lab.put_in_order()
    files = [file for name in names for file in (name, f".{name}.blkmig")]
    for folder, far in ((IMAGES, False), (IMAGES, True), (IMAGES / POOL, True)):
        for file in files:
            lab.outside(folder / file, far=far).unlink(missing_ok=True)
    lab.hosts.virsh("pool-refresh", POOL, far=True)


def _share_base(lab: VirtLab, name: str = "base", directory: Path = IMAGES) -> None:
    shutil.copyfile(lab.outside(IMAGES / name, far=False), lab.outside(directory / name, far=True))


def _chain(lab: VirtLab, image: Path) -> list[str | None]:
    """What each image of the chain at hostb names as its backing file."""
    told = lab.hosts.run("qemu-img", "info", "-U", "--backing-chain", "--output=json", image, far=True)
    return [each.get("backing-filename") for each in json.loads(told)]


def _assert_same_layer(lab: VirtLab, name: str, directory: Path = IMAGES) -> None:
    """What the layer holds itself is the same on both hosts, and QEMU's user may read it there."""
    images = [
        {"driver": "file", "filename": str(lab.outside(path, far=far))}
        for path, far in ((IMAGES / name, False), (directory / name, True))
    ]
    alone = [f"json:{json.dumps({'driver': 'qcow2', 'file': image, 'backing': None})}" for image in images]
    subprocess.run(["qemu-img", "compare", "-U", *alone], check=True, stdout=subprocess.DEVNULL)
    assert lab.owner(directory / name) == OWNED


def _assert_arrived(lab: VirtLab, domain: Domain, image: Path = IMAGES / "top") -> None:
    """It runs there alone, and has lost nothing; ended, it can be started again, if it is defined there."""
    assert domain.runs() == ["hostb"]
    domain.wait_for_writing(far=True, more=20)
    lab.hosts.virsh("destroy", domain.name, far=True)
    # What libvirt names by its whole path is not found from outside.
    flat = IMAGES / "flat"
    lab.hosts.run("qemu-img", "convert", "-O", "qcow2", image, flat, far=True)
    sound = Disk(lab.outside(flat, far=True), "qcow2", SIZE)
    assert_records_sound(sound, max(domain.acked(), domain.acked(far=True)))
    if domain.state(far=True) is not None:
        lab.hosts.virsh("start", domain.name, far=True)
        domain.wait_for_writing(far=True)


def test_external_snapshots_arrive_layer_by_layer_once_the_base_is_there(lab: VirtLab, snapshots: Domain) -> None:
    refused = lab.migrate(snapshots, *KEPT)
    refused.failed(3, "disk vda: the destination has none of its bases: ", now="nothing was touched")
    assert not {"first", "second", "top"} & {path.name for path in lab.outside(IMAGES, far=True).iterdir()}
    _share_base(lab)
    told = lab.migrate(snapshots, *KEPT, "--dry-run").succeeded()
    first, second = IMAGES / "first", IMAGES / "second"
    assert f"(--flatten no): {first} to {first}, {second} to {second}" in told.stdout
    assert not lab.outside(first, far=True).exists()

    moved = lab.migrate(snapshots, *KEPT, "--persistent", "--verbose", "--output", "json").succeeded()
    assert moved.stderr.count("is copied first, as a layer of its own") == 2
    for name in ("first", "second"):
        _assert_same_layer(lab, name)
    (disk,) = moved.result["disks"]
    assert disk["skipped"] >= 32 * MIB
    assert _chain(lab, IMAGES / "top") == [str(second), str(first), "base", None]
    live = lab.hosts.virsh("dumpxml", snapshots.name, far=True)
    sources = re.findall(r"<source file='(/var/lib/libvirt/images/[a-z]+)'", live)
    assert sources == [str(IMAGES / name) for name in ("top", "second", "first", "base")], live
    _assert_arrived(lab, snapshots)
    lab.assert_nothing_left()


def test_a_layer_whose_copy_breaks_off_goes_on_as_told_and_then_the_domain_moves(
    lab: VirtLab, snapshots: Domain
) -> None:
    _share_base(lab)
    attempt = lab.attempt(snapshots, *KEPT, "--bandwidth", "1")
    attempt.wait_copying()
    assert Network(lab.hosts).kill_connections()
    outcome = attempt.outcome()
    kept = "what was copied is kept at the destination"
    outcome.failed(1, "once resumed, this layer is there: then run the same command again", now=kept)
    assert "what stands upon this layer was not begun yet" in outcome.stderr
    assert snapshots.runs() == ["hosta"] and not lab.outside(IMAGES / "top", far=True).exists()
    lab.migrate(snapshots, *KEPT).failed(3, "a layer that is there is incomplete", now="nothing was touched")
    advised = re.search(r"qemu-blkmig resume (\w+) goes on where it was", outcome.stderr)
    assert advised is not None, outcome.stderr
    lab.tool("resume", advised[1], "--bandwidth", "1000").succeeded()
    lab.migrate(snapshots, *KEPT).succeeded()
    for name in ("first", "second"):
        _assert_same_layer(lab, name)
    assert _chain(lab, IMAGES / "top")[-2:] == ["base", None]
    _assert_arrived(lab, snapshots)
    lab.assert_nothing_left()


@pytest.fixture
def beside(lab: VirtLab) -> Iterator[Domain]:
    """A guest upon base <- middle <- upper, each named as a file beside the one above; the base is in hostb's pool."""
    base = lab.disk("base", SIZE, data=[(0, 8 * MIB)])
    middle = lab.disk("middle", SIZE, data=[(20 * MIB, 8 * MIB)], backing=base)
    upper = lab.disk("upper", SIZE, backing=middle)
    domain = lab.boot_owned(upper)
    _share_base(lab, directory=IMAGES / POOL)
    yield domain
    domain.destroy()
    _clear(lab, "base", "middle", "upper", "flat")


def test_layers_beside_an_image_come_with_it_into_a_directory_and_its_pool_knows_them(
    lab: VirtLab, beside: Domain
) -> None:
    there = IMAGES / POOL
    ends = [f"libvirt:{beside.name}", f"ssh://hostb:{PORT}{there}", "--shared-base", "--flatten", "no"]
    assert str(there / "middle") in lab.tool("check", *ends).succeeded().stdout
    lab.tool("migrate", *ends, "--downtime", 10000, "--on-stall", "pause").succeeded()
    assert {"middle", "upper"} <= set(lab.volumes())
    _assert_same_layer(lab, "middle", there)
    assert _chain(lab, there / "upper") == ["middle", "base", None]
    _assert_arrived(lab, beside, there / "upper")
    lab.assert_nothing_left()


def test_a_domain_that_does_not_run_keeps_its_layers_as_well(lab: VirtLab, beside: Domain) -> None:
    lab.hosts.virsh("destroy", beside.name)
    ends = (beside.name, lab.target, *KEPT[2:], "--offline", "--persistent", "--undefinesource", "--target-pool", POOL)
    there = IMAGES / POOL
    assert str(there / "middle") in lab.virsh(*ends, "--dry-run").succeeded().stdout
    lab.virsh(*ends).succeeded()
    assert {"base", "middle", "upper"} <= set(lab.volumes())
    assert _chain(lab, there / "upper") == ["middle", "base", None]
    for name in ("middle", "upper"):
        _assert_same_layer(lab, name, there)
    lab.hosts.virsh("start", beside.name, far=True)
    beside.wait_for_writing(far=True)
    lab.assert_nothing_left()
