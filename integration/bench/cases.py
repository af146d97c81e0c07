"""What is copied, and over which way: the cases of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from integration.bench.images import Contents, Format

Way = Literal["unix", "tcp", "tls", "ssh"]
MIRROR, SSH, CONNECTION, SMALL, NBDCOPY = (
    "blockdev-mirror",
    "ssh",
    "one TCP connection",
    "blkmig, a small disk",
    "nbdcopy",
)
"""Peers that others are compared with."""

DELAY = 0.02
"""Seconds each way of a line that is called delayed: 40 ms there and back."""


@dataclass(frozen=True)
class Case:
    """`warm`: the destination's files are there with other contents, so that no memory has to be found for them.

    `far`: between two hosts (namespaces with a network of their own); there `delay`: seconds that all takes each way,
    `mbit`: Mbit/s of the line.
    """

    name: str
    contents: Contents
    format: Format
    way: Way
    disks: int = 1
    warm: bool = False
    far: bool = False
    delay: float = 0.0
    mbit: int | None = None

    @property
    def baseline(self) -> str:
        """The peer whose speed is 1."""
        if self.contents == "huge":
            return SMALL
        if self.way == "ssh":
            return SSH
        if self.far:
            return CONNECTION
        return NBDCOPY if self.way == "tls" else MIRROR


CASES = (
    Case("full-tcp", "full", "raw", "tcp", warm=True),
    Case("full-unix", "full", "raw", "unix", warm=True),
    Case("full-cold-tcp", "full", "raw", "tcp"),
    Case("full-qcow2-tcp", "full", "qcow2", "tcp"),
    Case("sparse-tcp", "sparse", "raw", "tcp"),
    Case("sparse-qcow2-tcp", "sparse", "qcow2", "tcp"),
    Case("scattered-tcp", "scattered", "raw", "tcp"),
    Case("scattered-qcow2-tcp", "scattered", "qcow2", "tcp"),
    Case("zeroes-tcp", "zeroes", "raw", "tcp"),
    Case("overlay-tcp", "overlay", "qcow2", "tcp"),
    Case("two-disks-tcp", "full", "raw", "tcp", disks=2, warm=True),
    Case("eight-disks-tcp", "full", "raw", "tcp", disks=8, warm=True),
    Case("huge-tcp", "huge", "qcow2", "tcp"),
    Case("full-tls", "full", "raw", "tls", warm=True),
    Case("far-ssh", "full", "raw", "ssh", warm=True, far=True),
    Case("far-tcp", "full", "raw", "tcp", warm=True, far=True),
    Case("far-tls", "full", "raw", "tls", warm=True, far=True),
    Case("delayed-ssh", "full", "raw", "ssh", warm=True, far=True, delay=DELAY),
    Case("delayed-tcp", "full", "raw", "tcp", warm=True, far=True, delay=DELAY),
    Case("delayed-tls", "full", "raw", "tls", warm=True, far=True, delay=DELAY),
    Case("gigabit-ssh", "full", "raw", "ssh", warm=True, far=True, mbit=1000),
    Case("gigabit-tcp", "full", "raw", "tcp", warm=True, far=True, mbit=1000),
    Case("gigabit-tls", "full", "raw", "tls", warm=True, far=True, mbit=1000),
    Case("gigabit-delayed-tcp", "full", "raw", "tcp", warm=True, far=True, delay=DELAY, mbit=1000),
    Case("gigabit-delayed-tls", "full", "raw", "tls", warm=True, far=True, delay=DELAY, mbit=1000),
)


def chosen(names: str | None, *, quick: bool) -> list[Case]:
    """The cases of these names, separated by commas; else all, or the few that `quick` is for."""
    if names is not None:
        wanted = names.split(",")
        unknown = set(wanted) - {case.name for case in CASES}
        if unknown:
            raise ValueError(
                f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in CASES)}"
            )
        return [case for case in CASES if case.name in wanted]
    return [case for case in CASES if not quick or case.name in ("full-tcp", "full-qcow2-tcp", "scattered-tcp")]
