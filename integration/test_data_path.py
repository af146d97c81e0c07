"""The data past ssh: over TCP with TLS, between two hosts, with real guests that write all the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.far import far_laboratory
from integration.hosts import ADDRESSES
from integration.lab import Lab
from integration.luck import Bench
from integration.tool import assert_runs_on, run
from qemu_blkmig.demo.guest import Kernel, Orders

MIB = 1 << 20
PORT = 50123


@pytest.fixture
def far(kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[Bench]:
    with far_laboratory(kernel, initramfs) as lab:
        yield Bench(lab)


def test_a_guest_moves_to_another_host_with_its_data_past_ssh_unless_that_is_cut(far: Bench) -> None:
    attempt = far.attempt_at("bulk", "--data", f"tls://{ADDRESSES['hosta']}:{PORT}")
    reset = ("-p", "tcp", "--dport", str(PORT), "-j", "REJECT", "--reject-with", "tcp-reset")
    far.lab.network.hosts.run("iptables", "-A", "INPUT", "-i", "net0", *reset)  # type: ignore[attr-defined]
    attempt.go_on()
    attempt.outcome().failed(1, f"tls://{ADDRESSES['hosta']}:{PORT}", now="the guest runs at the source")
    attempt.assert_suspended()
    attempt = far.attempt("--output", "json", "--data", "tls://", "--on-stall", "pause", kind="qcow2")
    assert attempt.outcome().succeeded().result["guest"] == "the guest runs at the destination"
    attempt.assert_destination_has_it()


def test_what_is_not_encrypted_has_to_be_asked_for_twice(lab: Lab) -> None:
    guest = lab.boot([lab.disk("disk", 8 * MIB)], Orders(rate=100))
    guest.wait_for_writing(more=10)
    run("copy", guest, lab.target, "--data", "tcp://").failed(2, "--insecure")
    outcome = run("copy", guest, lab.target, "--data", "tcp://127.0.0.1", "--insecure").succeeded()
    assert "everybody on the way can read" in outcome.stderr
    (lab.target / "disk").unlink()
    run("copy", guest, lab.target, "--data", "tls://", "--verify", "full").succeeded()
    run("copy", guest, lab.target, "--data", "tls://192.0.2.1").failed(
        3, "cannot listen on tls://192.0.2.1:0", now="the guest runs at the source"
    )
    assert_runs_on(lab, guest)
