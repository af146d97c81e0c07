"""Migrations that succeed: every kind of disk, destination and option, with real guests that write all the time."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from integration.lab import (
    Disk,
    Format,
    Hardware,
    Lab,
    Style,
    assert_records_sound,
    compare_images,
    wait_until,
    write_random,
)
from integration.thorough import also
from integration.tool import (
    arguments,
    assert_figures_add_up,
    assert_nothing_left,
    assert_runs_on,
    assert_writes_soundly,
    finish,
    give_up,
    migrate,
    run,
    start,
)
from qemu_blkmig.demo.guest import Orders
from qemu_blkmig.destination.ownership import path_of

MIB = 1 << 20
SECTOR = 512
CLUSTER = 65536
FIRMWARE = "/usr/share/seabios/bios-256k.bin"


def allocated(disk: Disk) -> int:
    """Bytes that the image's file occupies."""
    return disk.path.stat().st_blocks * 512


@pytest.mark.parametrize(
    ("format", "style", "sizes", "options"),
    [
        ("raw", "drive", (16 * MIB + 5 * SECTOR, SECTOR), ()),
        ("qcow2", "blockdev", (17 * MIB + SECTOR, CLUSTER), ("--granularity", "1M", "--connections", 3)),
        *also(
            ("raw", "blockdev", (8 * MIB + CLUSTER, 3 * CLUSTER + SECTOR), ("--connections", 4, "--requests", 2)),
            ("qcow2", "drive", (16 * MIB, MIB - SECTOR), ("--request-size", "64k", "--granularity", 512)),
        ),
    ],
    ids=["raw-drive", "qcow2-blockdev", "raw-blockdev", "qcow2-drive"],
)
def test_a_guest_moves_with_a_virtio_and_a_scsi_disk_of_odd_sizes(
    lab: Lab, format: Format, style: Style, sizes: Sequence[int], options: Sequence[object]
) -> None:
    first = lab.disk("first", sizes[0], format, data=[(0, 3 * MIB), (7 * MIB + CLUSTER, 512 * 1024)])
    second = replace(lab.disk("second", sizes[1], format), bus="scsi")
    guest = lab.boot([first, second], Orders(writer="random", rate=400), Hardware(style=style))
    guest.wait_for_writing(more=100)
    outcome, arrived = migrate(lab, guest, "--verify", "full", "--progress", "json", *options)
    result = outcome.succeeded().result
    assert_figures_add_up(result)
    assert [disk["virtual_size"] for disk in result["disks"]] == list(sizes)
    assert result["outcome"] == "migrated" and result["verified"] == "full"
    assert result["guest"] == "the guest runs at the destination"
    assert result["serving"] == arrived.pid
    assert {"prepare", "bulk", "dirty", "ram", "switchover", "verify", "handover"} <= set(result["phases"])
    down = result["downtime"]
    assert down["total"] > 0 and down["total"] >= down["disk"] and down["ram"] >= 0
    stages = [line["stage"] for line in outcome.progress if line["event"] == "stage"]
    assert stages[0] == "prepare" and stages[-1] == "handover"
    assert not guest.running(), "the source QEMU should have quit"
    assert_writes_soundly(arrived)
    assert_nothing_left(lab, arrived)


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_with_a_shared_base_the_overlay_stays_an_overlay_and_allocates_no_more(lab: Lab, paused: bool) -> None:
    base = lab.disk("base", 32 * MIB, "qcow2", data=[(0, 20 * MIB)])
    overlay = lab.disk("overlay", 32 * MIB, "qcow2", backing=base, data=[(2 * MIB, MIB)])
    subprocess.run(["qemu-img", "rebase", "-u", "-b", base.path.name, "-F", "qcow2", overlay.path], check=True)
    shutil.copy(base.path, lab.target / base.path.name)
    guest = lab.boot([overlay], Orders(writer="random", rate=400, span=MIB))
    guest.wait_for_writing(more=100)
    if paused:
        guest.pause()
    outcome, arrived = migrate(lab, guest, "--shared-base", "--verify", "full")
    result = outcome.succeeded().result
    assert_figures_add_up(result)
    assert result["disks"][0]["skipped"] >= 8 * MIB
    told = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", arrived.disks[0].path], check=True, capture_output=True
    )
    assert json.loads(told.stdout)["backing-filename"] == base.path.name
    assert allocated(arrived.disks[0]) < 24 * MIB
    if paused:
        assert arrived.status() == "paused"
        assert result["guest"] == "the guest is paused at the destination, as it was"
        assert result["downtime"] is None
        compare_images(overlay, arrived.disks[0])
        assert allocated(arrived.disks[0]) <= allocated(overlay)
        arrived.resume()
    assert_writes_soundly(arrived)
    assert_nothing_left(lab, arrived)


