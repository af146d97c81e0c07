"""An agent that hears nothing any more ends itself: what a dead network leaves must not stay locked."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from qemu_blkmig.destination import agent, protocol
from qemu_blkmig.destination.confine import NO_BOUNDS

MIB = 1 << 20
LIMIT = 0.3


class Coordinator:
    """One that speaks to an agent in this process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, op: protocol.Operation) -> protocol.Outcome:
        """Say one line, and hear its answer."""
        self._writer.write(msgspec.json.encode(protocol.Request(1, op)) + b"\n")
        return msgspec.json.decode(await self._reader.readline(), type=protocol.Reply).outcome


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[Coordinator, asyncio.Task[int]]]:
    """An agent, and its coordinator; the task is the agent's life, whose result is its exit status."""
    mine, its = socket.socketpair()
    serves = asyncio.create_task(agent.Agent(*await asyncio.open_connection(sock=its), NO_BOUNDS).serve())
    reader, writer = await asyncio.open_connection(sock=mine)
    try:
        yield Coordinator(reader, writer), serves
    finally:
        writer.close()
        await serves


@pytest.fixture(autouse=True)
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence counts after moments."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(protocol, "SILENCE", LIMIT)
    monkeypatch.setattr(agent, "_GRACE", 0.05)


async def test_an_agent_that_hears_nothing_removes_what_is_incomplete_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    async with serving() as (coordinator, serves):
        await coordinator.ask(protocol.Hello("0", protocol.PROTOCOL, "cafe"))
        image = protocol.Image(disk="d", path=str(path), format="raw", size=MIB, create=True)
        assert isinstance(await coordinator.ask(protocol.Prepare([image])), protocol.PrepareReply)
        assert path.exists()
        # The connection stands all the while.
        assert await serves == agent.EXIT_LEFT
    assert not list(tmp_path.iterdir())


async def test_an_agent_that_nobody_has_spoken_to_yet_waits_longer() -> None:
    async with serving() as (coordinator, serves):
        await asyncio.wait({serves}, timeout=2 * LIMIT)
        assert isinstance(await coordinator.ask(protocol.Ping()), protocol.Done)
        assert await serves == agent.EXIT_LEFT


async def test_an_agent_that_is_pinged_stays() -> None:
    async with serving() as (coordinator, serves):
        loop = asyncio.get_running_loop()
        until = loop.time() + 2 * LIMIT
        while loop.time() < until:
            assert isinstance(await coordinator.ask(protocol.Ping()), protocol.Done)
            await asyncio.wait({serves}, timeout=LIMIT / 10)
        assert not serves.done()
