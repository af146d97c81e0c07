"""A migration to another host whose network, sshd, agent or power fails: the guest runs once, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.far import FarLab, far_laboratory
from integration.luck import SLOW, Attempt, Bench, command, kill
from integration.test_resume import wait_share
from integration.thorough import also
from integration.tool import Outcome, assert_writes_soundly
from qemu_blkmig.demo.guest import Kernel
from qemu_blkmig.destination import ownership

MIB = 1 << 20
BEFORE = ["bulk", "moving RAM", "paused"]


class FarBench(Bench):
    """A `Bench` whose destination is hostb."""

    lab: FarLab

    def attempt_at(self, moment: str, *options: object, kind: str = "raw") -> Attempt:
        """See `Bench`; one that is in mid-copy comes to its end, if it is let."""
        if moment != "bulk":
            return super().attempt_at(moment, *options, kind=kind)
        attempt = self.attempt(*SLOW, *options, kind=kind)
        attempt.wait_copying()
        return attempt


@pytest.fixture(scope="module")
def bench(kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[FarBench]:
    """A guest in hosta, shared by these tests as long as they leave it running."""
    with far_laboratory(kernel, initramfs) as lab:
        yield FarBench(lab)


@pytest.fixture(autouse=True)
def order(bench: FarBench) -> Iterator[None]:
    """What a failed test left broken must not fail the next one."""
    yield
    bench.lab.restore()


def break_connection(lab: FarLab, how: str) -> None:
    """Do it; `mend` undoes it."""
    match how:
        case "network":
            lab.network.down()
        case "sshd":
            assert lab.network.kill_connections()
        case "power":
            lab.hosts.power_off()


def mend(lab: FarLab, how: str) -> None:
    """Let hostb be there again; what hung there is ended, as it would in time."""
    if how == "power":
        lab.hosts.boot()
    else:
        lab.network.up()
        lab.network.kill_connections()


@pytest.mark.parametrize("moment", ["moving RAM", "paused", *also("bulk", "undecided")])
def test_a_network_that_is_away_for_a_second_is_survived(bench: FarBench, moment: str) -> None:
    attempt = bench.attempt_at(moment)
    bench.lab.network.down()
    attempt.go_on()
    bench.lab.network.cut(1)
    attempt.outcome().succeeded()
    attempt.assert_destination_has_it()


@pytest.mark.parametrize(
    ("moment", "how"),
    [
        ("undecided", "network"), ("paused", "power"), ("bulk", "sshd"),
        *also(("bulk", "network"), ("moving RAM", "network"), ("paused", "network"), ("bulk", "power"),
              ("moving RAM", "power"), ("paused", "sshd")),
    ],
)  # fmt: skip
def test_what_ends_the_connection_leaves_the_guest_at_the_source(bench: FarBench, moment: str, how: str) -> None:
    attempt = bench.attempt_at(moment)
    break_connection(bench.lab, how)
    attempt.go_on()
    outcome = attempt.outcome().failed(1, "hostb", now="the guest runs at the source")
    assert_writes_soundly(attempt.source)
    mend(bench.lab, how)
    finish_job(attempt, outcome)


def test_a_destination_host_that_was_rebooted_has_what_was_copied_and_is_gone_on_with(bench: FarBench) -> None:
    attempt = bench.attempt_at("bulk")
    wait_share(attempt, 70)
    bench.lab.hosts.reboot()
    attempt.outcome().failed(1, "hostb", f"qemu-blkmig resume {attempt.job()}", now="the guest runs at the source")
    assert not list((bench.lab.hosts.far / "tmp").iterdir())
    resumed = command("resume", attempt.job(), "--bandwidth", "1000", "--output", "json", lab=bench.lab).succeeded()
    (disk,) = resumed.result["disks"]
    assert disk["resumed"] >= disk["virtual_size"] // 2
    attempt.assert_destination_has_it()


def test_a_host_that_is_out_of_reach_when_it_has_started_the_guest_is_tidied_up_later(bench: FarBench) -> None:
    attempt = bench.attempt_at("started")
    with bench.lab.network.resetting():
        attempt.go_on()
        outcome = attempt.outcome().succeeded()
    assert f"run: qemu-blkmig cleanup {attempt.job()}" in outcome.stdout
    cleaned = command("cleanup", attempt.job(), lab=bench.lab).succeeded()
    assert "the guest runs at the destination" in cleaned.stdout
    told = ownership.read(str(attempt.destination.disks[0].path))
    assert told is not None and told.state == "complete"
    bench.lab.network.kill_connections()
    attempt.assert_destination_has_it()


@pytest.mark.parametrize("who", ["agent", "coordinator"])
def test_what_is_killed_in_mid_copy_leaves_the_guest_at_the_source(bench: FarBench, who: str) -> None:
    attempt = bench.attempt_at("bulk")
    kill(attempt.agent() if who == "agent" else attempt.process.pid)
    outcome = attempt.outcome()
    assert "the guest runs at the source" in outcome.stderr
    finish_job(attempt, outcome)


def finish_job(attempt: Attempt, outcome: Outcome) -> None:
    """Do as was advised, to the job's end: go on with it where that was said to be possible, else clean up."""
    jobs = [line.split()[0] for line in command("jobs", lab=attempt.lab).stdout.splitlines()]
    if "qemu-blkmig resume" in outcome.stderr:
        command("resume", *jobs, lab=attempt.lab).succeeded()
        attempt.assert_destination_has_it()
        return
    for job in jobs:
        command("cleanup", job, lab=attempt.lab).succeeded()
    attempt.assert_source_has_it()
