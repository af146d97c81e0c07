"""The unix sockets of a job's migrations by libvirt: one path on both hosts, in a directory where libvirt's QEMUs may
make sockets. What a migration that came to nothing leaves of them goes with the job.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

SYSTEM = "/var/lib/libvirt/qemu"
"""Of the system's libvirt, on every host."""
SESSION = "/tmp"


def socket_path(job: str, number: int, *, session: bool) -> str:
    """The socket of the job's migration `number`; `session`: of a user's own libvirt."""
    return f"{SESSION if session else SYSTEM}/blkmig-{job}-{number}.sock"


def remove(job: str) -> None:
    """Remove all that the job left on this host."""
    for directory in (SYSTEM, SESSION):
        for path in Path(directory).glob(f"blkmig-{job}-*.sock"):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    path.unlink()
