"""What is copied, and over which way: the cases (a) to (g) of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from integration.bench.images import Contents, Format

Way = Literal["unix", "tcp"]


@dataclass(frozen=True)
class Case:
    """`warm`: the destination's files are there with other contents, so that no memory has to be found for them."""

    name: str
    contents: Contents
    format: Format
    way: Way
    disks: int = 1
    warm: bool = False


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
