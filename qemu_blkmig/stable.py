"""Names of files that outlast a crash of the host: a directory's entry is stable only once the directory is synced."""

from __future__ import annotations

import os
from pathlib import Path


def sync_entry(path: Path) -> None:
    """Make the directory entry of `path`, or that there is none, stable. Raises `OSError`."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_for_good(path: Path) -> None:
    """Remove the file, if it is there, so that no crash of the host brings it back. Raises `OSError`."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    sync_entry(path)
