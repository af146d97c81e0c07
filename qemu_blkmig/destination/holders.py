"""Which agent it is that has claimed an image, where it does not let go: its locks themselves tell nothing of that."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qemu_blkmig.destination import locks


class Holder(NamedTuple):
    """A process of this host; `stopped`: it is, by a signal (SIGSTOP), and does nothing before it is let go on."""

    pid: int
    stopped: bool

    def __str__(self) -> str:
        return f"process {self.pid}{' (stopped by a signal)' if self.stopped else ''}"


def claimant(path: str) -> Holder | None:
    """The process that holds an agent's lock on the image; None: nobody does, or we may not see it. Raises `OSError`.

    Told by the locks that the kernel shows of each open file (proc(5), fdinfo). Only a file that has such a lock is
    looked at itself: others may lie on storage that hangs.
    """
    status = Path(path).stat()
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and any(_leads_to(each, status) for each in _claimed(process)):
            return Holder(int(process.name), _is_stopped(process))
    return None


def _claimed(process: Path) -> Iterator[Path]:
    """Its descriptors that hold an agent's lock."""
    with contextlib.suppress(OSError):
        for information in (process / "fdinfo").iterdir():
            with contextlib.suppress(OSError):
                if any(map(_is_claim, information.read_text().splitlines())):
                    yield process / "fd" / information.name


def _is_claim(line: str) -> bool:
    return line.startswith("lock:") and line.split()[-2:] == [str(locks.JOB)] * 2 and " WRITE " in line


def _leads_to(descriptor: Path, status: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        found = descriptor.stat()
        return (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino)
    return False


def _is_stopped(process: Path) -> bool:
    with contextlib.suppress(OSError):
        told = (process / "stat").read_text(errors="replace")
        return told[told.rindex(")") + 2] in "Tt"
    return False
