"""Volumes that libvirt makes for a job are known to the record, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast
from unittest.mock import AsyncMock, MagicMock

import pytest

from qemu_blkmig.destination.protocol import FilesReply, Image
from qemu_blkmig.job import volumes
from qemu_blkmig.job.plan import Plan
from qemu_blkmig.job.record import Job, Volume
from qemu_blkmig.job.volumes import make_volumes


async def test_a_volume_that_libvirt_is_making_when_the_job_is_cancelled_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    making, made = asyncio.Event(), asyncio.Event()

    async def create(*_: object) -> None:
        making.set()
        await made.wait()

    monkeypatch.setattr(volumes, "create_volume", create)
    monkeypatch.setattr(volumes, "directories", AsyncMock(return_value={"/pool": "default"}))
    agent, job = MagicMock(), SimpleNamespace(record=SimpleNamespace(volumes=[]), save=AsyncMock())
    agent.expect = AsyncMock(return_value=FilesReply([None], ["/pool/a.raw"], [[]]))
    image = Image("vda", "/pool/a.raw", "raw", 1 << 20, create=True)
    plan = cast(Plan, SimpleNamespace(images={"vda": image}))
    task = asyncio.create_task(make_volumes(MagicMock(), agent, plan, cast(Job, job), None))
    await making.wait()
    task.cancel()
    await asyncio.sleep(0)
    made.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert job.record.volumes == [Volume("default", "a.raw", "/pool/a.raw")]
    job.save.assert_awaited()