def test_a_waiting_qemu_gets_its_own_images_filled_whatever_their_names_formats_and_contents(lab: Lab) -> None:
    raw = lab.disk("raw", 16 * MIB + SECTOR, data=[(MIB, 2 * MIB)])
    qcow2 = replace(lab.disk("qcow2", 8 * MIB, "qcow2", data=[(0, MIB)]), bus="scsi")
    other = lab.disk("other-name", raw.size, "qcow2", data=[(0, raw.size)], options=["cluster_size=4096"])
    another = replace(lab.disk("another-name", qcow2.size, data=[(0, qcow2.size)]), bus="scsi")
    guest = lab.boot([raw, qcow2], Orders(rate=400))
    waiting = lab.boot([other, another], Orders(rate=400), Hardware(extra=("-incoming", "defer")))
    guest.wait_for_writing(more=100)
    wait_until(lambda: waiting.status() == "inmigrate", "the destination QEMU")
    command = ("--target-qmp", waiting.qmp, "--output", "json", "--verify", "full")
    result = run("migrate", guest, lab.target, *command).succeeded().result
    assert_figures_add_up(result)
    assert [disk["destination"] for disk in result["disks"]] == [str(other.path), str(another.path)]
    assert not guest.running() and not list(lab.target.iterdir())
    assert_writes_soundly(waiting)
    assert_nothing_left(lab, waiting)


def test_images_that_are_there_already_are_overwritten_whole_and_zeroes_too(lab: Lab) -> None:
    disk = lab.disk("raw", 64 * MIB, data=[(0, MIB)])
    other = replace(lab.disk("qcow2", 16 * MIB, "qcow2", data=[(0, MIB)]), bus="scsi")
    for each in (disk, other):
        garbage = lab.target / each.path.name
        subprocess.run(["qemu-img", "create", "-q", "-f", each.format, garbage, str(each.size)], check=True)
        write_random(garbage, each.format, 0, each.size)
    guest = lab.boot([disk, other], Orders(rate=200, span=MIB))
    guest.wait_for_writing(more=50)
    outcome, arrived = migrate(lab, guest, "--verify", "full")
    assert_figures_add_up(outcome.succeeded().result)
    assert allocated(arrived.disks[0]) < 32 * MIB, "zeroes over old content should be holes"
    assert_writes_soundly(arrived)
    assert_nothing_left(lab, arrived)


def test_disks_only_leaves_the_guest_paused_with_equal_images_each_time_it_is_asked_to(lab: Lab) -> None:
    first = lab.disk("first", 64 * MIB + SECTOR, data=[(MIB, MIB)])
    second = replace(lab.disk("second", 4 * MIB, "qcow2", data=[(0, MIB)]), bus="scsi")
    guest = lab.boot([first, second], Orders(rate=400, span=MIB))
    guest.wait_for_writing(more=50)

    def copies() -> dict[str, Disk]:
        return {disk.path.name: replace(disk, path=lab.target / disk.path.name) for disk in guest.disks}

    def once(*options: object, disks: Sequence[Disk]) -> None:
        outcome = run(
            "migrate", guest, lab.target, "--pause-only", "--downtime", 5000, "--output", "json", *options
        ).succeeded()
        result = outcome.result
        assert result["guest"] == "the guest is paused at the source" and result["serving"] == guest.pid
        assert [disk["source"] for disk in result["disks"]] == [str(disk.path) for disk in disks]
        assert_figures_add_up(result)
        assert guest.status() == "paused"
        for disk in disks:
            compare_images(disk, copies()[disk.path.name])
        assert_nothing_left(lab, guest)
        guest.resume()
        assert_writes_soundly(guest)

    once("--migrate-disks", "dev1", "--granularity", "512", disks=[second])
    assert sorted(path.name for path in lab.target.iterdir()) == [path_of("second").name, "second"]
    once("--granularity", "4k", "--request-size", "64k", "--connections", "8", disks=[first, second])
    once("--migrate-disks", "dev0,dev1", "--granularity", "1M", "--chunk-size", "64k", disks=[first, second])
    for name in ("first", "second"):
        (lab.target / name).unlink()
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", lab.target / "first", str(first.size)], check=True)
    once("--target-is-zero", "--verify", "full", disks=[first, second])
    assert allocated(copies()["first"]) < 32 * MIB


