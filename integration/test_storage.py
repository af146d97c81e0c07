"""Storage that fails during the copy: the message names disk and place, and the guest runs on at the source."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from integration.devices import loop_device
from integration.lab import Disk, Format, Guest, Hardware, Lab, assert_records_sound, compare_images
from integration.tool import (
    Outcome,
    arguments,
    assert_nothing_left,
    assert_runs_on,
    finish,
    give_up,
    migrate,
    run,
    start,
)
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20


@contextlib.contextmanager
def file_system_without_holes(place: Path, device: Path) -> Iterator[None]:
    """An exFAT on the device, at `place`: no file can have a hole, and fallocate(2) is not supported."""
    subprocess.run(["mkfs.exfat", device], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["mount.exfat-fuse", device, place], check=True, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@contextlib.contextmanager
def small_file_system(place: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at `place`."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def failed_at(outcome: Outcome, disk: str, verb: str, why: str) -> int:
    """Assert that the run failed by `disk` not being `verb` for the reason `why`; the offset that it tells."""
    outcome.failed(1, f"disk {disk}: the ", why, now="the guest runs at the source")
    told = re.search(rf"disk {disk}: the \w+ cannot be {verb} at offset (\d+): {why}", outcome.stderr)
    assert told, outcome.stderr
    return int(told[1])


def write_through(guest: Guest, device: str, offset: int, length: int) -> None:
    """Write to a virtio disk as the guest would, through its QEMU's monitor."""
    command = f'qemu-io -d /machine/peripheral/{device}/virtio-backend "write -P 7 {offset} {length}"'
    said = guest.execute("human-monitor-command", {"command-line": command})
    assert "error" not in said.lower(), said


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_destination_that_is_full_ends_the_migration_and_is_cleared_again(lab: Lab, format: Format) -> None:
    disk = lab.disk("disk", 16 * MIB, format, data=[(0, 12 * MIB)])
    guest = lab.boot([disk], Orders(rate=200))
    guest.wait_for_writing(more=20)
    with small_file_system(lab.target, 8 * MIB):
        outcome, _ = migrate(lab, guest, "--source-after", "keep")
        assert failed_at(outcome, "dev0", "written", "No space left on device") >= 4 * MIB
        assert "free" in outcome.stderr and "what was copied is kept at the destination" in outcome.stderr
        give_up(lab)
        assert not list(lab.target.iterdir())
    assert_runs_on(lab, guest)
    lab.guests.pop()
    outcome, arrived = migrate(lab, guest, "--verify", "full")
    outcome.succeeded()
    arrived.pause()
    assert_records_sound(arrived.disks[0], arrived.acked())
    assert_nothing_left(lab, arrived)


def test_room_that_becomes_too_small_is_warned_of_before_it_ends(lab: Lab) -> None:
    disk = lab.disk("disk", 16 * MIB, data=[(0, 12 * MIB)])
    guest = lab.boot([disk], Orders(rate=50))
    guest.wait_for_writing(more=10)
    with small_file_system(lab.target, 24 * MIB):
        process = start(arguments("copy", guest, lab.target, "--bandwidth", "1M", "--progress", "json"))
        assert process.stderr is not None
        while not (lab.target / "disk").exists() or (lab.target / "disk").stat().st_blocks == 0:
            assert process.poll() is None, process.communicate()
        filler = lab.target / "filler"
        filler.write_bytes(bytes(16 * MIB))
        while "are still to be written" not in (line := process.stderr.readline()):
            assert line, process.communicate()
        assert str(lab.target) in line and "has only" in line
        filler.unlink()
        process.terminate()
        process.communicate()
    assert_runs_on(lab, guest)


def test_a_destination_that_is_full_in_the_last_round_gives_the_guest_back(lab: Lab) -> None:
    first = lab.disk("first", 4 * MIB)
    second = lab.disk("second", 16 * MIB, data=[(0, 3 * MIB)])
    guest = lab.boot([first, second], Orders(rate=200, disks=["vda"]))
    guest.wait_for_writing(more=20)
    with small_file_system(lab.target, 11 * MIB):
        options = ("--pause-only", "--bandwidth", "2M", "--downtime", 2000000, "--progress", "json")
        process = start(arguments("migrate", guest, lab.target, *options))
        assert process.stderr is not None
        while not (lab.target / "second").exists() or (lab.target / "second").stat().st_blocks == 0:
            assert process.poll() is None, process.communicate()
        write_through(guest, "dev1", 4 * MIB, 2 * MIB)
        while '"stage":"dirty"' not in (line := process.stderr.readline()):
            assert line, process.communicate()
        write_through(guest, "dev1", 8 * MIB, 4 * MIB)
        rest = process.stderr.readlines()
        outcome = replace(finish(process), stderr="".join(rest))
        # Which disk meets the end of the room first depends on which of them a round comes to.
        why = "cannot be written at offset"
        outcome.failed(1, why, "No space left on device", now="the guest runs at the source")
        assert re.search(r"disk dev[01]: the \w+ cannot be written", outcome.stderr), outcome.stderr
        give_up(lab)
        assert not list(lab.target.iterdir())
    guest.pause()
    assert_records_sound(first, guest.acked("vda"))
    guest.resume()
    assert_nothing_left(lab, guest)


