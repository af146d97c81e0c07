"""While a guest stands still it must not wait for a host that is silent: then the work ends at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from qemu_blkmig.destination.protocol import SILENCE
from qemu_blkmig.errors import BlkmigError, HostSilent
from qemu_blkmig.transport.client import AgentClient

BEAT = 1.0
"""Seconds between two pings."""
LIMIT = 5.0
"""Seconds in which an agent must answer, at least."""
SLOWER = 4
"""Times what the slowest answer took so far: a narrow line has its queues."""


@contextlib.asynccontextmanager
async def pulse(agent: AgentClient) -> AsyncIterator[None]:
    """End what is done inside, raising `HostSilent`, when the agent does not answer pings any more.

    An agent that is gone altogether is for others to tell.
    """
    work = asyncio.current_task()
    lost: list[HostSilent] = []

    def limit() -> float:
        return min(max(LIMIT, SLOWER * agent.slowest), SILENCE)

    async def beat() -> None:
        try:
            answers = True
            while answers:
                await asyncio.sleep(BEAT)
                answers = await agent.answers(limit())
        except BlkmigError:
            return
        what = f"{agent.where} did not answer for {limit():.0f} s while the guest stood still"
        lost.append(HostSilent(what))
        if work is not None:
            work.cancel()

    beating = asyncio.create_task(beat())
    try:
        yield
    except asyncio.CancelledError:
        if not lost or work is None:
            raise
        work.uncancel()
        raise lost[0] from None
    finally:
        beating.cancel()
