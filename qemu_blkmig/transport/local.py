"""Starts the agent as a child process on this host."""

from __future__ import annotations

import asyncio
import sys

from qemu_blkmig import errors
from qemu_blkmig.destination import protocol
from qemu_blkmig.transport.client import AgentClient, OnProgress


async def start_local(on_progress: OnProgress | None = None) -> AgentClient:
    """An agent that has answered hello, in a session of its own, so that Ctrl-C reaches only the coordinator.

    Raises `DestinationFailed` when it cannot be started, `Refused` when it speaks another protocol.
    """
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
        await client.hello()
    except BaseException:
        await client.abandon()
        raise
    return client
