"""The judges of a migration that something was done to: who runs the guest, and whether that side has all of it.

They go by what the guest itself printed on each side, by what lies on the images, and by what the tool told.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from integration.lab import Disk, Guest, Lab, LabError, assert_records_sound, raw_view, wait_until
from integration.tool import Outcome, device_names

PATIENCE = 60.0
"""Seconds in which everything must have come to rest."""
BLOCK = 4096
"""Of a record, on disks of 64 KiB and more."""

Sides = tuple[Guest, Guest]
"""The guest at the source, and at the destination."""


def runs(side: Guest) -> bool:
    """Whether the guest runs there now."""
    return state(side) == "running"


def state(side: Guest) -> str:
    """The run state of its QEMU; "gone" where there is none."""
    try:
        return side.status() if side.running() else "gone"
    except (LabError, OSError) as error:
        return "gone" if not side.running() else str(error)


def wait_for_one(sides: Sides, *, none: bool, said: str) -> Guest | None:
    """The side that runs the guest, once all is at rest; None where `none` may do so, both QEMUs being gone."""
    found: list[Guest] = []

    def settled() -> bool:
        found[:] = [side for side in sides if runs(side)]
        assert len(found) < 2, "the guest runs on both sides"
        return len(found) == 1 or (none and not any(side.running() for side in sides))

    wait_until(settled, "the guest to run on one side", PATIENCE, lambda: f"{[state(side) for side in sides]} {said}")
    return found[0] if found else None


def assert_told_truly(outcome: Outcome, sides: Sides, *, killed: bool) -> None:
    """Assert that the guest runs where the tool says that it does (`killed`: or its QEMU was killed after that)."""
    assert "Traceback" not in outcome.stderr and "defect" not in outcome.stderr, outcome.stderr
    told = [line for line in outcome.stderr.splitlines() if line.startswith("  now:  ")]
    for side, place in zip(sides, ("source", "destination"), strict=True):
        if any(f"the guest runs at the {place}" in line for line in told):
            assert runs(side) or (killed and not side.running()), f"{place}: {state(side)}, but: {outcome.stderr}"


def assert_ran_once(sides: Sides) -> None:
    """Assert by the guest's own words that it ran at the source, and after that, if at all, at the destination.

    Its records are numbered: had it gone on at the source once the destination ran it, numbers would come twice.
    """
    source, destination = sides
    for name in device_names(source):
        first = _first_acked(destination, name)
        assert first is None or source.acked(name) <= first, (
            f"{name}: the source went on to record {source.acked(name)}, the destination had begun at {first}"
        )


def ran_there(destination: Guest) -> bool:
    """Whether the guest has said a word at the destination."""
    return "blkmig ack" in destination.console()


def _first_acked(side: Guest, name: str) -> int | None:
    found = re.search(rf"^blkmig ack {name} seq (\d+) ", side.console(), re.MULTILINE)
    return int(found[1]) if found else None


def assert_holds_all(lab: Lab, side: Guest, sides: Sides, *, span: int) -> None:
    """Assert that this side's disks, on which nobody writes now, hold all that the guest ever said was written.

    And the other side's do not lie about: at the source nothing of the destination's is left; at the destination all
    that the guest never wrote to is what it was at the source.
    """
    for number, (disk, name) in enumerate(zip(side.disks, device_names(side), strict=True)):
        assert_records_sound(disk, max(one.acked(name) for one in sides))
        if side is sides[1]:
            assert_rest_equal(sides[0].disks[number], disk, span)
    if side is sides[0]:
        left = [path.name for path in lab.target.iterdir()]
        assert not left, f"left at the destination: {left}"
        assert not ran_there(sides[1]), "the guest ran at the destination, which does not have it"


def assert_rest_equal(source: Disk, destination: Disk, span: int) -> None:
    """Assert that two images differ nowhere but where the guest's writer puts its records (see demo.records)."""
    written = record_blocks(source, span)
    with raw_view(source) as one, raw_view(destination) as other:
        assert one.stat().st_size == other.stat().st_size, f"{destination.path}: {other.stat().st_size} bytes"
        wrong = [block for block in _differing(one, other) if block not in written]
    assert not wrong, f"{destination.path} differs from {source.path} in blocks {wrong[:10]}"


def record_blocks(disk: Disk, span: int) -> set[int]:
    """The blocks of a disk in which the guest's writer puts its records, with that span (see demo.records)."""
    total = disk.size // BLOCK
    count = min(span // BLOCK, total)
    return {position * (total - 1) // (count - 1) for position in range(count)}


def _differing(one: Path, other: Path) -> list[int]:
    found, number = [], 0
    with one.open("rb") as first, other.open("rb") as second:
        while pieces := first.read(1 << 20):
            others = second.read(1 << 20)
            if pieces != others:
                blocks = range(0, len(pieces), BLOCK)
                found += [number + at // BLOCK for at in blocks if pieces[at : at + BLOCK] != others[at : at + BLOCK]]
            number += len(pieces) // BLOCK
    return found


def assert_nothing_ours_left(lab: Lab, sides: Sides) -> None:
    """Assert that nothing of ours is in a QEMU that is left, among the processes, or in any folder."""
    there = [side for side in sides if side.running()]
    pids = []
    with contextlib.suppress(LabError):
        pids = [side.pid for side in there]
    # An agent whose connection is gone without a word ends 20 s after that.
    lab.assert_no_leftovers(*there, directories=[lab.target], allow=pids, within=45)
