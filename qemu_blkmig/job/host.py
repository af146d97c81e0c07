"""The host that a job's place is on."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from qemu_blkmig.job.beginning import Beginning
from qemu_blkmig.job.place import Local, Place, Ssh
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.host import Host
from qemu_blkmig.transport.local import LocalHost
from qemu_blkmig.transport.route import Route
from qemu_blkmig.transport.ssh import SshHost


def host_of(place: Place, runtime: Path, job: str | None = None, beginning: Beginning | None = None) -> Host:
    """The host of `place`; `runtime`: this host's private directory for the sockets that lead there.

    `job`: whose agents are started there, None for such that only look. `beginning`: has begun to lead there.
    """
    match place:
        case Local():
            return LocalHost(job, beginning.take_agent() if beginning is not None else None)
        case Ssh():
            route = Route(place.host, place.user, place.port, place.remote_command)
            return SshHost(route, runtime, job, beginning.take_connection() if beginning is not None else None)


async def looking_at(place: Place, stack: contextlib.AsyncExitStack) -> tuple[Host, AgentClient]:
    """The host of `place`, and an agent there that only looks; both are let go of with `stack`.

    Raises `Refused`, `DestinationFailed`.
    """
    host = host_of(place, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blkmig-look-"))))
    stack.push_async_callback(host.close)
    agent = await host.start_agent()
    stack.push_async_callback(agent.close)
    return host, agent
