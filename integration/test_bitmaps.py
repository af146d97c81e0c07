"""Dirty bitmaps of others, as backup tools keep them: they arrive with what they hold, or it is told."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from integration.lab import Guest, Hardware, Lab
from integration.test_storage import write_through
from integration.thorough import also
from integration.tool import arguments, assert_nothing_left, finish, give_up, migrate, run, start
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20
GRAIN = 65536


def add_bitmap(guest: Guest, name: str, *, disabled: bool = False) -> None:
    wanted = {"node": "disk1", "name": name, "persistent": True, "granularity": GRAIN, "disabled": disabled}
    guest.execute("block-dirty-bitmap-add", wanted)


def bitmaps(guest: Guest, node: str = "disk1") -> dict[str, dict[str, Any]]:
    nodes = guest.execute("query-named-block-nodes", {"flat": True})
    [found] = [each for each in nodes if each["node-name"] == node]
    return {bitmap["name"]: bitmap for bitmap in found.get("dirty-bitmaps", [])}


def dirty(image: Path, name: str, directory: Path) -> set[int]:
    """The offsets of the units that the stored bitmap calls dirty."""
    socket = directory / "look.nbd"
    server = subprocess.Popen(["qemu-nbd", "-r", "-k", socket, "-f", "qcow2", "-B", name, image])
    try:
        while not socket.exists():
            assert server.poll() is None
            time.sleep(0.01)
        source = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        told = subprocess.check_output(["qemu-img", "map", "--output=json", "--image-opts", source])
    finally:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)
    # In such a view of an export "data": false means dirty (qemu's block/nbd.c, x-dirty-bitmap).
    return {
        offset
        for extent in json.loads(told)
        if not extent["data"]
        for offset in range(extent["start"], extent["start"] + extent["length"], GRAIN)
    }


def stored(image: Path) -> set[str]:
    """Names of the bitmaps in an image."""
    told = json.loads(subprocess.check_output(["qemu-img", "info", "-U", "--output=json", image]))
    return {bitmap["name"] for bitmap in told["format-specific"]["data"].get("bitmaps", [])}


def boot(lab: Lab, *, style: str = "blockdev") -> Guest:
    disks = [lab.disk("first", 8 * MIB), lab.disk("second", 32 * MIB, "qcow2", data=[(0, 24 * MIB)])]
    guest = lab.boot(disks, Orders(rate=100, disks=["vda"]), Hardware(style=style))  # type: ignore[arg-type]
    guest.wait_for_writing(more=10)
    return guest


def test_a_bitmap_goes_with_a_guest_whose_disk_takes_a_while_to_be_read_back(lab: Lab) -> None:
    """Rounds go on meanwhile, and what they show is not to be in the way of QEMU, which takes the bitmap along."""
    disks = [lab.disk("first", 8 * MIB), lab.disk("second", 256 * MIB, "qcow2", data=[(0, 240 * MIB)])]
    guest = lab.boot(disks, Orders(rate=100, disks=["vda"]), Hardware(style="blockdev"))
    guest.wait_for_writing(more=10)
    add_bitmap(guest, "weekly")
    outcome, arrived = migrate(lab, guest, "--downtime", 5000, "--on-stall", "wait")
    outcome.succeeded()
    assert set(bitmaps(arrived)) == {"weekly"}
    assert_nothing_left(lab, arrived)


def test_a_backup_tool_s_bitmaps_arrive_with_what_they_hold_and_go_on(lab: Lab, tmp_path: Path) -> None:
    guest = boot(lab)
    add_bitmap(guest, "weekly")
    write_through(guest, "dev1", 3 * MIB, GRAIN)
    add_bitmap(guest, "frozen", disabled=True)
    launched = lab.destination(guest)
    # However slow the machine.
    calm = ("--bandwidth", "12M", "--downtime", 5000, "--on-stall", "wait")
    options = ("--launch", guest.launch_command(lab.target), *calm, "--progress", "json")
    process = start(arguments("migrate", guest, lab.target, *options))
    assert process.stderr is not None
    while '"stage":"bulk"' not in (line := process.stderr.readline()):
        assert line, process.communicate()
    write_through(guest, "dev1", 5 * MIB, GRAIN)
    outcome = finish(process).succeeded()
    assert "frozen, weekly) go with it" in outcome.stdout + outcome.stderr
    there = bitmaps(launched)
    assert {name: (each["recording"], each["persistent"]) for name, each in there.items()} == {
        "weekly": (True, True),
        "frozen": (False, True),
    }
    write_through(launched, "dev1", 7 * MIB, GRAIN)
    old, new = guest.disks[1].path, launched.disks[1].path
    assert_nothing_left(lab, launched)
    launched.quit()
    assert stored(old) == {"weekly", "frozen"}
    assert dirty(old, "weekly", tmp_path) == {3 * MIB, 5 * MIB}
    assert stored(new) == {"weekly", "frozen"}
    assert dirty(new, "weekly", tmp_path) == {3 * MIB, 5 * MIB, 7 * MIB}
    assert dirty(new, "frozen", tmp_path) == set()


def test_a_migration_that_is_given_up_gives_the_bitmaps_back(lab: Lab, tmp_path: Path) -> None:
    guest = boot(lab)
    add_bitmap(guest, "weekly")
    write_through(guest, "dev1", 3 * MIB, GRAIN)
    unlike = replace(guest, hardware=replace(guest.hardware, memory=2 * guest.hardware.memory))
    lab.destination(guest)
    outcome = run("migrate", guest, lab.target, "--launch", unlike.launch_command(lab.target))
    outcome.failed(1, "destination QEMU", now="the guest runs at the source")
    give_up(lab)
    assert bitmaps(guest)["weekly"]["recording"]
    lab.guests.pop()
    guest.wait_for_writing(more=10)
    assert_nothing_left(lab, guest)
    guest.quit()
    assert dirty(guest.disks[1].path, "weekly", tmp_path) == {3 * MIB}


@pytest.mark.parametrize("way", ["drop", *also("drive", "copy")])
def test_bitmaps_that_stay_behind_are_told_of(lab: Lab, way: str) -> None:
    guest = boot(lab, style="drive" if way == "drive" else "blockdev")
    node = "disk1" if way != "drive" else _node(guest)
    guest.execute("block-dirty-bitmap-add", {"node": node, "name": "weekly", "persistent": True})
    if way == "copy":
        outcome = run("copy", guest, lab.target)
        launched = guest
    else:
        outcome, launched = migrate(lab, guest, *(["--bitmaps", "drop"] if way == "drop" else []))
    assert "(weekly) will not be at the destination" in outcome.succeeded().stderr + outcome.stdout
    why = {"drop": "--bitmaps drop", "drive": "has no name of its own", "copy": "only a migration with RAM"}[way]
    assert why in outcome.stderr + outcome.stdout
    assert stored(lab.target / "second") == set()
    assert_nothing_left(lab, launched)


def _node(guest: Guest) -> str:
    [drive] = [each for each in guest.execute("query-block") if each["device"] == "disk1"]
    return str(drive["inserted"]["node-name"])
