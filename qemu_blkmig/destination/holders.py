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

    Told by the locks that the kernel shows of each open file (proc(5), fdinfo).
    """
    status = Path(path).stat()
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and any(_claims(each) for each in _opened(process, status)):
            return Holder(int(process.name), _is_stopped(process))
    return None


def _opened(process: Path, status: os.stat_result) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                found = descriptor.stat()
                if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
                    yield process / "fdinfo" / descriptor.name


def _claims(information: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(
            line.startswith("lock:") and line.split()[-2:] == [str(locks.JOB)] * 2 and " WRITE " in line
            for line in information.read_text().splitlines()
        )
    return False


def _is_stopped(process: Path) -> bool:
    with contextlib.suppress(OSError):
        told = (process / "stat").read_text()
        return told[told.rindex(")") + 2] in "Tt"
    return False
