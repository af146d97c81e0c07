"""The host that a job's place is on."""

from __future__ import annotations

import subprocess
from pathlib import Path

from qemu_blkmig.job.place import Local, Place, Ssh
from qemu_blkmig.transport.host import Host
from qemu_blkmig.transport.local import LocalHost
from qemu_blkmig.transport.ssh import SshHost


def host_of(place: Place, runtime: Path, job: str | None = None, begun: subprocess.Popen[bytes] | None = None) -> Host:
    """The host of `place`; `runtime`: this host's private directory for the sockets that lead there.

    `job`: whose agents are started there, None for such that only look. `begun`: the first one, where it is this host.
    """
    match place:
        case Local():
            return LocalHost(job, begun)
        case Ssh():
            return SshHost(place.host, place.user, place.port, place.remote_command, runtime, job)
