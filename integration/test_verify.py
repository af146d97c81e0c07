"""Verified as written: an image that another process changes meanwhile is found out, mended once, or not handed over.

The other process stands for storage that does not keep what it was given: that itself cannot be made here, below the
page cache, without a device mapper.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from integration.lab import Guest, Lab, compare_images
from integration.thorough import also
from integration.tool import assert_nothing_left, assert_writes_soundly, migrate, run
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20
UNIT = 64 << 10
AT = 3 * MIB + 4321
SLOWLY = ("--bandwidth", 24, "--output", "json")
"""The first pass takes a second or so after the byte at `AT` was written; what was written is read back after it."""


@contextlib.contextmanager
def tampering(image: Path, *, times: int) -> Iterator[list[int]]:
    """Change a byte of the image as soon as it was written, so many times; a list of what it was, in the end."""
    done: list[int] = []
    stop = threading.Event()

    def tamper() -> None:
        while not stop.wait(0.001) and len(done) < times:
            with contextlib.suppress(FileNotFoundError), image.open("r+b", buffering=0) as file:
                byte = os.pread(file.fileno(), 1, AT)
                if byte and byte not in (b"\0", b"\xa5"):
                    os.pwrite(file.fileno(), b"\xa5", AT)
                    done.append(byte[0])

    thread = threading.Thread(target=tamper)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def guest(lab: Lab) -> Guest:
    """It writes to its first disk; the second one is full of data that stay as they are."""
    disks = [lab.disk("busy", 16 * MIB), lab.disk("quiet", 32 * MIB + 512, data=[(0, 32 * MIB)])]
    with disks[1].path.open("r+b") as file:
        file.seek(AT)
        file.write(b"\x5a")
    guest = lab.boot(disks, Orders(rate=100, disks=("vda",)))
    guest.wait_for_writing(more=20)
    return guest


def test_a_byte_that_changes_before_it_is_read_back_is_copied_again_and_the_guest_moves(lab: Lab, guest: Guest) -> None:
    with tampering(lab.target / "quiet", times=1) as done:
        outcome, arrived = migrate(lab, guest, *SLOWLY)
    outcome.succeeded()
    assert done == [0x5A]
    assert outcome.result["verified"] == "written"
    assert f"disk {outcome.result['disks'][1]['name']}: what was read back from the destination" in outcome.stderr
    assert f"{UNIT} bytes from offset {AT // UNIT * UNIT}" in outcome.stderr
    assert "readback" in outcome.result["phases"] and "verify" in outcome.result["phases"]
    compare_images(guest.disks[1], replace(guest.disks[1], path=lab.target / "quiet"))
    arrived.wait_for_writing(more=20)
    assert arrived.status() == "running"
    assert_nothing_left(lab, arrived)


def test_storage_that_does_not_keep_it_a_second_time_keeps_the_guest_where_it_is(lab: Lab, guest: Guest) -> None:
    with tampering(lab.target / "quiet", times=10_000) as done:
        outcome, _ = migrate(lab, guest, *SLOWLY)
    assert len(done) >= 2
    outcome.failed(5, "twice not what was written", f"offset {AT // UNIT * UNIT}", now="the guest runs at the source")
    assert_nothing_left(lab, guest)
    guest.wait_for_writing(more=20)


@pytest.mark.parametrize("command", ["migrate", *also("copy", "image")])
def test_full_comparison_mends_once_too(lab: Lab, guest: Guest, command: str) -> None:
    image, full = lab.target / "quiet", (*SLOWLY, "--verify", "full")
    with tampering(image, times=1) as done:
        if command == "migrate":
            outcome, _ = migrate(lab, guest, *full, "--source-after", "keep", "--on-stall", "pause")
        else:
            if command == "image":
                guest.kill()
            outcome = run("copy", guest if command == "copy" else guest.disks[1].path, lab.target, *full)
    assert done == [0x5A] and outcome.succeeded().result["verified"] == "full" and outcome.result["mended"] == UNIT
    assert f"what does is copied again: {UNIT} bytes from offset {AT // UNIT * UNIT}" in outcome.stderr
    compare_images(guest.disks[1], replace(guest.disks[1], path=image))


def test_full_comparison_keeps_the_guest_from_storage_that_does_not_keep_it_twice(lab: Lab, guest: Guest) -> None:
    with tampering(lab.target / "quiet", times=10_000):
        outcome, _ = migrate(lab, guest, *SLOWLY, "--verify", "full", "--on-stall", "pause")
    outcome.failed(5, f"the two sides differ, first in bytes {AT // 512 * 512} to", now="the guest runs at the source")
    assert_nothing_left(lab, guest)


def test_copies_are_verified_and_mended_too_with_a_guest_and_without(lab: Lab, guest: Guest) -> None:
    with tampering(lab.target / "quiet", times=1) as done:
        outcome = run("copy", guest, lab.target, *SLOWLY).succeeded()
    assert done == [0x5A] and outcome.result["verified"] == "written" and "copied again" in outcome.stderr
    copied = replace(guest.disks[1], path=lab.target / "quiet")
    compare_images(guest.disks[1], copied)
    assert_nothing_left(lab, guest)
    guest.kill()

    copied.path.unlink()
    with tampering(copied.path, times=1) as done:
        outcome = run("copy", guest.disks[1].path, lab.target, *SLOWLY, "--hash", "sha256").succeeded()
    assert done == [0x5A] and outcome.result["verified"] == "written" and "copied again" in outcome.stderr
    compare_images(guest.disks[1], copied)
    with tampering(copied.path, times=10_000):
        outcome = run("copy", guest.disks[1].path, lab.target, *SLOWLY)
    outcome.failed(5, "twice not what was written")


@pytest.mark.parametrize("options", [("--granularity", 512), *also((("--hash", "blake3"),), (("--verify", "none"),))])
def test_disks_left_paused_are_equal_whatever_the_unit_and_the_hash(lab: Lab, options: tuple[object, ...]) -> None:
    qcow2 = lab.disk("qcow2", 17 * MIB + 512, "qcow2", data=[(MIB, 8 * MIB)])
    guest = lab.boot([lab.disk("raw", 8 * MIB + 1536, data=[(0, MIB)]), replace(qcow2, bus="scsi")], Orders(rate=300))
    guest.wait_for_writing(more=30)
    outcome = run("migrate", guest, lab.target, "--pause-only", "--output", "json", *options).succeeded()
    assert outcome.result["verified"] == ("none" if "none" in options else "written")
    for disk in guest.disks:
        compare_images(disk, replace(disk, path=lab.target / disk.path.name))
    guest.resume()
    assert_writes_soundly(guest)


def test_overlays_with_small_clusters_are_verified_upon_the_shared_base(lab: Lab) -> None:
    base = lab.disk("base", 16 * MIB, "qcow2", data=[(0, 8 * MIB)])
    top = lab.disk("top", 16 * MIB, "qcow2", backing=base, options=("cluster_size=4096",))
    (lab.target / "base").symlink_to(base.path)
    guest = lab.boot([top], Orders(rate=200))
    guest.wait_for_writing(more=100)
    outcome, arrived = migrate(lab, guest, "--shared-base")
    (disk,) = outcome.succeeded().result["disks"]
    assert outcome.result["verified"] == "written" and disk["skipped"] > 0
    assert_writes_soundly(arrived)
    assert_nothing_left(lab, arrived)
