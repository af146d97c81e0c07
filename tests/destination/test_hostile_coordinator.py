"""A coordinator that means harm reaches nothing outside the agent's root, and neither crashes nor bloats the agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qemu_blkmig.destination import protocol
from qemu_blkmig.destination.agent import EXIT_LEFT
from tests.destination.hostile import MIB, Coordinator, Ground
from tests.nbd.servers import nbdkit

MEMORY = 256 << 20
"""More than an agent needs to copy, less than a coordinator can ask for."""


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    """Root, outside, and an export to copy from."""
    return Ground(tmp_path)


@contextlib.asynccontextmanager
async def receiving(root: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`receive --root` as sshd would run it; gone in the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "qemu_blkmig", "receive", "--root", str(root),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        limit=protocol.LINE_LIMIT, env=os.environ | {"QEMU_BLKMIG_STATE_DIR": str(root.parent / "state")},
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def converse(process: asyncio.subprocess.Process, said: bytes) -> tuple[list[bytes], str, int]:
    """Say it all, then end the input: the answers, stderr, and the most memory (bytes) that the agent took."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    stdout, stderr = process.stdout, process.stderr

    async def listen() -> list[bytes]:
        return [line async for line in stdout]

    heard, overheard = asyncio.create_task(listen()), asyncio.create_task(stderr.read())
    with contextlib.suppress(ConnectionError):
        for start in range(0, len(said), 1 << 16):
            process.stdin.write(said[start : start + (1 << 16)])
            await process.stdin.drain()
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process.pid}/status").read_text()
    process.stdin.close()
    async with asyncio.timeout(60):
        lines = await heard
        text = (await overheard).decode(errors="replace")
        await process.wait()
    most = re.search(r"VmHWM:\s*(\d+) kB", status)
    return lines, text, int(most[1]) << 10 if most else 0


@pytest.mark.parametrize("seed", range(6))
async def test_no_message_reaches_out_of_the_root_or_breaks_the_agent(
    ground: Ground, tmp_path: Path, seed: int
) -> None:
    with nbdkit(tmp_path, "memory", f"size={MIB}") as socket:
        said = b"".join(Coordinator(seed, ground, socket).lines(250))
        async with receiving(ground.root) as process:
            lines, stderr, memory = await converse(process, said)
    ground.assert_nothing_outside_was_touched()
    assert "Traceback" not in stderr, stderr
    assert process.returncode == EXIT_LEFT, stderr
    assert memory < MEMORY
    answers = [json.loads(line) for line in lines]
    replies = [answer for answer in answers if answer["type"] == "reply"]
    defects = [answer for answer in replies if answer["outcome"].get("kind") == "internal"]
    assert not defects, defects[:3]
    asked = Counter(json.loads(line)["id"] for line in said.splitlines())
    surplus = Counter(reply["id"] for reply in replies) - asked
    assert not surplus
