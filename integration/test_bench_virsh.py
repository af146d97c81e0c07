"""The bench of moves beside virsh's runs, in small: each row is encrypted or not, as it says, and has its own peers."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.bench import virsh
from integration.hosts import Hosts
from integration.thorough import also
from integration.virtlab import VirtLab
from qemu_blkmig.demo.guest import Writer
from qemu_blkmig.demo.records import MAGIC

MIB = 1 << 20
READABLE = ("OUTPUT", "-o", "net0", "-m", "string", "--algo", "kmp", "--string", MAGIC.decode())
"""Packets to hostb in which a record of the guest's writer begins: of its disk, or of its RAM."""


@pytest.fixture(scope="module")
def watched() -> Iterator[VirtLab]:
    """A laboratory of the bench, whose READABLE packets are counted."""
    with virsh.laboratory(Path("/dev/shm"), None) as lab:
        lab.hosts.run("iptables", "-A", *READABLE)
        yield lab


def readable(hosts: Hosts) -> int:
    """How many READABLE packets there were since the last look."""
    (packets,) = re.findall(
        rf'^ *(\d+) .*"{MAGIC.decode()}"', hosts.run("iptables", "-Z", "-vnxL", "OUTPUT"), re.MULTILINE
    )
    return int(packets)


OFTEN = ("virsh, TLS", "blkmig")


@pytest.mark.parametrize("name", [*OFTEN, *also(*(each for each in virsh.ROWS if each not in OFTEN))])
def test_a_guest_is_moved_and_what_is_called_encrypted_cannot_be_read_on_the_way(watched: VirtLab, name: str) -> None:
    row = virsh.ROWS[name]
    image = f"{list(virsh.ROWS).index(name)}.qcow2"
    readable(watched.hosts)
    moved = virsh.Bench(watched, 64 * MIB, 10000).move(row, image, "idle")
    assert bool(readable(watched.hosts)) != row.encrypted
    assert moved.seconds > 0 and moved.gap > 0 and bool(moved.phases) == row.ours


def test_the_command_has_every_row_in_every_round_over_the_network_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def move(bench: virsh.Bench, row: virsh.Row, name: str, writer: Writer) -> virsh.Move:
        lines = [bench.lab.hosts.run("tc", "qdisc", "show", "dev", "net0", far=far) for far in (False, True)]
        assert all(" rate 1Gbit " in line for line in lines), lines
        seen.append((writer, row))
        return virsh.Move(1.0, 0.1, {})

    monkeypatch.setattr(virsh.Bench, "move", move)
    # It forks.
    monkeypatch.setattr(virsh, "go_on_under_an_init", lambda: None)
    monkeypatch.setattr(sys, "argv", ["virsh", "--rounds", "2", "--writers", "idle,hot", "--network", "1Gbit"])
    virsh.main()
    rows = list(virsh.ROWS.values())
    turns = [*rows, *rows[1:], rows[0]]
    assert seen == [(writer, row) for writer in ("idle", "hot") for row in turns]
    assert "line: 1000 Mbit/s" in capsys.readouterr().out


def test_a_move_is_told_by_the_speed_of_its_own_peers(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = dict(zip(virsh.ROWS, (1.0, 4.0, 2.0, 1.0, 2.0, 0.5, 0.5), strict=True))
    virsh.tell("idle", {name: [virsh.Move(took, 0.1, {})] for name, took in seconds.items()})
    told = re.split(r"^idle +", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    ratios = {text[:15].strip(): re.findall(r"by that of (.*): +(\S+) ", text) for text in told}
    assert ratios == {
        "virsh": [],
        "virsh, TLS": [("virsh", "0.25")],
        "blkmig": [("virsh, TLS", "2.00"), ("virsh", "0.50")],
        "blkmig, unread": [("virsh, TLS", "4.00"), ("virsh", "1.00")],
        "blkmig, TLS": [("virsh, TLS", "2.00"), ("virsh", "0.50")],
        "blkmig, TCP": [("virsh", "2.00")],
        "blkmig, bare": [("virsh", "2.00")],
    }


@pytest.mark.parametrize(("text", "mbit"), [("1Gbit", 1000), ("100Mbit", 100)])
def test_a_network_is_named_by_its_rate(text: str, mbit: int) -> None:
    assert virsh.megabits(text) == mbit


@pytest.mark.parametrize("text", ["1000", "0Gbit", "1Gbyte", "fast"])
def test_what_is_no_rate_of_a_network_is_told(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"100Mbit or 1Gbit: '{text}'"):
        virsh.megabits(text)
