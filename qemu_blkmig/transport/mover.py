"""The engine's mover at the other end of the control protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar

from qemu_blkmig.destination import protocol
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.ports import CopyKind, CopyReport
from qemu_blkmig.transport.client import AgentClient, OnProgress

_Reply = TypeVar("_Reply", bound=protocol.Message)

Cancellable = protocol.Copy | protocol.Digests | protocol.BaseDigest | protocol.BaseDigests
"""What `Cancel` ends."""

_CANCEL_LIMIT = 10.0
"""Seconds in which the agent must have ended its work; one that hangs in its storage must not keep a guest paused."""
_KILL_LIMIT = 2.0


class RemoteMover:
    """Implements `engine.ports.Mover` on an agent whose disks are open. Raises as `AgentClient.request` does."""

    def __init__(self, client: AgentClient, on_progress: OnProgress | None = None) -> None:
        self._client = client
        if on_progress is not None:
            client.on_progress = on_progress

    async def copy(self, disk: str, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        """See `Mover`. When cancelled, returns only after the agent has answered that nothing is in flight."""
        total = CopyReport(0, 0, 0, 0.0)
        for start in range(0, len(extents), protocol.BATCH_LIMIT):
            batch = [(each.offset, each.length) for each in extents[start : start + protocol.BATCH_LIMIT]]
            reply = await carry_out(self._client, protocol.Copy(disk, kind.value, batch), protocol.CopyReply)
            total = CopyReport(
                total.copied + reply.copied,
                total.zeroed + reply.zeroed,
                total.skipped + reply.skipped,
                total.seconds + reply.seconds,
            )
        return total

    async def flush(self, disk: str) -> None:
        """See `Mover`."""
        await self._client.request(protocol.Flush(disk))

    async def set_bandwidth(self, rate: int | None) -> None:
        """See `Mover`."""
        await self._client.request(protocol.Bandwidth(rate))


async def carry_out(client: AgentClient, op: Cancellable, reply: type[_Reply]) -> _Reply:
    """`AgentClient.expect`, which, when cancelled, returns only after the agent has answered that `op` has ended."""
    working = asyncio.ensure_future(client.expect(op, reply))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        ending = asyncio.gather(working, client.request(protocol.Cancel(op.disk)), return_exceptions=True)
        if not await finished(ending, _CANCEL_LIMIT):
            client.kill(f"did not answer for {_CANCEL_LIMIT:.0f} s")
            await finished(ending, _KILL_LIMIT)
        raise


async def finished(work: asyncio.Future[Any], seconds: float) -> bool:
    """Whether `work` ends within `seconds`, however often the waiting is cancelled."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not work.done() and loop.time() < deadline:
        try:
            await asyncio.wait({work}, timeout=deadline - loop.time())
        except asyncio.CancelledError:
            continue
    return work.done()
