"""To another host over a real ssh: a guest moves, and when the connection dies it runs on exactly one side."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.far import FarLab, far_laboratory
from integration.hosts import ADDRESSES
from integration.lab import wait_until
from integration.luck import Attempt, Bench, command, kill
from integration.thorough import also
from integration.tool import assert_writes_soundly
from qemu_blkmig.demo.guest import Kernel

MANUAL = Path(__file__).parent.parent / "docs" / "howto" / "two-hosts.md"


@pytest.fixture(scope="module")
def far(kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[Bench]:
    """A guest in hosta that is shared by the tests of this file, as long as they leave it running."""
    with far_laboratory(kernel, initramfs) as lab:
        yield Bench(lab)


def connection(attempt: Attempt) -> int:
    """The pid of the ssh that is the connection to hostb."""
    return attempt.child("ssh ", "-M", "hostb")


def lab_of(far: Bench) -> FarLab:
    """The bench's laboratory."""
    assert isinstance(far.lab, FarLab)
    return far.lab


@contextlib.contextmanager
def forced_command(far: Bench, root: Path, more: str = "") -> Iterator[None]:
    """hosta's key is good for nothing in hostb but what the manual's line for authorized_keys says, with `root`."""
    line = next(line for line in MANUAL.read_text().splitlines() if line.startswith('command="'))
    options = line.split(" ssh-ed25519 ")[0].strip().replace("/srv/vm", f"{root}{more}")
    hosts = lab_of(far).hosts
    with sshd(far, "PermitListen none"), authorized(far, options):
        said = len(hosts.log)
        yield
        assert "forced-command (key-option)" in hosts.log[said:]


@contextlib.contextmanager
def authorized(far: Bench, options: str) -> Iterator[None]:
    """hosta's key has these options in hostb's authorized_keys."""
    # A bench that needs a new guest puts hostb in order first.
    far.guest()
    hosts = lab_of(far).hosts
    hosts.authorize(options)
    try:
        yield
    finally:
        hosts.authorize()


@contextlib.contextmanager
def sshd(far: Bench, *options: str) -> Iterator[None]:
    """hostb's sshd has these options."""
    far.guest()
    lab_of(far).hosts.start_sshd(*options)
    try:
        yield
    finally:
        lab_of(far).hosts.start_sshd()


@pytest.mark.parametrize("kind", ["qcow2", *also("raw")])
def test_a_guest_moves_to_another_host(far: Bench, kind: str) -> None:
    attempt = far.attempt("--output", "json", kind=kind)
    result = attempt.outcome().succeeded().result
    assert result["guest"] == "the guest runs at the destination"
    assert 0 < result["downtime"]["total"] < 30
    attempt.assert_destination_has_it()


KEPT = ["bulk", "converged", "moving RAM", "paused", "last round over"]
"""What fails then can be resumed."""


def test_ram_goes_from_qemu_to_qemu_where_that_is_asked_for(far: Bench) -> None:
    attempt = far.attempt("--ram-uri", f"tcp:{ADDRESSES['hostb']}:50124")
    outcome = attempt.outcome().succeeded()
    assert "crosses the network in plain text" in outcome.stderr
    attempt.assert_destination_has_it()


@pytest.mark.parametrize(
    "moment",
    ["paused", "undecided", *also("bulk", "prepared", "launched", "converged", "moving RAM", "last round over")],
)
def test_a_connection_that_is_killed_before_the_handover_leaves_the_guest_at_the_source(
    far: Bench, moment: str
) -> None:
    attempt = far.attempt_at(moment)
    kill(connection(attempt))
    attempt.go_on()
    attempt.outcome().failed(1, "the connection to hostb is gone", now="the guest runs at the source")
    attempt.assert_given_up(suspended=moment in KEPT)


@pytest.mark.parametrize("moment", ["started", *also("completed")])
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


@pytest.mark.parametrize("moment", ["undecided", *also("bulk", "paused", "started")])
def test_the_watchdog_settles_over_a_connection_of_its_own(far: Bench, moment: str) -> None:
    attempt = far.attempt_at(moment)
    attempt.signal(signal.SIGKILL)
    if moment == "started":
        assert "the guest runs at the destination" in attempt.outcome().stderr
        attempt.assert_destination_has_it()
    else:
        assert "the guest runs at the source" in attempt.outcome().stderr
        attempt.assert_given_up(suspended=moment in KEPT)


def test_a_host_that_is_gone_for_good_does_not_keep_the_guest_and_is_tidied_up_later(far: Bench) -> None:
    attempt = far.attempt_at("bulk")
    job = attempt.job()
    lab_of(far).network.down()
    try:
        outcome = attempt.outcome().failed(1, "the connection to hostb is gone", now="the guest runs at the source")
        assert f"qemu-blkmig cleanup {job}" in outcome.stderr
        assert_writes_soundly(attempt.source)
    finally:
        lab_of(far).network.up()
    wait_until(lambda: not lab_of(far).hosts.connections(), "the end of what hostb has of it", 60)
    command("cleanup", job, lab=far.lab).succeeded()
    attempt.assert_source_has_it()


