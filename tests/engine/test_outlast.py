"""Waits that a cancellation ends, and steps that it does not."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from qemu_blkmig.engine.outlast import only_wait


async def test_what_a_step_raises_after_its_wait_was_cancelled_is_told_by_nobody() -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
    step = asyncio.get_running_loop().create_future()
    wait = asyncio.create_task(only_wait(step))
    await asyncio.sleep(0)
    wait.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wait
    step.set_exception(ConnectionError("much later"))
    await asyncio.sleep(0)
    del step, wait
    gc.collect()
    assert not told


async def test_what_a_step_raises_while_it_is_waited_for_is_raised() -> None:
    step: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(step.set_exception, ConnectionError("now"))
    with pytest.raises(ConnectionError, match="now"):
        await only_wait(step)
