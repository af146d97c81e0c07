"""The engine's mover that sends into a stream of the old wire format, and the engine that tells it of completion."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.migration import BlockMigration, nothing
from qemu_blkmig.engine.ports import CopyKind, CopyReport
from qemu_blkmig.errors import ConnectionLost
from qemu_blkmig.nbd.control import Control, Tally
from qemu_blkmig.nbd.throttle import Throttle
from qemu_blkmig.stream.blocking import run_blocking
from qemu_blkmig.stream.disk_sender import DiskSender
from qemu_blkmig.stream.sender import StreamSender

TELL = 0.25
"""Seconds after which it is told how far a copy is."""


class StreamMover:
    """Implements `engine.ports.Mover` on a stream: what was sent is not asked for again, so a failure is final."""

    def __init__(
        self,
        stream: StreamSender,
        senders: Mapping[str, DiskSender],
        throttle: Throttle,
        moving: Callable[[str, int], None],
    ) -> None:
        """`moving` is told, now and then within a copy, the disk and how many bytes of the copy are settled."""
        self._moving = moving
        self._stream = stream
        self._senders = senders
        self._throttle = throttle
        self._failed: BaseException | None = None

    async def copy(self, disk: str, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        """See `Mover`. The extents must be aligned to chunks."""
        sender = self._senders[disk]
        control = Control()
        tally = control.tally
        began = time.monotonic()
        telling = asyncio.create_task(self._tell(disk, tally))
        try:
            await self._attempt(control, lambda: sender.copy(extents, control, bulk=kind is CopyKind.BULK))
        finally:
            telling.cancel()
        return CopyReport(tally.copied, tally.zeroed, tally.skipped, time.monotonic() - began)

    async def flush(self, disk: str) -> None:
        """See `Mover`: the part of the section that is open is closed. `StreamCarriage.close` makes it stable."""
        control = Control()
        await self._attempt(control, lambda: self._stream.end_part(control))

    async def set_bandwidth(self, rate: int | None) -> None:
        """See `Mover`."""
        self._throttle.limit(rate)

    async def _tell(self, disk: str, tally: Tally) -> None:
        while True:
            await asyncio.sleep(TELL)
            self._moving(disk, tally.copied + tally.zeroed + tally.skipped)

    async def _attempt(self, control: Control, work: Callable[[], None]) -> None:
        """A stream that broke off in the middle of a record cannot be gone on with."""
        try:
            if self._failed is not None:
                raise ConnectionLost(f"the stream has broken off: {self._failed}")
            await run_blocking(work, control)
        except BaseException as error:
            self._failed = self._failed or error
            raise
        finally:
            control.close()


class Saving(BlockMigration):
    """Tells the stream when completion begins: its records belong in the section's END."""

    def __init__(self, stream: StreamSender, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._stream = stream

    async def complete(self, beside: Callable[[], Awaitable[None]] = nothing) -> None:
        """See `BlockMigration`."""
        self._stream.begin_completion()
        await super().complete(beside)
