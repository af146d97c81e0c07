"""Ownership records after real migrations: who may start a guest from which image, and who is kept from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from integration.lab import Lab
from integration.tool import assert_nothing_left, assert_runs_on, migrate, run
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20


def record(image: Path) -> dict[str, Any] | None:
    place = image.with_name(f".{image.name}.blkmig")
    if not place.exists():
        return None
    told: dict[str, Any] = json.loads(place.read_text())
    return told


def state(image: Path) -> str | None:
    told = record(image)
    return told["state"] if told else None


def test_a_guest_that_moved_leaves_an_image_that_nobody_migrates_by_mistake(lab: Lab) -> None:
    disk = lab.disk("disk", 8 * MIB, "qcow2")
    guest = lab.boot([disk], Orders(rate=100))
    guest.wait_for_writing(more=10)
    outcome, arrived = migrate(lab, guest)
    outcome.succeeded()
    old, new = record(disk.path), record(lab.target / "disk")
    assert old and new
    assert (old["state"], new["state"]) == ("moved", "complete")
    assert old["peer"].endswith(f":{lab.target / 'disk'}") and new["peer"].endswith(f":{disk.path}")
    elsewhere = lab.target / "elsewhere"
    elsewhere.mkdir()
    refused = run("copy", disk.path, elsewhere).failed(3, "moved its guest away to", "--ignore-ownership")
    assert str(lab.target / "disk") in refused.stderr
    assert not list(elsewhere.iterdir())
    run("copy", disk.path, elsewhere, "--ignore-ownership").succeeded()
    assert state(elsewhere / "disk") == "complete"
    # And back again, over the old image: a complete record hinders nothing, an old one is overwritten.
    run("copy", f"qmp:{arrived.monitor}", disk.path.parent).succeeded()
    assert state(disk.path) == "complete"
    assert_nothing_left(lab, arrived)


def test_a_migration_that_fails_leaves_no_record_of_what_it_removed(lab: Lab) -> None:
    disk = lab.disk("disk", 8 * MIB)
    guest = lab.boot([disk], Orders(rate=100))
    guest.wait_for_writing(more=10)
    outcome = run("migrate", guest, lab.target, "--launch", "false")
    outcome.failed(3, now="the guest runs at the source")
    assert "this job had not handed it over" in outcome.stderr
    assert not list(lab.target.iterdir()) and record(disk.path) is None
    assert_runs_on(lab, guest)


def test_the_source_s_image_is_renamed_after_the_handover_and_its_record_with_it(lab: Lab) -> None:
    disk = lab.disk("disk", 8 * MIB, "qcow2")
    guest = lab.boot([disk], Orders(rate=100))
    guest.wait_for_writing(more=10)
    outcome, arrived = migrate(lab, guest, "--source-images", "rename", "--on-stall", "pause")
    result = outcome.succeeded().result
    moved = disk.path.with_name(f"disk.moved-{result['job']}")
    assert moved.exists() and not disk.path.exists()
    assert (state(moved), state(disk.path), state(lab.target / "disk")) == ("moved", None, "complete")
    assert_nothing_left(lab, arrived)
