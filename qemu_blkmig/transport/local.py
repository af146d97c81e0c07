"""This host as the destination: the agent is a child process, and every path is what it is."""

from __future__ import annotations

import asyncio
import sys

from qemu_blkmig import errors
from qemu_blkmig.destination import protocol
from qemu_blkmig.transport.client import AgentClient, OnProgress


class LocalHost:
    """See `transport.host.Host`."""

    name = "this host"

    def __init__(self, job: str | None = None) -> None:
        """`job`: whose agents are started."""
        self._job = job

    async def start_agent(self, on_progress: OnProgress | None = None) -> AgentClient:
        """See `Host`. The agent is in a session of its own, so that Ctrl-C reaches only the coordinator."""
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "qemu_blkmig.destination.agent",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=protocol.LINE_LIMIT,
                start_new_session=True,
            )
        except OSError as error:
            raise errors.DestinationFailed(f"the agent cannot be started: {error}") from error
        client = AgentClient(process, on_progress)
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
