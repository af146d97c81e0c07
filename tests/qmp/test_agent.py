"""The guest agent's client, against Debian's qemu-ga (with every freezing command blocked) and against hung agents."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qemu_blkmig.errors import ConnectionLost, RequestError
from qemu_blkmig.qmp.agent import GuestAgent

BLOCKED = "guest-fsfreeze-freeze,guest-fsfreeze-freeze-list,guest-fsfreeze-thaw,guest-fstrim,guest-shutdown,guest-exec"


@pytest.fixture
async def real_agent(tmp_path: Path) -> AsyncIterator[Path]:
    path = tmp_path / "qga.sock"
    process = await asyncio.create_subprocess_exec(
        *("qemu-ga", "-m", "unix-listen", "-p", str(path), "-t", str(tmp_path), "-f", str(tmp_path / "pid")),
        *("-b", BLOCKED, "-l", str(tmp_path / "log")),
    )
    for _ in range(250):
        if path.exists():
            break
        await asyncio.sleep(0.02)
    yield path
    process.kill()
    await process.wait()


async def test_a_real_agent_answers_and_tells_refusals(real_agent: Path) -> None:
    agent = await GuestAgent.connect(str(real_agent))
    await agent.ping()
    assert await agent.status() == "thawed"
    with pytest.raises(RequestError, match="refused guest-fsfreeze-freeze"):
        await agent.freeze(2)
    await agent.ping()
    await agent.close()


class FakeAgent:
    """Answers as qemu-ga does, save for a freeze, which hangs; `seen` holds the commands in their order."""

    def __init__(self, answers_ping: bool, leftover: bytes = b"") -> None:
        self.seen: list[str] = []
        self.freezing = asyncio.Event()
        self.thawed = asyncio.Event()
        self._answers_ping = answers_ping
        self._leftover = leftover

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._leftover)
        while line := await reader.readline():
            request = json.loads(line.replace(b"\xff", b""))
            self.seen.append(request["execute"])
            if request["execute"] == "guest-fsfreeze-freeze":
                self.freezing.set()
            if request["execute"] == "guest-fsfreeze-thaw":
                self.thawed.set()
            if not self._answers_ping or self.freezing.is_set():
                continue
            if request["execute"] == "guest-sync-delimited":
                writer.write(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n")
            else:
                writer.write(b'{"return": {}}\n')
        writer.close()


async def test_a_freeze_that_hangs_is_given_up_with_a_thaw_right_behind_it(tmp_path: Path) -> None:
    fake = FakeAgent(answers_ping=True)
    async with await asyncio.start_unix_server(fake.serve, tmp_path / "a"):
        agent = await GuestAgent.connect(str(tmp_path / "a"))
        with pytest.raises(RequestError, match="did not answer guest-fsfreeze-freeze"):
            await agent.freeze(0.2)
        await fake.thawed.wait()
        assert fake.seen[-2:] == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]
        await agent.close()


async def test_a_freeze_that_is_cancelled_has_a_thaw_right_behind_it(tmp_path: Path) -> None:
    fake = FakeAgent(answers_ping=True)
    async with await asyncio.start_unix_server(fake.serve, tmp_path / "a"):
        agent = await GuestAgent.connect(str(tmp_path / "a"))
        freezing = asyncio.create_task(agent.freeze(30))
        await fake.freezing.wait()
        freezing.cancel()
        await asyncio.gather(freezing, return_exceptions=True)
        await fake.thawed.wait()
        await agent.close()


async def test_an_agent_that_is_away_is_never_asked_to_freeze(tmp_path: Path) -> None:
    fake = FakeAgent(answers_ping=False)
    async with await asyncio.start_unix_server(fake.serve, tmp_path / "a"):
        agent = await GuestAgent.connect(str(tmp_path / "a"))
        with pytest.raises(RequestError, match="did not answer guest-ping"):
            await agent.freeze(0.2)
        assert "guest-fsfreeze-freeze" not in fake.seen
        await agent.close()


async def test_answers_to_somebody_else_are_skipped(tmp_path: Path) -> None:
    fake = FakeAgent(answers_ping=True, leftover=b'{"return": 7}\n\xff{"return": 99}\n{"return": {}}\n')
    async with await asyncio.start_unix_server(fake.serve, tmp_path / "a"):
        agent = await GuestAgent.connect(str(tmp_path / "a"))
        await agent.ping(2)
        await agent.close()


async def test_an_agent_that_hangs_up_is_lost(tmp_path: Path) -> None:
    async with await asyncio.start_unix_server(lambda reader, writer: writer.close(), tmp_path / "a"):
        agent = await GuestAgent.connect(str(tmp_path / "a"))
        with pytest.raises(ConnectionLost):
            await agent.ping(2)
        await agent.close()


async def test_no_such_channel(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be connected to: No such file"):
        await GuestAgent.connect(str(tmp_path / "none"))
