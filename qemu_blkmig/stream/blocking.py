"""Runs what blocks in a thread, so that a cancellation reaches it and nothing of it is left under way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

from qemu_blkmig.errors import BlkmigError
from qemu_blkmig.nbd.control import Cancelled, Control

_T = TypeVar("_T")


async def run_blocking(work: Callable[[], _T], control: Control) -> _T:
    """What `work` returns or raises. A cancellation cancels `control`, and is raised only once `work` has ended."""
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        control.cancel()
        await _ended(working)
        raise


async def _ended(working: asyncio.Future[_T]) -> None:
    """Wait for it, however often the waiting is cancelled."""
    while not working.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({working})
    with contextlib.suppress(Cancelled, BlkmigError):
        working.result()
