"""Processes that die or hang at the worst moment: the guest runs on exactly one side, and nothing is left behind."""

from __future__ import annotations

import os
import signal

import pytest

from integration.lab import wait_until
from integration.luck import SLOW, Attempt, Bench, command, kill
from integration.thorough import also
from integration.tool import assert_nothing_left, assert_writes_soundly
from qemu_blkmig.destination.locks import lock_as_writer
from qemu_blkmig.destination.ownership import path_of

PREPARATION = ["planned", "launched", "connected"]
LIVE = ["bulk", "converged", "moving RAM"]
PAUSED = ["paused", "last round over"]
KEPT = [*LIVE, *PAUSED, "closed"]
"""What fails then can be resumed."""


@pytest.mark.parametrize(
    "moment",
    [*also(*PREPARATION, "converged", "paused", "closed"), "moving RAM", "last round over", "undecided", *also("bulk")],
)
def test_a_coordinator_killed_before_the_handover_leaves_the_guest_at_the_source(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment)
    attempt.signal(signal.SIGKILL)
    assert "the guest runs at the source" in attempt.outcome().stderr
    attempt.assert_given_up(suspended=moment in KEPT)


@pytest.mark.parametrize("moment", ["decided", *also("continued", "completed", "started")])
def test_a_coordinator_killed_in_the_handover_hands_the_guest_over(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment)
    attempt.signal(signal.SIGKILL)
    assert "the guest runs at the destination" in attempt.outcome().stderr
    attempt.assert_destination_has_it()


@pytest.mark.parametrize(("moment", "how"), [("paused", "stop"), ("undecided", "block"), *also(("moving RAM", "stop"))])
def test_a_coordinator_that_hangs_while_it_may_pause_the_guest_is_ended(bench: Bench, moment: str, how: str) -> None:
    attempt = bench.attempt(*SLOW if moment == "moving RAM" else (), hold=moment, block=how == "block")
    attempt.wait_held()
    if how == "stop":
        attempt.signal(signal.SIGSTOP)
    outcome = attempt.outcome()
    assert outcome.code == -signal.SIGKILL
    assert "the guest runs at the source" in outcome.stderr
    attempt.assert_given_up(suspended=moment in KEPT)


def test_storage_that_stalls_in_the_handover_does_not_keep_the_guest_paused(bench: Bench) -> None:
    attempt = bench.attempt_at("storage")
    wait_until(lambda: attempt.source.status() == "running", "the guest", 40)
    attempt.go_on()
    attempt.outcome().failed(1, "its storage did not take it within 10 s", now="the guest runs at the source")
    attempt.assert_suspended()


@pytest.mark.parametrize("moment", ["paused", *also("bulk", "converged", "moving RAM")])
def test_a_migration_whose_watchdog_died_waits_to_be_resumed(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment)
    kill(attempt.watchdog())
    attempt.outcome().failed(1, "watchdog", now="the guest runs at the source")
    attempt.assert_suspended()


def test_no_guest_is_paused_without_a_watchdog_that_answers(bench: Bench) -> None:
    attempt = bench.attempt_at("converged")
    os.kill(attempt.watchdog(), signal.SIGSTOP)
    attempt.go_on()
    attempt.outcome().failed(1, "watchdog", "hangs", now="the guest runs at the source")
    attempt.assert_suspended()


@pytest.mark.parametrize("moment", ["last round over", *also("bulk", "paused", "prepared", "converged", "moving RAM")])
def test_a_killed_agent_leaves_the_guest_at_the_source(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment, "--verify", "full")
    kill(attempt.agent())
    attempt.go_on()
    attempt.outcome().failed(
        1, "the agent at the destination is gone (killed by SIGKILL)", now="the guest runs at the source"
    )
    attempt.assert_given_up(suspended=moment in KEPT)


def test_an_agent_that_hangs_in_the_last_round_does_not_keep_the_guest_paused(bench: Bench) -> None:
    attempt = bench.attempt_at("paused")
    os.kill(attempt.agent(), signal.SIGSTOP)
    attempt.go_on()
    wait_until(lambda: attempt.source.status() == "running", "the guest", 40)
    attempt.outcome().failed(1, "the last pass did not end within 10 s", now="the guest runs at the source")
    attempt.assert_suspended()


@pytest.mark.parametrize("moment", ["paused", *also("bulk")])
def test_a_killed_nbd_server_at_the_destination_leaves_the_guest_at_the_source(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment, kind="qcow2")
    kill(attempt.child("qemu-nbd"))
    attempt.go_on()
    attempt.outcome().failed(1, "the destination cannot be", now="the guest runs at the source")
    attempt.assert_suspended()


@pytest.mark.parametrize(
    "moment", ["moving RAM", "completed", *also("undecided", "bulk", "converged", *PAUSED, "continued")]
)
def test_a_destination_killed_before_it_runs_the_guest_leaves_it_at_the_source(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment)
    attempt.destination.kill()
    attempt.go_on()
    attempt.outcome().failed(1, "destination QEMU", now="the guest runs at the source")
    attempt.assert_given_up(suspended=moment in KEPT)


