"""A time limit is one also in a task that was cancelled before."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from qemu_blkmig.time_limit import time_limit


async def test_time_is_over() -> None:
    with pytest.raises(TimeoutError):
        async with time_limit(0.001):
            await asyncio.sleep(10)


async def test_time_is_over_in_what_a_cancelled_task_does_to_clean_up() -> None:
    said: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            try:
                async with time_limit(0.001):
                    await asyncio.sleep(10)
            except TimeoutError:
                said.append("over")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert said == ["over"]


async def test_a_cancellation_that_comes_with_the_limit_is_not_taken_for_it() -> None:
    async def work() -> None:
        async with time_limit(0.001):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(10)
            await asyncio.sleep(10)

    task = asyncio.create_task(work())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
