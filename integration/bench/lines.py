"""The line between two hosts that a case is copied over: hosta and hostb of the laboratory, far apart or slow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.bench.cases import Case
from integration.hosts import ADDRESSES, PORT, Hosts, two_hosts
from integration.network import Network

FIRST_PORT = 10809
"""Of hosta; on a line that is delayed, connections to it are."""
CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"
"""What every ssh here prefers, ours by itself (`transport.ciphers`)."""


@dataclass(frozen=True)
class Line:
    """The hosts see each other's files, but for /run; the source is in hosta."""

    hosts: Hosts

    @property
    def here(self) -> Sequence[str]:
        """Before a command that is to run in hosta."""
        return self.hosts.enter

    @property
    def there(self) -> Sequence[str]:
        """Before a command that is to run in hostb."""
        return self.hosts.enter_far

    @property
    def source(self) -> str:
        """hosta's address."""
        return ADDRESSES["hosta"]

    @property
    def ssh(self) -> list[str]:
        """The beginning of a command that ssh is to run in hostb."""
        return [*self.here, "ssh", "-T", "-o", "BatchMode=yes", "-o", f"Ciphers={CIPHERS}", "-p", str(PORT), "hostb"]

    def place(self, target: Path) -> str:
        """hostb's folder, as qemu-blkmig's users name it."""
        return f"ssh://root@hostb:{PORT}{target}"


@contextlib.contextmanager
def line_of(case: Case, directory: Path) -> Iterator[Line | None]:
    """The line that a case wants, with the hosts' files in `directory`; None: it stays on this host. For root only."""
    if not case.far:
        yield None
        return
    with two_hosts(directory=directory) as hosts, contextlib.ExitStack() as stack:
        network = Network(hosts)
        if case.delay:
            stack.enter_context(network.far_away(case.delay, FIRST_PORT))
        network.limit(case.mbit)
        yield Line(hosts)
