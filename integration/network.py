"""What a network may do to the two hosts of integration.hosts: be cut, lose or reset packets, be slow or far away."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pytest

from integration.hosts import ADDRESSES, PORT, REPOSITORY, TIED, Hosts, children, plain_environment
from integration.lab import LabError, wait_until
from qemu_blkmig.transport.route import COMMAND_VARIABLE

RELAY_PORT = 2223
BURST = 4
"""Milliseconds for which a line that was idle, or whose timer was late, may go on faster: it is late on a busy machine,
where a gigabit with less carries 0.3 Gbit/s."""


@dataclass(frozen=True, slots=True)
class Network:
    """The network between the hosts; every fault stays until it is undone."""

    hosts: Hosts

    def down(self) -> None:
        """Pull the cable: nothing arrives, nobody is told."""
        self.hosts.run("ip", "link", "set", "net0", "down", far=True)

    def up(self) -> None:
        """Plug it in again; a search for hostb that began before, and is about to fail, fails nobody who asks now."""
        self.hosts.run("ip", "link", "set", "net0", "up", far=True)
        self.hosts.run("ip", "neigh", "flush", "dev", "net0")

    def cut(self, seconds: float) -> None:
        """Have it down for so long; returns when it is up again."""
        self.down()
        time.sleep(seconds)
        self.up()

    @contextlib.contextmanager
    def losing(self, share: float) -> Iterator[None]:
        """Lose this share (0 to 1) of the packets that arrive in hosta."""
        rule = ("INPUT", "-i", "net0", "-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP")
        self.hosts.run("iptables", "-A", *rule)
        try:
            yield
        finally:
            self.hosts.run("iptables", "-D", *rule)

    @contextlib.contextmanager
    def resetting(self) -> Iterator[None]:
        """Answer every packet to hostb's sshd with a reset, as a firewall does that has forgotten its connections."""
        reset = ("-j", "REJECT", "--reject-with", "tcp-reset")
        rule = ("INPUT", "-i", "net0", "-p", "tcp", "--dport", str(PORT), *reset)
        self.hosts.run("iptables", "-A", *rule, far=True)
        try:
            yield
        finally:
            self.hosts.run("iptables", "-D", *rule, far=True)

    def limit(self, mbit: int | None) -> None:
        """Limit each direction to so many Mbit/s; None: no limit."""
        for far in (False, True):
            with contextlib.suppress(LabError):
                self.hosts.run("tc", "qdisc", "del", "dev", "net0", "root", far=far)
            if mbit is not None:
                burst = max(1 << 16, BURST * mbit * 1000 // 8)
                shape = ("tbf", "rate", f"{mbit}mbit", "burst", f"{burst}b", "latency", "200ms")
                self.hosts.run("tc", "qdisc", "add", "dev", "net0", "root", *shape, far=far)

    @contextlib.contextmanager
    def delayed(self, seconds: float) -> Iterator[int]:
        """A port of hosta's localhost that leads to hostb's sshd, each way taking so many seconds."""
        with relayed(self.hosts.enter, RELAY_PORT, ADDRESSES["hostb"], PORT, seconds):
            yield RELAY_PORT

    @contextlib.contextmanager
    def far_away(self, seconds: float, *ports: int) -> Iterator[None]:
        """Have connections to these ports of hosta, and to hostb's sshd, take so many seconds each way."""
        with contextlib.ExitStack() as stack:
            for number, (port, far) in enumerate([*((port, False) for port in ports), (PORT, True)], RELAY_PORT):
                # What the relay sends itself does not come from outside: it is not led back to it.
                rule = ("-i", "net0", "-p", "tcp", "--dport", port, "-j", "REDIRECT", "--to-ports", number)
                self.hosts.run("iptables", "-t", "nat", "-A", "PREROUTING", *rule, far=far)
                stack.callback(self.hosts.run, "iptables", "-t", "nat", "-D", "PREROUTING", *rule, far=far)
                address = ADDRESSES["hostb" if far else "hosta"]
                enter = self.hosts.enter_far if far else self.hosts.enter
                stack.enter_context(relayed(enter, number, address, port, seconds))
            yield

    @contextlib.contextmanager
    def like(self, line: Literal["plain", "delayed", "slow"]) -> Iterator[None]:
        """Have the tool reach hostb over such a line: delayed by 20 ms each way, or slow: 40 Mbit/s."""
        with contextlib.ExitStack() as stack:
            if line == "delayed":
                port = stack.enter_context(self.delayed(0.02))
                way = f"-o HostName=127.0.0.1 -o HostKeyAlias=[{ADDRESSES['hostb']}]:{PORT} -o Port={port}"
                stack.enter_context(pytest.MonkeyPatch.context()).setenv(COMMAND_VARIABLE, f"ssh {way}")
            elif line == "slow":
                self.limit(40)
            yield

    def kill_connections(self) -> int:
        """SIGKILL each sshd process of hostb that serves a connection; how many there were."""
        found = self.hosts.connections()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not set(found) & set(self.hosts.connections()), "the end of the connections", 10)
        return len(found)


@contextlib.contextmanager
def relayed(enter: Sequence[str], port: int, host: str, leads_to: int, seconds: float) -> Iterator[None]:
    """A relay (`integration.relay`) at a port of one of the hosts."""
    command = [*TIED, *enter, sys.executable, "-m", "integration.relay", str(port), host, str(leads_to), str(seconds)]
    environment = {**plain_environment(), "PYTHONPATH": str(REPOSITORY)}
    relay = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, env=environment)
    try:
        if relay.stdout is None or relay.stdout.readline() != b"ready\n":
            raise LabError("the relay does not start")
        yield
    finally:
        for pid in children(relay.pid):
            os.kill(pid, signal.SIGKILL)
        relay.kill()
        relay.communicate()
