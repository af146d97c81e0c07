"""Ctrl-C and its like in each phase: a clean cancel up to the handover, which is brought to its end."""

from __future__ import annotations

import os
import signal
import time

import pytest

from integration.lab import wait_until
from integration.luck import Attempt, Bench, kill
from integration.thorough import also

MOMENTS = ["planned", "launched", "connected", "bulk", "converged", "moving RAM", "paused", "last round over"]
OTHERS = [(signal.SIGTERM, "bulk"), (signal.SIGTERM, "paused"), (signal.SIGHUP, "converged")]
OFTEN = [(signal.SIGINT, "launched"), (signal.SIGINT, "bulk"), (signal.SIGINT, "last round over"), *OTHERS[1:]]
CASES = [*((signal.SIGINT, moment) for moment in MOMENTS), *OTHERS]


@pytest.mark.parametrize(("signum", "moment"), [*OFTEN, *also(*(case for case in CASES if case not in OFTEN))])
def test_a_signal_before_the_handover_cancels(bench: Bench, signum: signal.Signals, moment: str) -> None:
    attempt = bench.attempt_at(moment)
    attempt.signal(signum)
    attempt.outcome().failed(128 + signum, "interrupted", now="the guest runs at the source")
    attempt.assert_given_up(suspended=signum == signal.SIGHUP)


@pytest.mark.parametrize("moment", ["undecided", "started", *also("closed", "continued", "completed")])
def test_a_signal_in_the_handover_waits_until_the_guest_has_moved(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment)
    attempt.signal(signal.SIGINT)
    attempt.signal(signal.SIGTERM)
    wait_until(lambda: "the interrupt waits for it" in attempt.said, "the signal's arrival")
    attempt.go_on()
    attempt.outcome().succeeded()
    attempt.assert_destination_has_it()


def test_a_signal_before_anything_was_made_leaves_nothing(bench: Bench) -> None:
    attempt = bench.attempt()
    wait_until(lambda: bool(list(bench.lab.state.glob("*/record.json"))), "the job")
    attempt.signal(signal.SIGINT)
    attempt.outcome().failed(130, "interrupted")
    attempt.assert_source_has_it()


def test_a_second_signal_insists_and_the_watchdog_cleans_up(bench: Bench) -> None:
    attempt = bench.attempt_at("bulk")
    agent = attempt.agent()
    os.kill(agent, signal.SIGSTOP)
    _interrupt(attempt)
    attempt.signal(signal.SIGINT)
    assert attempt.process.wait(timeout=30) == 130
    os.kill(agent, signal.SIGCONT)
    attempt.outcome()
    attempt.assert_source_has_it()


def test_a_signal_while_a_failure_is_being_undone_does_not_stop_that(bench: Bench) -> None:
    attempt = bench.attempt_at("bulk")
    agent = attempt.agent()
    os.kill(agent, signal.SIGSTOP)
    kill(attempt.watchdog())
    time.sleep(0.5)
    _interrupt(attempt)
    os.kill(agent, signal.SIGCONT)
    attempt.outcome().failed(130, "interrupted", now="the guest runs at the source")
    attempt.assert_source_has_it()


def _interrupt(attempt: Attempt) -> None:
    attempt.signal(signal.SIGINT)
    wait_until(lambda: "interrupt again to insist" in attempt.said, "the signal's arrival")
