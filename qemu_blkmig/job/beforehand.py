"""libvirt's first attempt is begun while the disks' first pass ends.

Until its destination QEMU waits, libvirt takes a third of a second and more: time that a short pass can hide. The gate
stays closed meanwhile, so hardly any RAM crosses, and an attempt that is not taken in time is called off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType

from qemu_blkmig.engine.migration import Figures, Phase
from qemu_blkmig.engine.outlast import outlast
from qemu_blkmig.errors import BlkmigError
from qemu_blkmig.job.passage import Passage
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.virt.connection import LibvirtError, libvirt

log = logging.getLogger(__name__)

BEFOREHAND = 1.0
"""Seconds of the pass that may be left, by what it has done so far."""
LOOK = 0.05
"""Seconds between two looks at how much is left."""
WORTH_IT = 10.0
"""Seconds of a first pass after which a third of one makes no difference; and reading back comes between."""
KEPT = 5.0
"""Seconds for which an attempt waits to be taken: the domain cannot be changed meanwhile, and its RAM is watched."""


class Beforehand:
    """An attempt that is begun, if it `may`, once `figures` tell that the pass over `disks` is nearly over.

    For the time of a `with`, at whose end an attempt that nobody took is ended. `begin` begins it, `call_off` ends it
    when the pass, or the rounds after it, take longer than they seemed to. One that failed is made again when it is
    time, but for one that somebody has aborted: that is meant.
    """

    def __init__(
        self,
        figures: Callable[[], Figures],
        disks: Sequence[Disk],
        begin: Callable[[], Awaitable[Passage]],
        call_off: Callable[[Passage], Awaitable[None]],
        *,
        may: bool,
    ) -> None:
        self._figures = figures
        self._occupied = {disk.name: disk.allocated or disk.size for disk in disks}
        self._begin = begin
        self._call_off = call_off
        self._wanted = asyncio.Event()
        if not may:
            self._wanted.set()
        self._passage: Passage | None = None

    async def __aenter__(self) -> Beforehand:
        self._task = asyncio.create_task(self._offer())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        ending = await outlast(self._end())
        ending.raise_cancellation()

    async def take(self) -> Passage | None:
        """The attempt, which is the caller's to end from now on; None where there is none."""
        self._wanted.set()
        await asyncio.wait({self._task})
        self._task.result()
        passage, self._passage = self._passage, None
        return passage

    async def _end(self) -> None:
        await asyncio.wait({self._task})
        if self._passage is not None:
            await self._passage.end()

    async def _offer(self) -> None:
        if not await self._is_nearly_over():
            return
        try:
            self._passage = passage = await self._begin()
        except BlkmigError as error:
            log.info("libvirt's migration did not begin beforehand: %s", error)
            return
        await self._until_wanted(KEPT)
        if passage.migration.ended:
            failure = await passage.migration.failed()
            if isinstance(failure, LibvirtError) and failure.code == libvirt().VIR_ERR_OPERATION_ABORTED:
                return
            log.info("libvirt's migration that began beforehand has ended: %s", failure)
            await passage.end()
            self._passage = None
        elif not self._wanted.is_set():
            await self._call_off(passage)
            self._passage = None

    async def _is_nearly_over(self) -> bool:
        """Wait until the pass is; False where that is too late, or nobody waits for it any more."""
        with contextlib.suppress(TimeoutError):
            async with time_limit(WORTH_IT):
                while not self._wanted.is_set():
                    if seconds_left(self._figures(), self._occupied) <= BEFOREHAND:
                        return True
                    await self._until_wanted(LOOK)
        return False

    async def _until_wanted(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with time_limit(seconds):
                await self._wanted.wait()


def seconds_left(figures: Figures, occupied: Mapping[str, int]) -> float:
    """Of the first pass, by its speed so far; `occupied`: bytes by disk of which it copies hardly more."""
    if figures.phase is not Phase.BULK:
        return 0.0 if figures.phase is Phase.DIRTY else float("inf")
    left = sum(min(disk.size - disk.bulk_done, max(0, occupied[disk.name] - disk.copied)) for disk in figures.disks)
    return left / figures.speed if figures.speed else float("inf")
