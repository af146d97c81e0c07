"""Guests that write faster than their disks are copied, and guests that write the same places all the time."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from integration.lab import Guest, Hardware, Lab, wait_until
from integration.thorough import also
from integration.tool import (
    COMMAND,
    Outcome,
    arguments,
    assert_nothing_left,
    assert_runs_on,
    assert_writes_soundly,
    finish,
    give_up,
    migrate,
    start,
)
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20
OWN: dict[str, int | str] = {"bps_wr": 40 * MIB, "bps_wr_max": 50 * MIB, "iops_rd": 5000, "group": "owners"}
"""Limits that a guest has without us."""
FASTER = ("--bandwidth", "8M", "--downtime", 300, "--max-rounds", 3, "--progress", "json")
"""Options with which the busy guest does not converge by itself."""


def busy(lab: Lab, *, style: str = "blockdev") -> Guest:
    """A guest that writes faster than FASTER lets its disk be copied."""
    guest = lab.boot(
        [lab.disk("disk", 16 * MIB, data=[(0, 2 * MIB)])],
        Orders(writer="random", rate=400, span=8 * MIB),
        Hardware(style=style),  # type: ignore[arg-type]
    )
    guest.wait_for_writing(more=200)
    return guest


def limits(guest: Guest) -> list[dict[str, Any]]:
    """What QEMU tells of each disk's throttle, but for what is 0."""
    told = [drive["inserted"] for drive in guest.execute("query-block")]
    return [
        {key: value for key, value in each.items() if key.startswith(("bps", "iops", "group")) and value}
        for each in told
    ]


def slow(guest: Guest, **wanted: int | str) -> None:
    """Throttle the guest's disk as its owner would."""
    (drive,) = guest.execute("query-block")
    rates = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    guest.execute("block_set_io_throttle", {**rates, **wanted, "id": drive["qdev"]})


def notes(outcome: Outcome) -> str:
    return "\n".join(line.get("text", "") for line in outcome.progress)


def started(lab: Lab, guest: Guest, *options: object) -> tuple[Any, Guest]:
    """A migration under way."""
    launched = lab.destination(guest)
    command = ("--launch", guest.launch_command(lab.target), "--output", "json")
    return start(arguments("migrate", guest, lab.target, *command, *options)), launched


def wait_line(process: Any, wanted: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Read its progress up to a line that is wanted."""
    while line := process.stderr.readline():
        told: dict[str, Any] = json.loads(line)
        if wanted(told):
            return told
    raise AssertionError(process.communicate())


def test_a_guest_that_writes_faster_than_its_disk_is_copied_moves_when_its_writes_are_slowed(lab: Lab) -> None:
    guest = busy(lab)
    outcome, arrived = migrate(lab, guest, *FASTER, "--on-stall", "throttle", "--verify", "full")
    result = outcome.succeeded().result
    (slowed,) = result["slowed"]
    assert 0 < slowed["limit"] < slowed["wrote"], slowed
    assert "are slowed (--on-stall throttle)" in notes(outcome)
    assert limits(arrived) == [{}], "the destination's own command line decides"
    assert_writes_soundly(arrived)
    assert_nothing_left(lab, arrived)


def test_limits_of_the_guests_own_come_back_where_the_migration_fails(lab: Lab) -> None:
    guest = busy(lab)
    slow(guest, **OWN)
    before = limits(guest)
    process, _ = started(lab, guest, *FASTER, "--on-stall", "throttle")
    wait_until(lambda: limits(guest) != before, "the throttle", 60)
    assert limits(guest)[0]["iops_rd"] == OWN["iops_rd"], "what is not to be changed stays"
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert limits(guest) == before
    assert_runs_on(lab, guest)


def test_limits_that_an_admin_sets_while_the_guest_is_slowed_stay(lab: Lab) -> None:
    guest = busy(lab)
    before = limits(guest)
    process, _ = started(lab, guest, *FASTER, "--on-stall", "throttle")
    wait_until(lambda: limits(guest) != before, "the throttle", 60)
    slow(guest, bps_wr=60 * MIB)
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert limits(guest)[0]["bps_wr"] == 60 * MIB
    slow(guest)
    assert_runs_on(lab, guest)


@pytest.mark.parametrize("own", [OWN, *also({})], ids=["its own", "none"])
def test_a_killed_coordinator_leaves_no_guest_slowed(lab: Lab, own: dict[str, int | str]) -> None:
    guest = busy(lab)
    if own:
        slow(guest, **own)
    before = limits(guest)
    process, _ = started(lab, guest, *FASTER, "--on-stall", "throttle")
    wait_until(lambda: limits(guest) != before, "the throttle", 60)
    process.kill()
    wait_until(lambda: limits(guest) == before, "the end of the throttle", 60)
    finish(process)
    wait_until(lambda: guest.status() == "running", "the guest", 20)
    give_up(lab)
    assert_runs_on(lab, guest)


def test_a_guest_that_stays_at_the_source_is_not_slowed_after_a_success_either(lab: Lab) -> None:
    guest = busy(lab)
    slow(guest, **OWN)
    before = limits(guest)
    process = start(
        arguments("migrate", guest, lab.target, "--pause-only", "--output", "json", *FASTER, "--on-stall", "throttle")
    )
    outcome = finish(process).succeeded()
    assert outcome.result["slowed"]
    assert limits(guest) == before
    guest.resume()
    assert_writes_soundly(guest)
    assert_nothing_left(lab, guest)


def test_copying_is_held_back_while_the_guests_disks_are_slow_and_steps_forward_when_they_are_not(lab: Lab) -> None:
    guest = lab.boot([lab.disk("disk", 512 * MIB, data=[(0, 512 * MIB)])], Orders(writer="random", rate=200))
    guest.wait_for_writing(more=100)
    process = start(
        arguments(
            "copy", guest, lab.target, "--adaptive", "--bandwidth", "12M", "--progress", "json", "--output", "json"
        )
    )
    wait_line(process, lambda told: told.get("percent", 0) >= 4)
    slow(guest, iops_wr=10)
    wait_line(process, lambda told: told["event"] == "limits" and told["bandwidth"] < 10 * MIB)
    slow(guest)
    wait_line(process, lambda told: told["event"] == "limits" and told["bandwidth"] > 10 * MIB)
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert_runs_on(lab, guest)


def test_what_is_put_off_is_owed_by_a_killed_coordinator_too_and_arrives_in_the_end(lab: Lab) -> None:
    guest = lab.boot([lab.disk("disk", 64 * MIB, data=[(0, 8 * MIB)])], Orders(writer="hot", rate=400))
    guest.wait_for_writing(more=200)
    kept = (
        "--bandwidth",
        "16M",
        "--downtime",
        1000,
        "--switchover",
        "manual",
        "--verify",
        "full",
        "--progress",
        "json",
    )
    process, arrived = started(lab, guest, *kept)
    wait_line(process, lambda told: told.get("put_off"))
    process.kill()
    finish(process)
    (job,) = (path.parent.name for path in lab.state.glob("*/record.json"))
    wait_until(lambda: "suspended" in finish(start([*COMMAND, "jobs"])).stdout, "the watchdog", 60)
    process = start([*COMMAND, "resume", job, "--output", "json", "--progress", "json"])
    wait_line(process, lambda told: told.get("put_off"))
    assert '"put_off":0' not in finish(start([*COMMAND, "status", job, "--output", "json"])).succeeded().stdout
    finish(start([*COMMAND, "switchover", job])).succeeded()
    finish(process).succeeded()
    assert_writes_soundly(arrived)
    assert_nothing_left(lab, arrived)
