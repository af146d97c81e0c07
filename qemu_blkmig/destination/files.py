"""Which files are one and the same, whatever they are called: links, bind mounts and device nodes are seen through."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from qemu_blkmig.destination import devices
from qemu_blkmig.destination.sharedfs import shared_file_systems

FileId = tuple[str, int, int]
"""Holds until the host is booted anew (`boot_id`), and among hosts of one kernel."""


def boot_id() -> str:
    """What tells this boot of this kernel from all others (random(4)); containers of one host have the same."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def file_id(path: str | Path) -> FileId | None:
    """What tells the regular file or block device at `path` from all others; None if there is none."""
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)  # noqa: PTH116 - it may be a descriptor's link in /proc
        if stat.S_ISBLK(status.st_mode):
            return "device", status.st_rdev, 0
        if stat.S_ISREG(status.st_mode):
            return "file", status.st_dev, status.st_ino
    return None


def names_everywhere(found: FileId | None) -> list[str]:
    """What a block device (`devices.names`), or a file where several hosts have it mounted, is called on all of them.

    A file is called by its inode, as another one on such a file system may be, too.
    """
    if found is None:
        return []
    kind, device, inode = found
    if kind == "device":
        return devices.names(device)
    shared = shared_file_systems().get(device)
    return [] if shared is None else [f"inode {inode} on {shared}"]


def path_for(process: int | None, name: str) -> Path:
    """Where `name` leads as `process` (None: ours) uses it, which may be relative to its working directory."""
    return Path(name) if process is None else Path(f"/proc/{process}/cwd", name)


def file_id_for(process: int | None, name: str) -> FileId | None:
    """`file_id` for a name as `process` uses it."""
    return file_id(path_for(process, name)) if name else None


def real_path(process: int | None, name: str) -> str:
    """Where links, `..` and the like in a name, as `process` uses it, lead to, whether anything is there or not."""
    try:
        path = os.path.realpath(path_for(process, name))
        # POSIX lets a system give two slashes at the beginning a meaning; Linux does not.
        return f"/{path.lstrip('/')}"
    except ValueError:
        # No name of a file.
        return name


def opened_by(process: int | None) -> set[FileId]:
    """The files that `process` has open, as far as we may know."""
    found: set[FileId | None] = set()
    with contextlib.suppress(OSError):
        found = {file_id(link) for link in Path(f"/proc/{process}/fd").iterdir()}
    return {each for each in found if each is not None}
