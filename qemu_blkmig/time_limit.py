"""A time limit for what is awaited, which holds also for what a cancelled task does to clean up.

In a task that was cancelled before, `asyncio.timeout` of Python 3.11.2 (Debian 12) raises CancelledError in place of
TimeoutError: what is to be done when time is over would be left out just where something is being undone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


@contextlib.asynccontextmanager
async def time_limit(seconds: float | None) -> AsyncIterator[asyncio.Timeout]:
    """Cancel what is inside after `seconds`, and raise TimeoutError; None: no limit."""
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield limit
    except asyncio.CancelledError:
        if limit.expired() and task is not None and task.cancelling() <= before:
            raise TimeoutError from None
        raise