def test_a_destination_that_cannot_lock_its_image_leaves_the_guest_at_the_source(bench: Bench) -> None:
    attempt = bench.attempt_at("undecided")
    image = attempt.destination.disks[0].path
    thief = os.open(image, os.O_RDONLY)
    try:
        assert lock_as_writer(thief)
        attempt.go_on()
        attempt.outcome().failed(1, "lock", now="the guest runs at the source; incomplete images were left")
        assert image.exists(), "an image in use was removed"
    finally:
        os.close(thief)
    image.unlink()
    # What is left is told by its ownership record, which stays with it.
    path_of(str(image)).unlink()
    attempt.assert_source_has_it()


def test_a_destination_killed_when_it_runs_the_guest_is_told_to_have_the_truth(bench: Bench) -> None:
    attempt = bench.attempt_at("decided")
    attempt.destination.kill()
    attempt.go_on()
    attempt.outcome().failed(4, "the destination QEMU ended", now="its disks at the destination are the truth")
    assert not attempt.source.running()
    assert attempt.destination.disks[0].path.exists()


def test_a_destination_that_died_when_it_was_told_to_run_the_guest_is_for_a_person_to_judge(bench: Bench) -> None:
    attempt = bench.attempt_at("started")
    attempt.signal(signal.SIGSTOP)
    attempt.destination.kill()
    attempt.signal(signal.SIGKILL)
    told = attempt.outcome().stderr
    assert "`cont` there loses such writes" in told
    assert f"qemu-blkmig cleanup {attempt.job()}" in told
    assert attempt.source.status() == "postmigrate"
    assert command("cleanup", attempt.job()).code == 4
    attempt.source.resume()
    cleaned = command("cleanup", attempt.job())
    assert cleaned.code == 0, cleaned
    attempt.assert_source_has_it()


@pytest.mark.parametrize("moment", ["paused", "undecided", *also("bulk", "converged", "moving RAM", "last round over")])
def test_a_source_killed_before_everything_had_arrived_is_told_and_nothing_runs(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment)
    attempt.source.kill()
    attempt.go_on()
    attempt.outcome().failed(1, "source QEMU", now="its disks hold all that the guest wrote")
    assert not attempt.destination.running()
    assert_nothing_left(bench.lab, attempt.source)
    assert not list(bench.lab.target.iterdir())


@pytest.mark.parametrize("moment", ["completed", "started"])
def test_a_source_killed_when_everything_had_arrived_is_missed_by_nobody(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment)
    attempt.source.kill()
    attempt.go_on()
    attempt.outcome().succeeded()
    attempt.assert_destination_has_it()


def test_a_source_whose_qmp_socket_was_unlinked_gets_its_guest_back(bench: Bench) -> None:
    attempt = bench.attempt_at("paused")
    attempt.source.qmp.rename(attempt.source.directory / "unlinked")
    try:
        kill(attempt.agent())
        attempt.go_on()
        attempt.outcome().failed(1, "agent", now="the guest runs at the source")
    finally:
        (attempt.source.directory / "unlinked").rename(attempt.source.qmp)
    attempt.assert_suspended()


def _kill_both(attempt: Attempt) -> str:
    """Kill coordinator and watchdog, neither of which may act upon the other's end; the job's name."""
    attempt.signal(signal.SIGSTOP)
    kill(attempt.watchdog())
    attempt.signal(signal.SIGKILL)
    attempt.outcome()
    return attempt.job()


@pytest.mark.parametrize("moment", ["paused", "undecided", *also("bulk", "moving RAM")])
def test_cleanup_brings_the_guest_back_when_all_our_processes_were_killed(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment)
    job = _kill_both(attempt)
    assert job in command("jobs").stdout
    cleaned = command("cleanup", job).succeeded()
    assert "the guest runs at the source" in cleaned.stdout
    assert f"job {job} was over already" in command("cleanup", job).succeeded().stdout
    assert command("jobs").stdout == ""
    attempt.assert_source_has_it()


@pytest.mark.parametrize("moment", ["decided", *also("continued", "started")])
def test_cleanup_completes_a_handover_when_all_our_processes_were_killed(bench: Bench, moment: str) -> None:
    attempt = bench.attempt_at(moment)
    job = _kill_both(attempt)
    cleaned = command("cleanup", job).succeeded()
    assert "the guest runs at the destination" in cleaned.stdout
    assert f"job {job} was over already" in command("cleanup", job).succeeded().stdout
    attempt.assert_destination_has_it()


def test_cleanup_leaves_a_job_alone_that_is_alive(bench: Bench) -> None:
    attempt = bench.attempt_at("bulk")
    command("cleanup", attempt.job()).failed(3, "still being worked on")
    attempt.signal(signal.SIGINT)
    attempt.outcome()
    assert_writes_soundly(attempt.source)
