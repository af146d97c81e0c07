"""`--adaptive`: looks at how long the guest's requests to its disks take, and sets how fast is copied by it.

`engine.adaptive` decides; --bandwidth stays the upper bound.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from qemu_blkmig.engine.adaptive import Adaptive
from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import BlkmigError
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.qmp.latency import Served, served
from qemu_blkmig.units import show_rate, show_seconds

log = logging.getLogger(__name__)

PAUSE = 1.0
"""Seconds between two looks."""
ENOUGH = 5
"""Requests between two looks that an average is worth something of."""
MISSED = 5
"""Looks without an answer after which copying is not held back any more."""


class Adapting:
    """Sets the limit as long as its block lasts; does nothing unless `wanted`.

    Its block is the first pass: rounds that are held back might never end, and the last one is held back by nothing.
    """

    def __init__(self, life: Lifecycle, disks: Sequence[Disk], clock: Clock, *, wanted: bool) -> None:
        self._life = life
        self._devices = {disk.qdev for disk in disks}
        self._clock = clock
        self._wanted = wanted
        self._adaptive = Adaptive()
        self._held = False
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._wanted:
            self._life.steering.adapted = int(self._adaptive.limit)
            await self._life.steering.changed()
            self._following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._following is None:
            return
        self._following.cancel()
        await asyncio.wait({self._following})
        self._life.steering.adapted = self._life.steering.latency = None
        if kind is None:
            await self._life.steering.changed()

    async def _follow(self) -> None:
        then, before, settled = self._clock.now(), await self._look(), self._life.reporter.settled
        missed = 0
        while missed < MISSED:
            await self._clock.sleep(PAUSE)
            now, after, done = self._clock.now(), await self._look(), self._life.reporter.settled
            missed = missed + 1 if after is None else 0
            if before is not None and after is not None:
                await self._adapt(_latency(before, after), max(0, done - settled) / (now - then))
            then, before, settled = now, after, done
        self._life.reporter.note("how long the guest's requests take is not told any more: --adaptive is over")
        await self._set(None)

    async def _look(self) -> Served | None:
        try:
            return await served(self._life.source, self._devices)
        except BlkmigError as error:
            log.warning("how long the guest's requests take could not be told: %s", error)
            return None

    async def _adapt(self, latency: float | None, speed: float) -> None:
        steering, adaptive = self._life.steering, self._adaptive
        limit = int(adaptive.look(latency, speed))
        steering.latency = latency
        if adaptive.held != self._held:
            self._held = adaptive.held
            self._tell(latency)
        if limit != steering.adapted:
            await self._set(limit)

    async def _set(self, limit: int | None) -> None:
        self._life.steering.adapted = limit
        try:
            await self._life.steering.changed()
        except BlkmigError as error:
            log.warning("the limit of --adaptive could not be set: %s", error)

    def _tell(self, latency: float | None) -> None:
        if not self._held:
            self._life.reporter.note("the guest's disks are as quick as before: copying is not held back any more")
            return
        self._life.reporter.note(
            f"the guest's disks take {show_seconds(latency or 0.0)} for a request, without us "
            f"{show_seconds(self._adaptive.usual or 0.0)}: copying is held back, at first to "
            f"{show_rate(self._adaptive.limit)} (--adaptive)"
        )


def _latency(before: Served, after: Served) -> float | None:
    requests = after.requests - before.requests
    return (after.seconds - before.seconds) / requests if requests >= ENOUGH else None
