"""libvirt's first attempt is begun when the disks' first pass is, not when that is over.

What only the start of the destination's QEMU tells (a port in use, a hook that objects, a file that it may not open) is
known seconds after the command is given then, not after hours of copying. And until that QEMU waits, libvirt takes a
third of a second and more: time that a short pass hides, for it goes on with this attempt. The gate stays closed
meanwhile, so hardly any RAM crosses. An attempt that would have to wait for long is called off.
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
from qemu_blkmig.errors import BlkmigError, LibvirtFailed
from qemu_blkmig.job.passage import Passage
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.time_limit import time_limit

log = logging.getLogger(__name__)

KEPT = 10.0
"""Seconds for which an attempt waits to be taken: the domain cannot be changed meanwhile, and its RAM is watched."""
JUDGED = 1.0
"""Seconds that it waits at least, before it is judged by the speed of the pass so far whether it is worth waiting."""
WATCH = 0.2
"""Seconds between two looks at an attempt that waits."""
BEGUN = 0.05
"""Seconds between two looks whether the pass has begun, which may have to wait for others' (--slots)."""
AGAIN = 5.0
"""Seconds after which one that failed is made again: who was just being started anew is there by then."""


class Attempts(Protocol):
    """What makes attempts of libvirt's. All of it may raise a `BlkmigError`."""

    async def begin_beforehand(self) -> Passage:
        """Begin one. Raises `LibvirtFailed` where libvirt does not, or nothing leads to it."""

    async def call_off(self, passage: Passage) -> None:
        """End one, however it stands; the guest goes on here, and may be taken over again."""

    async def end(self, passage: Passage) -> None:
        """End one, however it stands, as the job does."""

    async def why_failed(self, passage: Passage) -> LibvirtFailed:
        """Why it came to nothing, for the user."""

    async def is_overtaken(self, passage: Passage) -> bool:
        """Whether QEMU has paused the guest for it already, or somebody else has paused or resumed it."""


class Beforehand:
    """An attempt that is begun beside the pass over `disks`, of which `figures` tell.

    For the time of a `with`, at whose end an attempt that nobody took is ended. It is called off as soon as it has
    shown that libvirt can do it, if it may not be `taken`, or if the pass will take too long. One that fails is made
    again, by who wants it if it is time by then; if that fails, too, the job is ended by `fail`, and at once where
    somebody has aborted it: that is meant for the whole job. That libvirt was busy tells nothing of the next.
    """

    def __init__(
        self,
        figures: Callable[[], Figures],
        disks: Sequence[Disk],
        attempts: Attempts,
        fail: Callable[[LibvirtFailed], None],
        tell: Callable[[str], None],
        *,
        taken: bool,
        may: bool = True,
    ) -> None:
        """`may`: whether one may be begun at all. `tell`: the user, that one failed."""
        self._figures = figures
        self._occupied = {disk.name: disk.allocated or disk.size for disk in disks}
        self._attempts = attempts
        self._fail = fail
        self._tell = tell
        self._may_be_taken = taken
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
        try:
            while self._figures().phase is Phase.CREATED and not self._wanted.is_set():
                await self._until_wanted(BEGUN)
            for last in (False, True):
                if self._wanted.is_set() or (failure := await self._try()) is None:
                    return
                log.info("libvirt's migration, begun beforehand: %s", failure)
                if failure.busy:
                    return
                if failure.aborted or (last and not self._wanted.is_set()):
                    self._fail(failure)
                    return
                self._tell(f"libvirt's migration, tried beforehand, failed, and is tried once more: {failure}")
                await self._until_wanted(AGAIN)
        except BlkmigError as error:
            log.info("libvirt's migration, begun beforehand: %s", error)

    async def _try(self) -> LibvirtFailed | None:
        """One attempt; why it failed. It is there to be taken, or called off."""
        try:
            self._passage = passage = await self._attempts.begin_beforehand()
        except LibvirtFailed as error:
            return error
        try:
            if await self._keeps(passage):
                return None
        except BlkmigError as error:
            # It must not go on with nobody looking after it.
            log.info("libvirt's migration, begun beforehand, is called off: %s", error)
        failure = None if passage.fit else await self._attempts.why_failed(passage)
        try:
            await self._attempts.call_off(passage)
        except BlkmigError:
            self._passage = None
            raise
        self._passage = None
        return failure

    async def _keeps(self, passage: Passage) -> bool:
        """Wait until it is wanted; False where it does not come to that, or the attempt is not fit any more."""
        waiting = 0.0
        while not self._wanted.is_set():
            if not passage.fit or self._is_too_long(waiting) or await self._attempts.is_overtaken(passage):
                return False
            await self._until_wanted(WATCH)
            # Until its destination QEMU waits, for its huge pages say, an end would only have that begun anew.
            waiting += WATCH if passage.gate.passed else 0.0
        if self._may_be_taken:
            return passage.fit
        # Nor does libvirt end it before, and nobody could begin another.
        while passage.fit and not passage.gate.passed:  # noqa: ASYNC110
            await asyncio.sleep(WATCH)
        return False

    def _is_too_long(self, waiting: float) -> bool:
        """Whether an attempt whose destination QEMU is `waiting` for so many seconds is to wait no longer."""
        if not self._may_be_taken:
            return waiting > 0
        return waiting > KEPT or (waiting > JUDGED and seconds_left(self._figures(), self._occupied) > KEPT)

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
