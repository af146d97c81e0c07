"""Whose a pause or a resume is that the guest is seen to make while it is being moved."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast
from unittest.mock import AsyncMock, MagicMock

import pytest

from qemu_blkmig.errors import ConnectionLost, RecordFailed
from qemu_blkmig.job.guard import EVENTS, Guard
from qemu_blkmig.qmp.monitor import Event, EventStream


class _Source:
    """A QEMU whose guest an admin has paused."""

    def __init__(self) -> None:
        self.state = "running"
        self._stream = EventStream(EVENTS, asyncio.get_running_loop().create_future())

    async def execute(self, command: str, *_: object, **__: object) -> Any:
        assert command == "query-status"
        return {"status": self.state}

    def events(self, *_: str) -> Any:
        stream = MagicMock()
        stream.__enter__.return_value = self._stream
        stream.__exit__.return_value = None
        return stream

    async def say(self, name: str, **data: str) -> None:
        if name in ("STOP", "RESUME"):
            self.state = "paused" if name == "STOP" else "running"
        self._stream.deliver(Event(name, data, 0.0))
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def watching() -> AsyncIterator[tuple[Guard, _Source, MagicMock]]:
    """A guard of a guest that ran when libvirt began to move it; its source, and the job's record."""
    source, job, watchdog = _Source(), MagicMock(), MagicMock()
    job.save = AsyncMock()
    job.record.was_running = True
    watchdog.wait_ended = asyncio.Event().wait
    work = asyncio.create_task(asyncio.Event().wait())
    guard = Guard(job, source, None, watchdog, work)  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    guard.resumes_are_libvirts = True
    yield guard, source, job.record
    await guard.stand_down()
    work.cancel()


async def test_that_libvirt_resumes_a_guest_it_has_not_moved_is_not_taken_for_an_admin_s_resume() -> None:
    async with watching() as (guard, source, record):
        await source.say("STOP")
        await source.say("RESUME")
        assert not record.was_running
        # It is paused again for that.
        await source.say("STOP")
        await guard.libvirt_has_ended()
        assert not record.was_running
        await source.say("RESUME")
        assert record.was_running


async def test_a_guest_that_runs_when_libvirt_has_ended_is_not_taken_for_paused() -> None:
    async with watching() as (guard, source, record):
        await source.say("STOP")
        # It cannot be paused again, or an admin has resumed it in the same moment.
        await source.say("RESUME")
        await guard.libvirt_has_ended()
        assert record.was_running


async def test_a_guest_that_goes_on_after_a_pause_of_ours_is_not_taken_for_one_that_somebody_has_resumed() -> None:
    async with watching() as (guard, source, record):
        await source.say("STOP")
        guard.ignore_pauses()
        await source.say("RESUME")
        await guard.libvirt_has_ended()
        assert not record.was_running


async def test_a_qemu_that_does_not_tell_when_libvirt_has_ended_is_left_to_the_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with watching() as (guard, source, record):
        await source.say("STOP")
        monkeypatch.setattr(source, "execute", AsyncMock(side_effect=ConnectionLost("gone")))
        await guard.libvirt_has_ended()
        assert not record.was_running and not guard.resumes_are_libvirts


async def test_that_the_guest_runs_again_and_cannot_be_recorded_is_not_passed_over() -> None:
    async with watching() as (guard, source, record):
        await source.say("STOP")
        await source.say("RESUME")
        assert not record.was_running
        cast(AsyncMock, guard._job.save).side_effect = RecordFailed("full")
        with pytest.raises(RecordFailed):
            await guard.libvirt_has_ended()
