"""The destination host: how its agent, and unix sockets on either side, are reached."""

from __future__ import annotations

from typing import Protocol

from qemu_blkmig.transport.client import AgentClient, OnProgress


class Host(Protocol):
    """A host with storage for images: `transport.local.LocalHost`, `transport.ssh.SshHost`."""

    name: str
    """For messages: "this host", "hostb"."""

    async def start_agent(self, on_progress: OnProgress | None = None) -> AgentClient:
        """An agent there that has answered hello; it ends before `close`, or with it.

        Raises `DestinationFailed` when the host or the agent cannot be reached, `Refused` when it speaks another
        protocol.
        """

    async def expose(self, socket: str) -> str:
        """The path there of a unix socket that leads to the unix socket `socket` here. Raises `DestinationFailed`."""

    async def reach(self, socket: str) -> str:
        """The path here of a unix socket that leads to the unix socket `socket` there. Raises `DestinationFailed`."""

    async def close(self) -> None:
        """Let go of the host. Safe to call twice."""