@pytest.mark.parametrize("moment", ["paused", *also("continued", "undecided")])
def test_a_guest_that_stands_still_does_not_wait_for_a_silent_host(far: Bench, moment: str) -> None:
    attempt = far.attempt_at(moment)
    job = attempt.job()
    lab_of(far).network.down()
    try:
        attempt.go_on()
        # For 5 s; if a round was under way at the pause, it is given 10 s to end.
        outcome = attempt.outcome().failed(1, "did not answer for", now="the guest runs at the source")
        assert f"qemu-blkmig cleanup {job}" in outcome.stderr
        assert_writes_soundly(attempt.source)
    finally:
        lab_of(far).network.up()
    wait_until(lambda: not lab_of(far).hosts.connections(), "the end of what hostb has of it", 60)
    command("cleanup", job, lab=far.lab).succeeded()
    attempt.assert_source_has_it()


def test_a_host_that_goes_when_it_was_told_to_start_the_guest_is_for_a_person_to_judge(far: Bench) -> None:
    attempt = far.attempt_at("completed")
    job = attempt.job()
    lab_of(far).network.down()
    attempt.go_on()
    outcome = attempt.outcome()
    # What was under way to it when the network failed will not arrive.
    lab_of(far).hosts.power_off()
    assert outcome.code == 4, outcome.stderr
    assert outcome.stderr.count(f"qemu-blkmig cleanup {job}") == 2
    assert attempt.source.status() != "running"
    command("cleanup", job, lab=far.lab).failed(4, "only if hostb is off")
    off = command("cleanup", job, "--destination-is-off", lab=far.lab).failed(4, "the guest runs at the source")
    assert "but is said to be off" in off.stderr
    assert_writes_soundly(attempt.source)
    lab_of(far).restore()
    command("cleanup", job, lab=far.lab).succeeded()
    attempt.assert_source_has_it()


def test_a_forced_command_that_allows_launching_moves_a_guest_below_its_root(far: Bench) -> None:
    with forced_command(far, far.lab.target, " --allow-launch"):
        attempt = far.attempt()
        attempt.outcome().succeeded()
        attempt.assert_destination_has_it()


@pytest.mark.parametrize(
    ("root", "more", "words"),
    [("target", "", "launches no programs"), ("bin", " --allow-launch", "out of bounds")],
    ids=["launch", "elsewhere"],
)
def test_a_forced_command_bounds_whoever_has_the_key(far: Bench, root: str, more: str, words: str) -> None:
    with forced_command(far, lab_of(far).hosts.far / root, more):
        attempt = far.attempt()
        attempt.outcome().failed(3, words, now="the guest runs at the source")
        attempt.assert_source_has_it()


@pytest.mark.parametrize("option", ["AllowStreamLocalForwarding no", "PermitOpen none"])
def test_a_server_that_forwards_no_sockets_is_told_of(far: Bench, option: str) -> None:
    with sshd(far, option):
        attempt = far.attempt()
        outcome = attempt.outcome().failed(3, "does not let us forward a unix socket")
        assert option.split()[0] in outcome.stderr
        attempt.assert_source_has_it()


@pytest.mark.parametrize(
    ("remote", "words"),
    [
        ("no-such-command", "there is no no-such-command on hostb"),
        ("/etc/passwd", "/etc/passwd cannot be run on hostb"),
        ("true", "the agent on hostb ended with status 0"),
        # That is ended by us, which is no status of the agent's.
        ("yes", "the agent at the destination is gone"),
    ],
)
def test_an_agent_that_is_not_there_is_told_of(far: Bench, remote: str, words: str) -> None:
    attempt = far.attempt("--remote-command", remote)
    outcome = attempt.outcome()
    assert outcome.code in (1, 3), outcome.stderr
    outcome.failed(outcome.code, words, now="the guest runs at the source")
    attempt.assert_source_has_it()


def test_a_login_shell_that_greets_does_no_harm(far: Bench) -> None:
    far.guest()
    bashrc = lab_of(far).hosts.bashrc
    greeted = lab_of(far).hosts.far / "greeted"
    bashrc.write_text(f"echo welcome to hostb\necho >>{greeted}\n")
    try:
        attempt = far.attempt()
        attempt.outcome().succeeded()
        attempt.assert_destination_has_it()
        assert greeted.exists()
    finally:
        bashrc.write_text("")


def test_a_key_that_is_not_accepted_is_told_of(far: Bench) -> None:
    with authorized(far, 'from="192.0.2.1"'):
        attempt = far.attempt()
        attempt.outcome().failed(3, "Permission denied", "authorized_keys", now="the guest runs at the source")
        attempt.assert_source_has_it()
