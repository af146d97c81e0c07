"""To another host over a real ssh: a guest moves, and when the connection dies it runs on exactly one side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.far import far_laboratory
from integration.luck import Attempt, Bench, kill
from qemu_blkmig.demo.guest import Kernel


@pytest.fixture(scope="module")
def far(kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[Bench]:
    """A guest in hosta that is shared by the tests of this file, as long as they leave it running."""
    with far_laboratory(kernel, initramfs) as lab:
        yield Bench(lab)


def connection(attempt: Attempt) -> int:
    """The pid of the ssh that is the connection to hostb."""
    return attempt.child("ssh ", "-M", "hostb")


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_guest_moves_to_another_host(far: Bench, kind: str) -> None:
    attempt = far.attempt("--output", "json", kind=kind)
    result = attempt.outcome().succeeded().result
    assert result["guest"] == "the guest runs at the destination"
    assert 0 < result["downtime"]["total"] < 30
    attempt.assert_destination_has_it()


@pytest.mark.parametrize(
    "moment", ["prepared", "launched", "bulk", "converged", "moving RAM", "paused", "last round over", "undecided"]
)
def test_a_connection_that_is_killed_before_the_handover_leaves_the_guest_at_the_source(
    far: Bench, moment: str
) -> None:
    attempt = far.attempt_at(moment)
    kill(connection(attempt))
    attempt.go_on()
    attempt.outcome().failed(1, "the connection to hostb is gone", now="the guest runs at the source")
    attempt.assert_source_has_it()


@pytest.mark.parametrize("moment", ["completed", "started"])
def test_a_connection_that_is_killed_in_the_handover_leaves_one_running_guest(far: Bench, moment: str) -> None:
    attempt = far.attempt_at(moment)
    kill(connection(attempt))
    attempt.go_on()
    outcome = attempt.outcome()
    assert outcome.code in (0, 1), outcome.stderr
    if outcome.code == 0:
        attempt.assert_destination_has_it()
    else:
        assert "the guest runs at the source" in outcome.stderr
        attempt.assert_source_has_it()
