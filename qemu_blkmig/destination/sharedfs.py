"""File systems that several hosts mount: what lies there is at the destination already."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

SHARED = {
    "acfs", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.quobyte", "gfs2", "glusterfs", "gpfs",
    "lustre", "nfs", "nfs4", "ocfs2", "smb3",
}  # fmt: skip
"""By their names in mountinfo; those that libvirt knows as shared (virFileIsSharedFS), and their like."""
MOUNTS = Path("/proc/self/mountinfo")


def shared_file_system(path: str, mounts: str | None = None) -> str | None:
    """The type of the shared file system that `path` lies on; None where it is none. `mounts`: as of mountinfo."""
    place = Path(os.path.realpath(path))
    best, kind = Path("/"), ""
    for words, told in _mounted(mounts):
        where = Path(re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), words[4]))
        # Of two that are mounted in one place the later one is seen.
        if place.is_relative_to(where) and len(where.parts) >= len(best.parts):
            best, kind = where, told
    return kind if kind in SHARED else None


def shared_file_systems(mounts: str | None = None) -> dict[int, str]:
    """The types of those that are mounted here, by their device (st_dev)."""
    numbers = {words[2]: told for words, told in _mounted(mounts) if told in SHARED}
    return {os.makedev(*map(int, number.split(":"))): told for number, told in numbers.items()}


def _mounted(mounts: str | None) -> Iterator[tuple[list[str], str]]:
    """The words of each line before the type, and that."""
    # Names may have any byte but those that are escaped, and what Python takes for white space, too.
    for line in (os.fsdecode(MOUNTS.read_bytes()) if mounts is None else mounts).strip("\n").split("\n"):
        words, _, told = line.partition(" - ")
        yield words.split(" "), told.split(" ")[0]
