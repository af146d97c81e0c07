"""The control socket: what it does for its clients, and that bad ones harm nobody."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import MagicMock

import msgspec
import pytest

from qemu_blkmig.errors import ConnectionLost, Refused, UsageError
from qemu_blkmig.job.control import (
    CLIENTS,
    SOCKET,
    Cancel,
    Change,
    ControlClient,
    ControlServer,
    Done,
    Ended,
    Look,
    Request,
    SwitchOver,
)
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.live import Live
from qemu_blkmig.job.record import Record
from qemu_blkmig.job.status import Status
from qemu_blkmig.job.steering import Steering


class Recorded:
    """A job that notes what it is told."""

    def __init__(self) -> None:
        self.done: list[object] = []
        self.too_late = False

    def status(self) -> Status:
        """How it stands."""
        return Status(job="1", state="running", phase="bulk", note="n" * 1000)

    async def change(self, wanted: Change) -> str:
        """Note it."""
        self.done.append(wanted)
        return "changed"

    def cancel(self) -> str:
        """Note it."""
        if self.too_late:
            raise Refused("too late")
        self.done.append("cancel")
        return "cancelling"

    def switch_over(self) -> str:
        """Refuse it."""
        raise Refused("it does not wait", advice="never mind")


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[tuple[ControlServer, Recorded]]:
    """A job's server."""
    job = Recorded()
    server = ControlServer(directory / SOCKET, job)
    await server.start()
    try:
        yield server, job
    finally:
        await server.end(Ended(0, "over"))


async def ask(directory: Path, request: Request) -> object:
    """One answer."""
    async with ControlClient.connect(str(directory)) as client:
        return await client.request(request)


async def test_a_job_answers_and_does_what_it_is_told(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, job):
        assert stat.S_IMODE((tmp_path / SOCKET).stat().st_mode) == 0o600
        assert isinstance(await ask(tmp_path, Look()), Status)
        assert await ask(tmp_path, Change(bandwidth=None)) == Done("changed")
        assert await ask(tmp_path, Change(downtime=0.5)) == Done("changed")
        assert job.done == [Change(bandwidth=None), Change(downtime=0.5)]
        assert job.done[0] != Change(), "no limit is another thing than nothing said of it"
        with pytest.raises(Refused, match="does not wait") as refused:
            await ask(tmp_path, SwitchOver())
        assert refused.value.advice == "never mind"


@pytest.mark.parametrize("too_late", [False, True])
async def test_who_cancels_is_told_how_it_ended_even_if_it_came_too_late(tmp_path: Path, too_late: bool) -> None:
    async with serving(tmp_path) as (server, job), ControlClient.connect(str(tmp_path)) as client:
        job.too_late = too_late
        if too_late:
            with pytest.raises(Refused, match="too late"):
                await client.request(Cancel())
        else:
            assert await client.request(Cancel()) == Done("cancelling")
        await server.end(Ended(130, "interrupted", "the guest runs at the source"))
        assert await client.next() == Ended(130, "interrupted", "the guest runs at the source")
        with pytest.raises(ConnectionLost):
            await ask(tmp_path, Look())


async def test_who_follows_gets_the_outcome_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qemu_blkmig.job.control.FOLLOW", 0.01)
    async with serving(tmp_path) as (server, _), ControlClient.connect(str(tmp_path)) as client:
        assert isinstance(await client.request(Look(follow=True)), Status)
        assert isinstance(await client.next(), Status)
        await server.end(Ended(0, "migrated"))
        answer = await client.next()
        while isinstance(answer, Status):
            answer = await client.next()
        assert answer == Ended(0, "migrated")


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\n",
        b"{}\n",
        b'{"type": "cancel"',
        b'{"type": "set", "bandwidth": "much"}\n',
        b"[" * 3000 + b"\n",
        b"x" * 100_000,
        b'{"type": "launch missiles"}\n' * 100,
    ],
    ids=["no text", "nothing", "half a line", "wrong type", "nested", "endless", "unknown"],
)
async def test_garbage_is_refused_and_others_are_served_on(tmp_path: Path, line: bytes) -> None:
    async with serving(tmp_path) as (_, job):
        reader, writer = await asyncio.open_unix_connection(tmp_path / SOCKET)
        writer.write(line)
        writer.write_eof()
        try:
            answer = await reader.read()
        except ConnectionResetError:
            answer = b""
        for told in answer.splitlines():
            assert json.loads(told)["event"] == "refusal"
        writer.close()
        assert job.done == []
        assert isinstance(await ask(tmp_path, Look()), Status)


async def test_a_crowd_and_one_that_never_reads_are_turned_away_without_holding_the_job_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qemu_blkmig.job.control.PATIENCE", 0.1)
    async with serving(tmp_path) as (_, job):
        crowd = [await asyncio.open_unix_connection(tmp_path / SOCKET) for _ in range(CLIENTS)]
        _, one_more = await asyncio.open_unix_connection(tmp_path / SOCKET)
        crowd.append((_, one_more))
        assert await _.read() == b"", "one too many"
        deaf_reader, deaf = crowd[0]
        deaf_reader._transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(1000):
            deaf.write(msgspec.json.encode(Look()) + b"\n")
        for _, writer in crowd[1:]:
            writer.transport.abort()
        async with asyncio.timeout(10):
            while not deaf.transport.is_closing():
                deaf.write(msgspec.json.encode(Look()) + b"\n")
                await asyncio.sleep(0)
        assert isinstance(await ask(tmp_path, Look()), Status)
        assert job.done == []


async def test_limits_of_which_one_is_refused_are_both_left_as_they_were() -> None:
    steering = Steering(0.3, None)
    live = Live(Record(job="1", runtime=""), MagicMock(), steering, Interrupts(print))
    with pytest.raises(UsageError):
        await live.change(Change(bandwidth=1 << 20, downtime=0.0))
    assert (steering.bandwidth, steering.downtime) == (None, 0.3)