def _guest_with_a_bad_sector(lab: Lab, disk: Disk, sector: int, *, once: bool) -> Guest:
    """It writes to `disk`; a second disk, of which reading the sector fails, is there: it has no driver for that."""
    bad = lab.disk("bad", 8 * MIB, data=[(0, 8 * MIB)])
    fault = f"inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.sector={sector}"
    fault += f",inject-error.0.once={'on' if once else 'off'}"
    node = f"driver=blkdebug,node-name=faulty,image.driver=file,image.filename={bad.path},{fault}"
    extra = ("-blockdev", node, "-blockdev", "driver=raw,node-name=bad,file=faulty")
    hardware = Hardware(extra=(*extra, "-device", "nvme,serial=bad,drive=bad,id=dev-bad"))
    guest = lab.boot([disk], Orders(rate=200), hardware)
    guest.wait_for_writing(more=20)
    return guest


def test_a_sector_that_cannot_be_read_is_named_and_nothing_that_was_copied_is_thrown_away(lab: Lab) -> None:
    disk = lab.disk("disk", 4 * MIB)
    sector = 12345
    guest = _guest_with_a_bad_sector(lab, disk, sector, once=False)
    outcome = run("migrate", guest, lab.target, "--pause-only")
    assert failed_at(outcome, "dev-bad", "read", "Input/output error") == sector * 512
    assert (lab.target / "bad").exists()
    give_up(lab)
    assert not list(lab.target.iterdir())
    assert_runs_on(lab, guest)
    outcome = run("copy", guest, lab.target)
    assert failed_at(outcome, "dev-bad", "read", "Input/output error") == sector * 512
    give_up(lab)
    assert not list(lab.target.iterdir())
    assert_runs_on(lab, guest)
    run("migrate", guest, lab.target, "--pause-only", "--migrate-disks", "dev0").succeeded()
    compare_images(disk, replace(disk, path=lab.target / "disk"))


def test_a_sector_that_could_not_be_read_once_is_read_again(lab: Lab) -> None:
    disk = lab.disk("disk", 4 * MIB)
    guest = _guest_with_a_bad_sector(lab, disk, 12345, once=True)
    run("migrate", guest, lab.target, "--pause-only").succeeded()
    compare_images(disk, replace(disk, path=lab.target / "disk"))
    bad = replace(disk, path=disk.path.with_name("bad"), size=8 * MIB)
    compare_images(bad, replace(bad, path=lab.target / "bad"))


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_an_image_that_cannot_be_written_any_further_ends_the_migration_and_is_left(lab: Lab, format: Format) -> None:
    disk = lab.disk("disk", 8 * MIB, format, data=[(0, 8 * MIB)])
    guest = lab.boot([disk], Orders(rate=200))
    guest.wait_for_writing(more=20)
    subprocess.run(["qemu-img", "create", "-q", "-f", format, lab.target / "disk", str(disk.size)], check=True)
    command = arguments("migrate", guest, lab.target, "--pause-only")
    outcome = finish(start(["prlimit", f"--fsize={5 * MIB}", "--", *command]))
    outcome.failed(1, "disk dev0: the destination cannot be ", now="the guest runs at the source")
    if format == "raw":
        assert failed_at(outcome, "dev0", "written", "File too large") >= MIB
    give_up(lab)
    assert (lab.target / "disk").exists(), "it was there before"
    assert_runs_on(lab, guest)
    run("migrate", guest, lab.target, "--pause-only", "--verify", "full").succeeded()
    compare_images(disk, replace(disk, path=lab.target / "disk"))


@pytest.mark.skipif(
    not Path("/dev/fuse").exists() or shutil.which("mount.exfat-fuse") is None, reason="no exFAT can be mounted"
)
@pytest.mark.parametrize("preallocation", ["off", "falloc"])
def test_where_a_file_can_have_no_holes_zeroes_are_written(lab: Lab, tmp_path: Path, preallocation: str) -> None:
    disk = lab.disk("disk", 8 * MIB + 512, data=[(MIB, MIB), (4 * MIB, MIB)])
    options = ("--verify", "full", "--preallocation", preallocation)
    with (
        loop_device(tmp_path / "device", 64 * MIB, 512) as device,
        file_system_without_holes(lab.target, device),
    ):
        there = replace(disk, path=lab.target / "disk")
        run("copy", disk.path, lab.target, *options).succeeded()
        compare_images(disk, there)
        with disk.path.open("r+b") as file:
            file.seek(MIB + 4096)
            file.write(bytes(MIB // 2))
        subprocess.run(["fallocate", "--punch-hole", "-o", str(4 * MIB), "-l", str(MIB), disk.path], check=True)
        run("copy", disk.path, lab.target, *options).succeeded()
        compare_images(disk, there)
        assert there.path.stat().st_blocks * 512 >= disk.size
