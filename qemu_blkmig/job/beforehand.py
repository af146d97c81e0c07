"""libvirt's first attempt is begun while the disks' first pass ends.

Until its destination QEMU waits, libvirt takes a third of a second and more: time that a short pass can hide. The gate
stays closed meanwhile, so hardly any RAM crosses, and an attempt that is not taken in time is called off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol

from qemu_blkmig.engine.migration import Figures, Phase
from qemu_blkmig.engine.outlast import outlast
from qemu_blkmig.errors import BlkmigError
from qemu_blkmig.job.passage import Passage
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.virt.connection import LibvirtError, libvirt

log = logging.getLogger(__name__)

BEFOREHAND = 1.0
"""Seconds of the pass, by what it has done so far, or of reading back that may be left when libvirt is to begin."""
LOOK = 0.05
"""Seconds between two looks at how much is left."""
WORTH_IT = 10.0
"""Seconds of a first pass after which a third of one makes no difference; and reading back comes between."""
WATCH = 0.2
"""Seconds between two looks at an attempt that waits."""
KEPT = 5.0
"""Seconds for which an attempt waits to be taken: the domain cannot be changed meanwhile, and its RAM is watched."""


class Attempts(Protocol):
    """What makes attempts of libvirt's. All of it may raise a `BlkmigError`."""

    async def begin_beforehand(self) -> Passage:
        """Begin one."""

    async def call_off(self, passage: Passage) -> None:
        """End one, however it stands; the guest goes on here, and may be taken over again."""

    async def end(self, passage: Passage) -> None:
        """End one, however it stands, as the job does."""

    async def aborted(self, passage: Passage) -> None:
        """Somebody has aborted it: that is meant for the whole job."""

    async def is_overtaken(self, passage: Passage) -> bool:
        """Whether QEMU has paused the guest for it already, or somebody else has paused or resumed it."""


class Beforehand:
    """An attempt that is begun, if it `may`, once `figures` tell that the pass over `disks` is nearly over.

    For the time of a `with`, at whose end an attempt that nobody took is ended. It is called off when the pass, or the
    rounds after it, take longer than they seemed to. One that fails is made again by who wants it, when it is time.
    """

    def __init__(self, figures: Callable[[], Figures], disks: Sequence[Disk], attempts: Attempts, *, may: bool) -> None:
        self._figures = figures
        self._occupied = {disk.name: disk.allocated or disk.size for disk in disks}
        self._attempts = attempts
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
        if self._task.cancelled() or self._task.exception() is not None:
            return None
        passage, self._passage = self._passage, None
        return passage

    async def _end(self) -> None:
        await asyncio.wait({self._task})
        if not self._task.cancelled() and (defect := self._task.exception()) is not None:
            log.error("defect", exc_info=defect)
        if self._passage is not None:
            await self._attempts.end(self._passage)

    async def _offer(self) -> None:
        if not await self._is_nearly_over():
            return
        try:
            self._passage = passage = await self._attempts.begin_beforehand()
            if await self._keeps(passage):
                return
            if await _was_aborted(passage):
                await self._attempts.aborted(passage)
            else:
                await self._attempts.call_off(passage)
            self._passage = None
        except BlkmigError as error:
            log.info("libvirt's migration, begun beforehand: %s", error)

    async def _keeps(self, passage: Passage) -> bool:
        """Wait until it is wanted; False where it does not come to that, or the attempt is not fit any more."""
        waiting = 0.0
        while not self._wanted.is_set():
            if not passage.fit or waiting > KEPT or await self._attempts.is_overtaken(passage):
                return False
            await self._until_wanted(WATCH)
            # Until its destination QEMU waits, for its huge pages say, an end would only have that begun anew.
            waiting += WATCH if passage.gate.passed else 0.0
        return passage.fit

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


async def _was_aborted(passage: Passage) -> bool:
    """Whether somebody has told libvirt to end it."""
    if not passage.migration.ended:
        return False
    why = await passage.migration.failed()
    return isinstance(why, LibvirtError) and why.code == libvirt().VIR_ERR_OPERATION_ABORTED


def seconds_left(figures: Figures, occupied: Mapping[str, int]) -> float:
    """Of the first pass, by its speed so far; `occupied`: bytes by disk of which it copies hardly more."""
    if figures.phase is not Phase.BULK:
        return 0.0 if figures.phase is Phase.DIRTY else float("inf")
    left = sum(min(disk.size - disk.bulk_done, max(0, occupied[disk.name] - disk.copied)) for disk in figures.disks)
    return left / figures.speed if figures.speed else float("inf")
