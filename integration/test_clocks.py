"""Clocks that are set while a job is under way: nothing but `--switchover at=` goes by the time of day.

The tool's processes see a wall clock of their own (libfaketime), which these tests set; QEMU's is the machine's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.lab import Guest
from integration.luck import SLOW, Attempt, Bench, command, kill
from integration.thorough import also
from integration.tool import Outcome

HOURS = 3600
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


class WallClock:
    """What the tool takes for the time of day."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(0)

    def set(self, seconds: int) -> None:
        """Have it differ from the machine's by so much, from now on."""
        self._file.write_text(f"{seconds:+d}\n")

    @property
    def entering(self) -> tuple[str, ...]:
        """Before a command that is to go by it."""
        told = {
            "LD_PRELOAD": FAKETIME,
            "FAKETIME_TIMESTAMP_FILE": self._file,
            "FAKETIME_NO_CACHE": 1,
            "FAKETIME_DONT_FAKE_MONOTONIC": 1,
            "FAKETIME_DONT_RESET": 1,
            # Threads that wait for Python's lock would go round and round: half of a processor, or a whole one.
            "FAKETIME_FORCE_MONOTONIC_FIX": 0,
        }
        return ("env", *(f"{name}={value}" for name, value in told.items()))


@pytest.fixture
def clock(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[WallClock]:
    """The clock of all that the tool runs on this bench."""
    bench.guest()
    clock = WallClock(bench.lab.directory / "clock")
    monkeypatch.setattr(bench.lab, "entering", clock.entering)
    yield clock
    clock.set(0)


def started(bench: Bench, guest: Guest, *options: object, hold: str | None = None) -> Attempt:
    """A migration under way, whose destination QEMU goes by the machine's clock."""
    launch = f"env --unset=LD_PRELOAD {guest.launch_command(bench.lab.target)}"
    return Attempt(bench.lab, guest, "--launch", launch, "--downtime", 3000, *options, hold=hold)


def jumped(outcome: Outcome) -> list[float]:
    """By how much the tool's clock went on from one event to the next, where that was more than half an hour."""
    times = [event["time"] for event in outcome.progress if "time" in event]
    steps = [after - before for before, after in itertools.pairwise(times)]
    return [step for step in steps if abs(step) > HOURS / 2]


@pytest.mark.parametrize("seconds", [5 * HOURS, -5 * HOURS])
def test_a_clock_that_is_set_while_disks_are_copied_changes_nothing(
    bench: Bench, clock: WallClock, seconds: int
) -> None:
    attempt = started(bench, bench.guest(), *SLOW)
    attempt.wait_copying()
    clock.set(seconds)
    command("set", attempt.job(), "--bandwidth", "none", lab=bench.lab).succeeded()
    outcome = attempt.outcome().succeeded()
    (step,) = jumped(outcome)
    assert abs(step - seconds) < HOURS / 2
    attempt.assert_destination_has_it()


@pytest.mark.parametrize("moment", also("paused", "moving RAM", "undecided"))
@pytest.mark.parametrize("seconds", [5 * HOURS, -5 * HOURS])
def test_a_clock_that_is_set_in_the_switchover_changes_nothing(
    bench: Bench, clock: WallClock, moment: str, seconds: int
) -> None:
    attempt = started(bench, bench.guest(), hold=moment)
    attempt.wait_held()
    clock.set(seconds)
    attempt.go_on()
    attempt.outcome().succeeded()
    attempt.assert_destination_has_it()


def test_a_job_is_resumed_at_an_earlier_time_than_it_was_suspended_at(bench: Bench, clock: WallClock) -> None:
    clock.set(5 * HOURS)
    attempt = started(bench, bench.guest(), *SLOW)
    attempt.wait_copying()
    kill(attempt.agent())
    attempt.outcome().failed(1, now="the guest runs at the source")
    clock.set(-5 * HOURS)
    assert "suspended" in command("jobs", lab=bench.lab).succeeded().stdout
    command("status", attempt.job(), lab=bench.lab).succeeded()
    command("resume", attempt.job(), "--bandwidth", "1000", lab=bench.lab).succeeded()
    attempt.assert_destination_has_it()


def test_a_watchdog_does_not_take_a_clock_that_is_set_for_silence(bench: Bench, clock: WallClock) -> None:
    attempt = started(bench, bench.guest(), hold="paused")
    attempt.wait_held()
    for seconds in (5 * HOURS, 0, -5 * HOURS):
        clock.set(seconds)
        # More than a sign of life, and a ping, need.
        time.sleep(6)
    attempt.go_on()
    attempt.outcome().succeeded()
    attempt.assert_destination_has_it()
