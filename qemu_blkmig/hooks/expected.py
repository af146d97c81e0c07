"""What a job tells libvirt's hook of the domain that it migrates, and what the hook notes of it.

`STATE/domains/UUID.json` names the job, the domain and, on the destination, the path that each disk gets there. It
counts only while the process that wrote it lives, which holds a lock on it: what a crash left behind rewrites nothing.
The hook adds a line to `STATE/domains/JOB.log` for all that libvirt does with the domain, and removes the file when the
domain has ended. Its formats are in `qemu.py`, which reads them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from qemu_blkmig.hooks import qemu as hook
from qemu_blkmig.places import state_directory

_KEPT = 100
"""Logs of that many jobs are kept."""


class Happening(NamedTuple):
    """What libvirt did: `operation` and `sub` in the words of its hooks; `when`: UTC, ISO 8601."""

    when: str
    domain: str
    operation: str
    sub: str
    extra: str

    def tell(self) -> str:
        """In one line."""
        return f"{self.when} {self.operation} {self.sub} ({self.domain})"


class Expected:
    """A domain that is expected here (`disks`: path by target), or sent away (no disks), until `close`.

    `peer`: the other host. It replaces what was told of the domain before. Raises `OSError`.
    """

    def __init__(self, job: str, uuid: str, name: str, peer: str, disks: Mapping[str, str]) -> None:
        state = str(state_directory())
        self._path = Path(hook.expected_path(state, uuid.lower()))
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _prune(self._path.parent)
        told = {"version": hook.EXPECTED_VERSION, "job": job, "uuid": uuid.lower(), "name": name, "peer": peer}
        aside = self._path.with_name(f"{self._path.name}.{job}.new")
        self._descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            # Locked before anybody can find it; a lock is on the file, not on its name.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._descriptor, json.dumps({**told, "disks": dict(disks)}, indent=2).encode())
            aside.rename(self._path)
        except OSError:
            os.close(self._descriptor)
            aside.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """The domain is expected no more. What the hook noted stays."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._descriptor), self._path.stat()):
                self._path.unlink()
        os.close(self._descriptor)


def happenings(job: str) -> list[Happening]:
    """What the hook of this host noted of a job's domain, the first first."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path(hook.log_path(str(state_directory()), job)).read_text().splitlines():
            with contextlib.suppress(ValueError, TypeError):
                found.append(Happening(**json.loads(line)))
    return found


def _prune(directory: Path) -> None:
    with contextlib.suppress(OSError):
        logs = sorted(directory.glob("*.log"), key=lambda path: path.stat().st_mtime)
        for path in logs[: -_KEPT or None]:
            path.unlink(missing_ok=True)
