"""A migration's destination side in small: an agent, a source export, disks opened between them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qemu_blkmig.destination import protocol
from qemu_blkmig.nbd.address import UnixAddress
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.local import LocalHost

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.fixture
async def agent() -> AsyncIterator[AgentClient]:
    """A local agent; abandoned in the end."""
    client = await LocalHost().start_agent()
    yield client
    await client.abandon()


def image(path: Path, size: int, **settings: object) -> protocol.Image:
    """A raw image to be created for disk `d`, but for `settings`."""
    return protocol.Image(**{"disk": "d", "path": str(path), "format": "raw", "size": size, "create": True} | settings)  # type: ignore[arg-type]


def opening(socket: Path, **settings: object) -> protocol.Open:
    """Disk `d` from export `disk`, but for `settings`."""
    usual = {"disk": "d", "source": UnixAddress(str(socket)), "export": "disk", "connections": 1, "requests": 4}
    usual |= {"request_size": 4 * MIB, "zero_unit": 64 * KIB}
    return protocol.Open(**usual | settings)  # type: ignore[arg-type]


async def opened(agent: AgentClient, destination: protocol.Image, open_: protocol.Open) -> None:
    """Prepare and open one disk."""
    await agent.request(protocol.Prepare([destination]))
    await agent.request(open_)


def bulk(*extents: tuple[int, int]) -> protocol.Copy:
    """A bulk copy of disk `d`."""
    return protocol.Copy("d", "bulk", list(extents))


def dirty(*extents: tuple[int, int]) -> protocol.Copy:
    """A dirty copy of disk `d`."""
    return protocol.Copy("d", "dirty", list(extents))