def test_a_guest_that_writes_faster_than_its_disk_is_copied_is_left_or_paused_for_as_long_as_asked(lab: Lab) -> None:
    disk = lab.disk("disk", 16 * MIB)
    guest = lab.boot([disk], Orders(writer="hot"))
    guest.wait_for_writing(more=500)
    stall = ("--bandwidth", "16M", "--downtime", 20, "--max-rounds", 3)
    outcome, _ = migrate(lab, guest, *stall)
    outcome.failed(1, "after 3 rounds", "--downtime", now="the guest runs at the source")
    assert "  next: " in outcome.stderr and "--on-stall" in outcome.stderr
    give_up(lab)
    assert not list(lab.target.iterdir())
    assert_runs_on(lab, guest)
    lab.guests.pop()
    # Without --bandwidth: QEMU 7.2 under TCG damages a busy guest whose RAM takes several slow passes, by itself, too.
    pause = ("--downtime", 5, "--max-rounds", 3, "--on-stall", "pause")
    outcome, arrived = migrate(lab, guest, *pause, "--progress", "json", "--verify", "full")
    assert_figures_add_up(outcome.succeeded().result)
    assert any("--on-stall pause" in line.get("text", "") for line in outcome.progress)
    assert_writes_soundly(arrived)
    assert_nothing_left(lab, arrived)


def test_the_ram_of_an_emulated_guest_is_not_throttled_and_that_is_said(lab: Lab) -> None:
    busy, idle = lab.disk("busy", 16 * MIB), lab.disk("idle", 8 * MIB)
    guest = lab.boot([busy, idle], Orders(rate=20, disks=("vda",)))
    guest.wait_for_writing(more=20)
    guest.pause()
    shutil.copy(busy.path, lab.target / "busy")
    slow = ("--migrate-disks", "disk1", "--bandwidth", "1M", "--downtime", 1, "--progress", "json")
    outcome, arrived = migrate(lab, guest, *slow)
    notes = [line.get("text", "") for line in outcome.succeeded().progress]
    assert any("does not limit RAM" in note for note in notes)
    assert arrived.status() == "paused"
    arrived.resume()
    arrived.wait_for_writing(more=20)


def test_a_stalled_migration_told_to_wait_goes_on_until_the_guest_is_paused_and_moves_it_paused(lab: Lab) -> None:
    disk = lab.disk("disk", 16 * MIB)
    guest = lab.boot([disk], Orders(writer="hot"))
    guest.wait_for_writing(more=500)
    arrived = lab.destination(guest)
    command = ("--launch", guest.launch_command(lab.target), "--output", "json", "--progress", "json")
    stall = ("--bandwidth", "16M", "--downtime", 20, "--max-rounds", 3, "--on-stall", "wait")
    process = start(arguments("migrate", guest, lab.target, *command, *stall))
    assert process.stderr is not None
    rounds = 0
    while rounds <= 3:
        line = process.stderr.readline()
        assert line, process.communicate()
        rounds = json.loads(line).get("round", 0)
    process.send_signal(signal.SIGUSR1)
    while not (line := process.stderr.readline()).startswith("dirty"):
        assert line, process.communicate()
    assert "pending" in line and "round" in line
    guest.pause()
    result = finish(process).succeeded().result
    assert result["disks"][0]["rounds"] > 3
    assert result["guest"] == "the guest is paused at the destination, as it was"
    assert arrived.status() == "paused"
    compare_images(disk, arrived.disks[0])
    arrived.resume()
    assert_writes_soundly(arrived)
    assert_nothing_left(lab, arrived)


def test_a_source_that_is_kept_is_warned_of_and_holds_nothing_of_ours(lab: Lab) -> None:
    guest = lab.boot([lab.disk("disk", 8 * MIB)], Orders(rate=400))
    guest.wait_for_writing(more=50)
    outcome, arrived = migrate(lab, guest, "--source-after", "keep")
    result = outcome.succeeded().result
    assert any("`cont`" in warning for warning in result["warnings"])
    assert guest.running() and guest.status() == "postmigrate"
    assert_writes_soundly(arrived)
    assert_nothing_left(lab, guest)
    again, _ = migrate(lab, guest)
    again.failed(3, "it lives elsewhere now", now="what another migration left behind")


