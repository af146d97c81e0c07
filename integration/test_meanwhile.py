"""What others do to the guest meanwhile: what changes its disks ends the migration, and the reason is told."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable

import pytest

from integration.lab import Guest, QmpError, wait_until
from integration.luck import MIB, Attempt, Bench, command
from integration.thorough import also
from integration.tool import assert_nothing_left

LIVE = ["bulk", "copied", "moving RAM"]
NODE = "disk0"


def snapshot(guest: Guest) -> None:
    target = str(guest.disks[0].path.with_suffix(".snapshot"))
    guest.execute("blockdev-snapshot-sync", {"node-name": NODE, "snapshot-file": target, "snapshot-node-name": "top"})


def take_snapshot_back(guest: Guest) -> None:
    guest.execute("block-commit", {"job-id": "back", "device": "top"})
    guest.control.wait_event("BLOCK_JOB_READY")
    guest.execute("job-complete", {"id": "back"})
    guest.control.wait_event("BLOCK_JOB_COMPLETED")
    guest.disks[0].path.with_suffix(".snapshot").unlink()


def hot_plug(guest: Guest) -> None:
    guest.execute("blockdev-add", {"driver": "null-co", "node-name": "more", "size": MIB, "read-zeroes": True})
    guest.execute("device_add", {"driver": "scsi-hd", "id": "more", "drive": "more", "bus": "scsi0.0"})


def back_up(guest: Guest) -> None:
    guest.execute("blockdev-add", {"driver": "null-co", "node-name": "backup", "size": 16 * MIB})
    job = {"job-id": "backup", "device": NODE, "target": "backup", "sync": "full", "speed": 4096}
    guest.execute("blockdev-backup", job)


def end_backup(guest: Guest) -> None:
    guest.execute("job-cancel", {"id": "backup"})
    guest.control.wait_event("BLOCK_JOB_CANCELLED")
    guest.execute("blockdev-del", {"node-name": "backup"})


def mirror(guest: Guest) -> None:
    target = str(guest.disks[0].path.with_suffix(".mirror"))
    guest.execute("drive-mirror", {"job-id": "mirror", "device": NODE, "target": target, "sync": "full", "speed": 4096})


def end_mirror(guest: Guest) -> None:
    guest.execute("block-job-cancel", {"device": "mirror", "force": True})
    guest.control.wait_event("BLOCK_JOB_CANCELLED")
    guest.disks[0].path.with_suffix(".mirror").unlink()


def export(guest: Guest) -> None:
    guest.execute("block-export-add", {"type": "nbd", "id": "theirs", "node-name": NODE, "name": "theirs"})


def end_export(guest: Guest) -> None:
    guest.execute("block-export-del", {"id": "theirs", "mode": "hard"})
    guest.execute("nbd-server-stop")


CHANGES: dict[str, tuple[Callable[[Guest], None], Callable[[Guest], None], str]] = {
    "snapshot": (snapshot, take_snapshot_back, "a snapshot was taken"),
    "backup": (back_up, end_backup, "the block job backup (backup)"),
    "mirror": (mirror, end_mirror, "the block job mirror (mirror)"),
    "export": (export, end_export, "somebody exports it (nbd export theirs)"),
}

POWERED_OFF = [("raw", "bulk"), ("quits", "copied"), ("raw", "copied"), ("quits", "moving RAM")]
OFTEN = [
    ("snapshot", "bulk"),
    ("snapshot", "paused"),
    ("backup", "copied"),
    ("mirror", "moving RAM"),
    ("export", "bulk"),
]


@pytest.mark.parametrize(
    ("change", "moment"),
    [*OFTEN, *also(*(each for each in itertools.product(CHANGES, [*LIVE, "paused"]) if each not in OFTEN))],
)
def test_what_others_do_to_a_disk_ends_the_migration(bench: Bench, change: str, moment: str) -> None:
    do, undo, reason = CHANGES[change]
    attempt = bench.attempt_at(moment)
    do(attempt.source)
    attempt.go_on()
    attempt.outcome().failed(1, reason, now="the guest runs at the source")
    undo(attempt.source)
    attempt.assert_given_up(suspended=change != "snapshot")


@pytest.mark.parametrize("change", ["backup", *also("mirror", "export")])
def test_what_was_copied_is_kept_until_a_backup_is_over(bench: Bench, change: str) -> None:
    do, undo, reason = CHANGES[change]
    attempt = bench.attempt_at("copied")
    do(attempt.source)
    attempt.go_on()
    attempt.outcome().failed(1, reason, "end: qemu-blkmig resume", now="the guest runs at the source")
    job = attempt.job()
    command("resume", job, lab=bench.lab).failed(3, reason.removeprefix("somebody "))
    attempt.source.wait_for_writing(more=20)
    undo(attempt.source)
    (disk,) = command("resume", job, "--output", "json", lab=bench.lab).succeeded().result["disks"]
    assert disk["resumed"] == disk["virtual_size"]
    attempt.assert_destination_has_it()


@pytest.mark.parametrize("moment", ["bulk", "moving RAM"])
def test_a_disk_that_is_plugged_in_ends_the_migration(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment, kind="scsi")
    try:
        hot_plug(attempt.source)
    except QmpError as error:
        assert "migrat" in str(error)
        attempt.signal(2)
        attempt.outcome()
    else:
        attempt.go_on()
        attempt.outcome().failed(1, "it was hot-plugged", now="the guest runs at the source")
        attempt.source.execute("device_del", {"id": "more"})
        attempt.source.control.wait_event("DEVICE_DELETED")
        attempt.source.execute("blockdev-del", {"node-name": "more"})
    attempt.assert_source_has_it()


@pytest.mark.parametrize("moment", ["copied", *also("bulk")])
def test_a_disk_that_is_unplugged_ends_the_migration(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment, kind="scsi")
    attempt.source.execute("device_del", {"id": "dev1"})
    attempt.source.control.wait_event("DEVICE_DELETED")
    attempt.go_on()
    attempt.outcome().failed(1, "disk dev1: it was unplugged", now="the guest runs at the source")
    assert_nothing_left(bench.lab, attempt.source)
    attempt.source.kill()


def test_a_disk_cannot_be_resized_meanwhile(bench: Bench) -> None:
    attempt = bench.attempt_at("copied")
    with pytest.raises(QmpError):
        attempt.source.execute("block_resize", {"node-name": NODE, "size": 32 * MIB})
    attempt.go_on()
    attempt.outcome().succeeded()
    attempt.assert_destination_has_it()


def test_the_bitmaps_of_others_are_left_alone(bench: Bench) -> None:
    guest = bench.guest()
    guest.execute("block-dirty-bitmap-add", {"node": NODE, "name": "theirs"})
    attempt = bench.attempt_at("copied")
    attempt.signal(2)
    attempt.outcome().failed(130, "interrupted")
    guest.execute("block-dirty-bitmap-remove", {"node": NODE, "name": "theirs"})
    attempt.assert_source_has_it()


@pytest.mark.parametrize("moment", ["moving RAM", *also("bulk", "copied")])
def test_a_guest_that_an_admin_paused_stays_paused_where_it_comes_to(bench: Bench, moment: str) -> None:
    attempt = _attempt(bench, moment)
    attempt.source.pause()
    attempt.go_on()
    outcome = attempt.outcome().succeeded()
    assert "paused at the destination" in outcome.stdout
    wait_until(lambda: not attempt.source.running(), "the end of the source QEMU")
    assert attempt.destination.status() in ("paused", "postmigrate")
    attempt.destination.resume()
    attempt.assert_destination_has_it()


@pytest.mark.parametrize("moment", ["moving RAM", *also("bulk", "copied")])
def test_a_guest_that_an_admin_paused_and_resumed_runs_where_it_comes_to(bench: Bench, moment: str) -> None:
    attempt = _attempt(bench, moment)
    if moment == "moving RAM":
        # That of a paused guest crosses in no time, and then an admin's `cont` is refused.
        attempt.source.execute("migrate-set-parameters", {"max-bandwidth": MIB})
    attempt.source.pause()
    time.sleep(0.3)
    attempt.source.resume()
    if moment == "moving RAM":
        attempt.source.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
    attempt.go_on()
    attempt.outcome().succeeded()
    attempt.assert_destination_has_it()


@pytest.mark.parametrize("moment", ["moving RAM", *also("bulk", "copied")])
def test_a_guest_that_an_admin_paused_stays_paused_when_the_migration_fails(bench: Bench, moment: str) -> None:
    attempt = _attempt(bench, moment)
    attempt.source.pause()
    time.sleep(0.3)
    attempt.signal(2)
    attempt.outcome().failed(130, now="the guest is at the source")
    assert attempt.source.status() in ("paused", "postmigrate")
    attempt.source.resume()
    attempt.assert_source_has_it()


@pytest.mark.parametrize("moment", ["moving RAM", *also("bulk", "copied")])
def test_a_guest_that_is_reset_moves_all_the_same(bench: Bench, moment: str) -> None:
    attempt = _attempt(bench, moment)
    attempt.source.execute("system_reset")
    time.sleep(0.5)
    attempt.go_on()
    attempt.outcome().succeeded()
    wait_until(lambda: not attempt.source.running(), "the end of the source QEMU")
    attempt.destination.wait_for_writing()
    attempt.destination.kill()


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        ("quits", "bulk"),
        ("raw", "moving RAM"),
        *also(("raw", "bulk"), ("quits", "copied"), ("raw", "copied"), ("quits", "moving RAM")),
    ],
)
def test_a_guest_that_is_powered_off_ends_the_migration(bench: Bench, moment: str, kind: str) -> None:
    attempt = _attempt(bench, moment, kind)
    attempt.source.press_sysrq("o")
    now = "the source QEMU has ended" if kind == "quits" else "not running (run state shutdown)"
    outcome = attempt.outcome().failed(1, now=now)
    assert "shut down" in outcome.stderr or "source QEMU ended" in outcome.stderr
    _assert_only_the_guest_is_missed(attempt)


@pytest.mark.parametrize("moment", ["moving RAM", *also("bulk", "copied")])
def test_a_guest_that_crashes_ends_the_migration(bench: Bench, moment: str) -> None:
    attempt = _attempt(bench, moment)
    attempt.source.press_sysrq("c")
    attempt.outcome().failed(1, "crashed", now="not running (run state guest-panicked)")
    _assert_only_the_guest_is_missed(attempt)


def _attempt(bench: Bench, moment: str, kind: str = "raw") -> Attempt:
    if moment == "bulk":
        attempt = bench.attempt("--bandwidth", "8M", "--granularity", "4k", kind=kind)
        attempt.wait_copying()
        return attempt
    if moment == "moving RAM":
        attempt = bench.attempt("--bandwidth", "16M", "--granularity", "4k", kind=kind, hold=moment)
        attempt.wait_held()
        return attempt
    return bench.attempt_at(moment, kind=kind)


def _assert_only_the_guest_is_missed(attempt: Attempt) -> None:
    assert not attempt.destination.running()
    assert_nothing_left(attempt.lab, attempt.source)
    assert not list(attempt.lab.target.iterdir())
    attempt.source.kill()


@pytest.mark.parametrize("moment", ["last round over", "closed"])
def test_a_guest_that_an_admin_resumes_in_the_pause_is_not_told_to_be_paused(bench: Bench, moment: str) -> None:
    attempt = Attempt(bench.lab, bench.guest(), "--pause-only", hold=moment, launch=False)
    attempt.wait_held()
    attempt.source.resume()
    time.sleep(0.3)
    attempt.go_on()
    attempt.outcome().failed(1, "resumed by somebody else", now="the guest runs at the source")
    attempt.assert_source_has_it()


@pytest.mark.parametrize("kept", [True, False])
def test_a_guest_that_an_admin_resumes_before_it_starts_at_the_destination_does_not_run_twice(
    bench: Bench, *, kept: bool
) -> None:
    attempt = bench.attempt("--source-after", "keep" if kept else "quit", "--downtime", 3000, hold="across")
    attempt.wait_held()
    attempt.source.resume()
    attempt.source.wait_for_writing(more=20)
    attempt.go_on()
    attempt.outcome().failed(1, "resumed at the source by somebody else", now="the guest runs at the source")
    attempt.assert_source_has_it()


def test_a_guest_that_is_reset_in_the_pause_runs_on_when_the_coordinator_is_killed(bench: Bench) -> None:
    attempt = Attempt(bench.lab, bench.guest(), "--pause-only", hold="last round over", launch=False)
    attempt.wait_held()
    attempt.source.execute("system_reset")
    wait_until(lambda: attempt.source.status() == "prelaunch", "the reset")
    attempt.signal(9)
    attempt.outcome()
    wait_until(lambda: attempt.source.status() == "running", "the guest to run again", 20)
    attempt.source.kill()


def test_a_source_that_hangs_in_the_pause_does_not_hang_the_tool_and_its_guest_comes_back_by_itself(
    bench: Bench,
) -> None:
    attempt = bench.attempt_at("undecided")
    job = attempt.job()
    os.kill(attempt.source.pid, signal.SIGSTOP)
    attempt.go_on()
    try:
        attempt.outcome().failed(4, "did not answer", f"qemu-blkmig cleanup {job}")
    finally:
        os.kill(attempt.source.pid, signal.SIGCONT)
    wait_until(lambda: attempt.source.status() == "running", "the guest to run again", 60)
    attempt.assert_source_has_it()
