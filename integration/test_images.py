"""Images as they are in the field: compressed, with a data file of their own, with internal snapshots."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from integration.lab import Disk, Lab, assert_records_sound, compare_images
from integration.tool import assert_nothing_left, migrate, run
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20


def described(image: Path) -> dict[str, Any]:
    """What `qemu-img info` tells of an image that a guest may have open."""
    told = subprocess.run(["qemu-img", "info", "-U", "--output=json", image], check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def compressed(disk: Disk, path: Path) -> Disk:
    """A copy of the disk, of compressed clusters."""
    subprocess.run(["qemu-img", "convert", "-c", "-f", disk.format, "-O", "qcow2", disk.path, path], check=True)
    return Disk(path, "qcow2", disk.size)


def test_a_guest_moves_whose_images_are_compressed_have_a_data_file_or_hold_snapshots(lab: Lab) -> None:
    small = compressed(lab.disk("plain", 8 * MIB, data=[(MIB, MIB)]), lab.directory / "small")
    apart = lab.disk("apart", 8 * MIB, "qcow2", data=[(4 * MIB, MIB)], options=[f"data_file={lab.directory}/bytes"])
    older = lab.disk("older", 8 * MIB + 512, "qcow2", data=[(2 * MIB, MIB)])
    subprocess.run(["qemu-img", "snapshot", "-c", "before-the-upgrade", older.path], check=True)
    guest = lab.boot([small, apart, older], Orders(rate=100))
    guest.wait_for_writing(more=30)

    refused, _ = migrate(lab, guest, "--verify", "full", "--source-after", "keep")
    refused.failed(3, "before-the-upgrade", "--drop-snapshots", now="the guest runs at the source")
    outcome, arrived = migrate(lab, guest, "--verify", "full", "--drop-snapshots")
    outcome.succeeded()
    arrived.pause()
    for disk, name in zip(arrived.disks, ("vda", "vdb", "vdc"), strict=True):
        assert_records_sound(disk, guest.acked(name))
        told = described(disk.path)
        assert "snapshots" not in told and "data-file" not in told["format-specific"]["data"], told
    assert_nothing_left(lab, arrived)


def test_such_images_are_copied_while_nobody_has_them_open(lab: Lab) -> None:
    small = compressed(lab.disk("plain", 8 * MIB, data=[(MIB, MIB)]), lab.directory / "small")
    apart = lab.disk("apart", 8 * MIB, "qcow2", data=[(4 * MIB, MIB)], options=[f"data_file={lab.directory}/bytes"])
    for disk in (small, apart):
        there = replace(disk, path=lab.target / disk.path.name)
        run("copy", disk.path, lab.target, "--source-format", "qcow2", "--verify", "full").succeeded()
        compare_images(disk, there)
        assert "data-file" not in described(there.path)["format-specific"]["data"]
