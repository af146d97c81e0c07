"""This host as the destination: the agent is a child process, and every path is what it is."""

from __future__ import annotations

import subprocess

from qemu_blkmig import errors
from qemu_blkmig.destination import protocol
from qemu_blkmig.transport.client import AgentClient, OnProgress
from qemu_blkmig.transport.piped import Piped
from qemu_blkmig.transport.starting import AGENT, start


class LocalHost:
    """See `transport.host.Host`."""

    name = "this host"

    def __init__(self, job: str | None = None, begun: subprocess.Popen[bytes] | None = None) -> None:
        """`job`: whose agents are started. `begun`: the first one, which nobody has spoken to yet."""
        self._job = job
        self._begun = begun

    async def start_agent(self, on_progress: OnProgress | None = None) -> AgentClient:
        """See `Host`."""
        begun, self._begun = self._begun, None
        try:
            process = begun or start(AGENT)
        except OSError as error:
            raise errors.DestinationFailed(f"the agent cannot be started: {error}") from error
        client = AgentClient(await Piped.of(process, protocol.LINE_LIMIT), on_progress)
        try:
            await client.hello(self._job)
        except BaseException:
            await client.abandon()
            raise
        return client

    async def expose(self, socket: str) -> str:
        """See `Host`: the same path."""
        return socket

    async def reach(self, socket: str) -> str:
        """See `Host`: the same path."""
        return socket

    async def close(self) -> None:
        """See `Host`: there is nothing to let go of."""
