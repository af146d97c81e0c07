"""Processes of this machine, by their numbers and command lines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

WATCHDOG = "qemu_blkmig.job.watchdog"
"""In the command line of a job's watchdog."""


def command_line(pid: int) -> str:
    """The command line of a process; empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def sharing(pid: int, kind: str) -> list[int]:
    """Those in the namespace of that kind (net, pid) that `pid` is in."""
    own = _namespace(pid, kind)
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [each for each in pids if own is not None and _namespace(each, kind) == own]


def holding(pids: Iterable[int], *words: str) -> list[int]:
    """Those whose command lines hold all the words."""
    return [pid for pid in pids if all(word in command_line(pid) for word in words)]


def _namespace(pid: int, kind: str) -> Path | None:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/ns/{kind}").readlink()
    return None
