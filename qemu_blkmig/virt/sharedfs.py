"""File systems that several hosts mount: what lies there is at the destination already."""

from __future__ import annotations

import os
import re
from pathlib import Path

SHARED = {
    "acfs", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.quobyte", "gfs2", "glusterfs", "gpfs",
    "lustre", "nfs", "nfs4", "ocfs2", "smb3",
}  # fmt: skip
"""By their names in mountinfo; those that libvirt knows as shared (virFileIsSharedFS), and their like."""


def shared_file_system(path: str, mounts: str | None = None) -> str | None:
    """The type of the shared file system that `path` lies on; None where it is none. `mounts`: as of mountinfo."""
    if mounts is None:
        mounts = Path("/proc/self/mountinfo").read_text()
    place = Path(os.path.realpath(path))
    best, kind = Path("/"), ""
    for line in mounts.splitlines():
        words, _, told = line.partition(" - ")
        where = Path(re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), words.split()[4]))
        # Of two that are mounted in one place the later one is seen.
        if place.is_relative_to(where) and len(where.parts) >= len(best.parts):
            best, kind = where, told.split()[0]
    return kind if kind in SHARED else None
