"""Digests of base images, remembered by what identifies every file of their chains: a changed file is read again."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from qemu_blkmig.places import state_directory

MOST = 256
"""Digests that are remembered, the newest ones."""
SETTLED = 2.0
"""Seconds that must lie between a file's last change and its digest: time stamps are no finer on some file systems, and
a second change within one of their ticks would not be seen."""

Identity = tuple[tuple[str, int, int, int, int, int], ...]
"""Of each file: path, device, inode, size, mtime and ctime in ns."""

_log = logging.getLogger(__name__)


class _Entry(msgspec.Struct, frozen=True):
    files: Identity
    algorithm: str
    digest: bytes


def identity(files: Sequence[str]) -> Identity | None:
    """What tells whether the files are as they were; None where nothing does: block devices, remote images."""
    found = []
    for path in files:
        try:
            status = os.stat(path)  # noqa: PTH116 - alike for strings
        except (OSError, ValueError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        found.append((path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(found)


def settled(files: Identity) -> bool:
    """Whether any change from now on will be seen: none was so lately that a later one may look like it."""
    return max(max(mtime, ctime) for *_, mtime, ctime in files) <= (time.time() - SETTLED) * 1e9


class BaseCache:
    """A file in this host's state directory. That it cannot be read or written costs time, never a failure."""

    def __init__(self, place: Path | None = None) -> None:
        self._place = place or state_directory() / "bases.json"

    def find(self, files: Identity, algorithm: str) -> bytes | None:
        """The digest of a base made of just these files."""
        for entry in self._read():
            if entry.files == files and entry.algorithm == algorithm:
                return entry.digest
        return None

    def keep(self, files: Identity, algorithm: str, digest: bytes) -> None:
        """Remember a digest, unless a file changed so lately that a later change may look like this one."""
        if not settled(files):
            return
        paths = [file[0] for file in files]
        others = [
            entry
            for entry in self._read()
            if [file[0] for file in entry.files] != paths or entry.algorithm != algorithm
        ]
        try:
            self._write([*others, _Entry(files, algorithm, digest)][-MOST:])
        except OSError as error:
            _log.warning("%s cannot be written (%s): bases are read again next time", self._place, error)

    def _read(self) -> list[_Entry]:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._place.read_bytes(), type=list[_Entry])
        return []

    def _write(self, entries: Sequence[_Entry]) -> None:
        self._place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".bases-", dir=self._place.parent)
        try:
            with open(descriptor, "wb") as file:  # noqa: PTH123 - it is a descriptor
                file.write(msgspec.json.encode(entries))
            Path(name).replace(self._place)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
