"""What ssh says when it fails is kept, its meaning is recognized, and what to do is told."""

from __future__ import annotations

import pytest

from qemu_blkmig.errors import BlkmigError, DestinationFailed, Refused
from qemu_blkmig.transport.ssh_words import failure_of


@pytest.mark.parametrize(
    ("said", "status", "kind", "advice"),
    [
        ("Host key verification failed.", 255, Refused, "fingerprint"),
        (
            "@  WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!  @\nHost key verification failed.",
            255,
            Refused,
            "-R hostb",
        ),
        ("root@hostb: Permission denied (publickey).", 255, Refused, "authorized_keys"),
        ("ssh: Could not resolve hostname hostb: Name or service not known", 255, Refused, "/etc/hosts"),
        ("ssh: connect to host hostb port 22: No route to host", 255, DestinationFailed, "is hostb up"),
        ("ssh: connect to host hostb port 22: Connection refused", 255, DestinationFailed, "is sshd running"),
        ("ssh: connect to host hostb port 22: Connection timed out", 255, DestinationFailed, "firewall"),
        ("something new", 255, DestinationFailed, "ssh hostb true"),
        ("sh: 1: blkmig: not found", 127, Refused, "install qemu-blkmig on hostb"),
        ("sh: 1: blkmig: Permission denied", 126, Refused, "permissions"),
        ("invalid choice: 'receive'", 2, DestinationFailed, "the same version"),
    ],
)
def test_what_ssh_says_is_explained(said: str, status: int, kind: type[BlkmigError], advice: str) -> None:
    error = failure_of(said, "hostb", "blkmig", status)
    assert type(error) is kind
    assert said in str(error)
    assert advice in (error.advice or "")
