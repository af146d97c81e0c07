"""An agent that means harm, or is no agent at all: what is asked of it fails cleanly, soon, and in little memory."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qemu_blkmig import errors
from qemu_blkmig.destination import protocol
from qemu_blkmig.transport import client as client_module
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.piped import Piped
from qemu_blkmig.transport.starting import start
from tests.transport.conftest import MIB, bulk, image, opening

MEMORY = 64 * MIB


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait long for an agent's end."""
    for name in ("_EXIT_TIMEOUT", "_KILL_TIMEOUT"):
        monkeypatch.setattr(client_module, name, 0.4)
    monkeypatch.setattr(protocol, "PING", 0.1)
    monkeypatch.setattr(client_module, "_GRACE", 0.1)


@contextlib.asynccontextmanager
async def agent_that_is(kind: str, seed: int = 0) -> AsyncIterator[AgentClient]:
    """A client of that hostile agent, which has answered hello; its process is seen gone in the end.

    Patience with it is lost at once after that; but not with one that answers: then it is the machine that is busy.
    """
    greeted, answers = asyncio.Event(), AgentClient.answers

    async def once_greeted(client: AgentClient, seconds: float) -> bool:
        await greeted.wait()
        return await answers(client, seconds if kind == "drawn" else 0.4)

    command = [sys.executable, "-m", "tests.transport.hostile_agent", kind, str(seed)]
    process = await Piped.of(start(command), protocol.LINE_LIMIT)
    client = AgentClient(process)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AgentClient, "answers", once_greeted)
            await client.hello()
            greeted.set()
            yield client
            await client.abandon()
        await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.close()
        await process.wait()


def most_memory() -> int:
    """Bytes that this process occupied at most since that was last reset (proc(5), clear_refs)."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


@pytest.mark.parametrize(
    "kind", ["garbage", "endless_line", "stderr_flood", "wrong_ids", "progress_flood", "deep", "silent", "closed"]
)
async def test_an_agent_that_gives_no_answer_is_given_up(kind: str, tmp_path: Path) -> None:
    Path("/proc/self/clear_refs").write_text("5")
    before = most_memory()
    async with agent_that_is(kind) as client:
        with pytest.raises(errors.DestinationFailed) as caught:
            await client.request(protocol.Prepare([image(tmp_path / "d", MIB)]))
        with pytest.raises(errors.DestinationFailed):
            await client.request(protocol.Flush("d"))
    assert most_memory() - before < MEMORY
    assert "agent" in str(caught.value)
    assert len(str(caught.value)) < 20_000
    assert "\x1b" not in str(caught.value), "what the other host says must not steer the terminal"


@pytest.mark.parametrize("seed", range(8))
async def test_answers_of_any_content_are_taken_or_are_errors_of_ours(seed: int, tmp_path: Path) -> None:
    asked = (
        (protocol.Inspect([image(tmp_path / "d", MIB)]), protocol.InspectReply),
        (protocol.Prepare([image(tmp_path / "d", MIB)]), protocol.PrepareReply),
        (opening(tmp_path / "socket"), protocol.Done),
        (bulk((0, MIB)), protocol.CopyReply),
        (protocol.Verify("d", MIB), protocol.VerifyReply),
        (protocol.Close("d"), protocol.CloseReply),
        (protocol.Discard([]), protocol.DiscardReply),
    )
    async with agent_that_is("drawn", seed) as client:
        for op, reply in asked * 10:
            with contextlib.suppress(errors.BlkmigError):
                told = await client.expect(op, reply)
                assert_makes_sense(told)


def assert_makes_sense(told: protocol.Message) -> None:
    """Figures that cannot be are not passed on."""
    if isinstance(told, protocol.CopyReply):
        assert min(told.copied, told.zeroed, told.skipped, told.seconds) >= 0
    if isinstance(told, protocol.CloseReply):
        assert told.allocated >= 0
