"""`--compare`: onto a destination that holds an older copy, just what differs is sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from integration.lab import Disk, Guest, Lab, assert_records_sound, compare_images
from integration.tool import (
    assert_figures_add_up,
    assert_nothing_left,
    assert_runs_on,
    assert_writes_soundly,
    device_names,
    migrate,
    run,
)
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20
SECTOR = 512


def _written_disks(lab: Lab) -> list[Disk]:
    """Disks of which the guest, which writes in order, changes little."""
    raw = lab.disk("raw", 24 * MIB + SECTOR, data=[(2 * MIB, 20 * MIB)])
    qcow2 = lab.disk("qcow2", 16 * MIB, "qcow2", data=[(4 * MIB, 10 * MIB)])
    return [raw, replace(qcow2, bus="scsi")]


def _copied(lab: Lab, guest: Guest, *options: str) -> dict[str, Any]:
    return run("copy", guest, lab.target, "--output", "json", *options).succeeded().result


def test_a_copy_made_again_over_the_older_one_sends_about_what_was_written_since(lab: Lab) -> None:
    guest = lab.boot(_written_disks(lab), Orders(writer="sequential", rate=40))
    guest.wait_for_writing(more=20)
    assert _copied(lab, guest, "--compare")["total_copied"] > 30 * MIB, "there was nothing to compare with"
    guest.wait_for_writing(more=20)
    acked = {name: guest.acked(name) for name in device_names(guest)}
    result = _copied(lab, guest, "--compare")
    assert_figures_add_up(result)
    assert result["total_copied"] < 8 * MIB
    assert sum("only what differs is sent" in warning for warning in result["warnings"]) == 2
    for disk, name in zip(guest.disks, acked, strict=True):
        assert_records_sound(replace(disk, path=lab.target / disk.path.name), acked[name])

    guest.pause()
    _copied(lab, guest, "--compare", "--verify", "full", "--hash", "sha256")
    assert _copied(lab, guest, "--compare")["total_copied"] == 0
    for disk in guest.disks:
        compare_images(disk, replace(disk, path=lab.target / disk.path.name))
    guest.resume()
    assert_runs_on(lab, guest)


def test_a_guest_whose_copy_was_made_days_before_moves_by_what_differs(lab: Lab) -> None:
    guest = lab.boot(_written_disks(lab), Orders(writer="sequential", rate=40))
    guest.wait_for_writing(more=20)
    _copied(lab, guest)
    guest.wait_for_writing(more=20)
    outcome, arrived = migrate(lab, guest, "--compare", "--verify", "full")
    result = outcome.succeeded().result
    assert_figures_add_up(result)
    assert all(disk["skipped"] >= 8 * MIB for disk in result["disks"])
    assert result["verified"] == "full"
    assert_writes_soundly(arrived)
    assert_nothing_left(lab, arrived)