def test_a_guest_stopped_by_a_write_error_moves_stopped_and_loses_nothing_when_it_goes_on(lab: Lab) -> None:
    disk = lab.disk("disk", 8 * MIB)
    guest = lab.boot([lab.disk("idle", SECTOR)], Orders(rate=400, disks=["vdb"]), Hardware(extra=_failing_disk(disk)))
    wait_until(lambda: guest.status() == "io-error", "the write error", 90)
    launched = lab.destination(replace(guest, hardware=Hardware(extra=_plain_disk(lab.target / "disk"))))
    command = shlex.join(launched.arguments())
    outcome = run("migrate", guest, lab.target, "--launch", command, "--output", "json", "--verify", "full").succeeded()
    assert outcome.result["guest"] == "the guest is paused at the destination, as it was"
    assert launched.status() in ("io-error", "paused")
    moved = replace(disk, path=lab.target / "disk")
    compare_images(disk, moved)
    launched.resume()
    wait_until(lambda: launched.acked("vdb") > 100, "records at the destination")
    launched.pause()
    assert_records_sound(moved, launched.acked("vdb"))
    assert_nothing_left(lab, launched)


def _failing_disk(disk: Disk) -> tuple[str, ...]:
    """A second virtio disk of which one write fails, whereupon the guest is stopped."""
    fault = "inject-error.0.event=pwritev,inject-error.0.iotype=write,inject-error.0.once=on,inject-error.0.errno=5"
    file = f"image.driver=file,image.filename={disk.path}"
    return (
        *("-blockdev", f"driver=blkdebug,node-name=faulty,{file},{fault}"),
        *("-blockdev", "driver=raw,node-name=wanting,file=faulty"),
        *("-device", "virtio-blk-pci,drive=wanting,id=failing,werror=stop"),
    )


def _plain_disk(path: Path) -> tuple[str, ...]:
    return (
        *("-blockdev", f"driver=raw,node-name=wanting,file.driver=file,file.filename={path}"),
        *("-device", "virtio-blk-pci,drive=wanting,id=failing,werror=stop"),
    )


def test_a_large_sparse_disk_costs_what_its_data_costs(lab: Lab) -> None:
    disk = lab.disk("disk", 64 << 30, "qcow2", data=[(0, 4 * MIB), (40 << 30, 4 * MIB)])
    guest = lab.boot([disk], Orders(rate=400, span=4 * MIB))
    guest.wait_for_writing(more=50)
    arrived = lab.destination(guest)
    command = ("--launch", guest.launch_command(lab.target), "--output", "json")
    process = start(arguments("migrate", guest, lab.target, *command))
    found: dict[int, int] = {}
    seen: Counter[int] = Counter()
    while process.poll() is None:
        found.update(now := _most_resident(lab))
        seen.update(now.keys())
        time.sleep(0.02)
    # What was just forked, and is another program in a moment, has the name of ours.
    resident = {pid: most for pid, most in found.items() if seen[pid] > 10}
    result = finish(process).succeeded().result
    assert_figures_add_up(result)
    assert result["disks"][0]["copied"] < 512 * MIB
    assert len(resident) == 3, "coordinator, agent and watchdog"
    assert sum(resident.values()) < 150 * MIB, resident
    assert_writes_soundly(arrived)
    assert allocated(arrived.disks[0]) < 512 * MIB
    assert_nothing_left(lab, arrived)


def _most_resident(lab: Lab) -> dict[int, int]:
    """The most that each process of the tool had resident so far, in bytes, by process id."""
    found: dict[int, int] = {}
    for pid in lab.processes():
        with contextlib.suppress(OSError, StopIteration):
            if b"qemu_blkmig" in Path(f"/proc/{pid}/cmdline").read_bytes():
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                found[pid] = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return found


def test_the_firmware_s_variables_move_as_a_disk(lab: Lab) -> None:
    disk = lab.disk("disk", 8 * MIB)
    variables = lab.disk("variables", 128 * 1024, data=[(0, 4096)])
    firmware = f"if=pflash,format=raw,unit=0,readonly=on,file={FIRMWARE}"

    def hardware(path: Path) -> Hardware:
        return Hardware(extra=("-drive", firmware, "-drive", f"if=pflash,format=raw,unit=1,file={path}"))

    guest = lab.boot([disk], Orders(rate=400), hardware(variables.path))
    guest.wait_for_writing(more=50)
    arrived = lab.destination(replace(guest, hardware=hardware(lab.target / "variables")))
    command = ("--launch", shlex.join(arrived.arguments()), "--output", "json", "--verify", "full")
    result = run("migrate", guest, lab.target, *command).succeeded().result
    assert {Path(each["destination"]).name for each in result["disks"]} == {"disk", "variables"}
    compare_images(variables, replace(variables, path=lab.target / "variables"))
    assert_writes_soundly(arrived)
    assert_nothing_left(lab, arrived)
