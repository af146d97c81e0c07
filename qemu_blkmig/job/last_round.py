"""The last round: what is done to the disks from when RAM starts to move until they are equal, the guest paused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine

from qemu_blkmig.engine.convergence import Policy
from qemu_blkmig.errors import RequestError, SourceReadError, Stalled
from qemu_blkmig.job.connected import Connected
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import MigrateOptions, OnStall, Verify
from qemu_blkmig.job.reporting import Stopwatch
from qemu_blkmig.job.rounds import disks_budget
from qemu_blkmig.time_limit import time_limit

log = logging.getLogger(__name__)

LEAST_FOR_RAM = 0.01
"""Seconds of downtime that RAM is left at least."""
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
"""Of the downtime that RAM may take, one after the other while it is not ready to cross in so little."""
LOOSENED = 0.25
"""Seconds between two of them."""
PATIENCE = 10.0
"""Seconds that the last pass may take at least, whatever was predicted, before the guest is given back."""


class LastRound:
    """The disks' part of a switchover."""

    def __init__(
        self, life: Lifecycle, options: MigrateOptions | ManagedOptions, watch: Stopwatch, connected: Connected
    ) -> None:
        self._life = life
        self._options = options
        self._steering = life.steering
        self._watch = watch
        self._clock = watch.clock
        self._engine = connected.engine
        self._carriage = connected.carriage
        self._verification = connected.verification
        self._policy = Policy(downtime=0.0, max_rounds=None, put_off=options.put_off)
        self._caught_up = False
        self._share = SHARES[0]
        self.may_last = options.on_stall is OnStall.PAUSE
        """Whether the guest may stand still for as long as it takes."""

    async def aim(self) -> None:
        """Go by the downtime in force, from now on."""
        self._steering.on_change(self._follow)
        await self._follow()

    async def _follow(self) -> None:
        self._policy.downtime = disks_budget(self._options, self._steering.downtime)

    async def catch_up(self, within: float = 0.0) -> None:
        """What was copied while the guest ran is to be read back by now: with it paused only the rest is.

        `within`: seconds that may be left of it, for `caught_up`.
        """
        self._verification.release()
        self._caught_up = not within
        self._share = SHARES[0]
        if self._verification.wanted:
            with self._watch.phase("readback"):
                await self._verification.catch_up(self._policy, within)

    async def caught_up(self) -> None:
        """Wait, while the disks are kept in step, until the rest is small enough for the guest to be paused."""
        if self._verification.wanted:
            await self._verification.until_caught_up(self._policy)
        self._caught_up = True

    def left_for_ram(self) -> float:
        """Seconds of the downtime that RAM may take for now; see `loosen`.

        The disks never get more than their part of it: a burst that is being copied passes.
        """
        for_disks = min(self._engine.figures().predicted or 0.0, disks_budget(self._options, self._steering.downtime))
        return max(LEAST_FOR_RAM, self._share * (self._steering.downtime - for_disks))

    async def loosen(self, allow: Callable[[float], Awaitable[None]], passes: Callable[[], Awaitable[int]]) -> None:
        """Have RAM allowed more and more of the downtime (seconds), up to all that the disks leave.

        QEMU pauses the guest as soon as the rest of RAM fits what is allowed: a guest that hardly writes to its RAM
        stands still no longer than it must. `passes`: how often RAM has been passed over; the first is waited for.
        """
        for self._share in SHARES:
            await allow(self.left_for_ram())
            await self._clock.sleep(LOOSENED)
            while self._share == SHARES[0] and await passes() < 2:
                await self._clock.sleep(LOOSENED)

    async def keep_in_step(
        self,
        paused: Awaitable[None],
        beside: Coroutine[None, None, None],
        taken: Callable[[], Awaitable[bool]] | None = None,
    ) -> float:
        """Rounds until `paused` returns, while `beside` is done; when that was. Raises what any of them does.

        `taken`: whether the guest has been paused, and its disks perhaps been taken from it, before `paused` is back:
        a round that cannot go on then is left to the last one.
        """
        try:
            async with asyncio.TaskGroup() as group:
                rounds = group.create_task(self._rounds(taken))
                bound = group.create_task(beside)
                await paused
                began = self._clock.now()
                bound.cancel()
                if not rounds.done():
                    self._engine.request_stop()
                # What a longer round still holds is left to the last one, which --bandwidth does not slow down.
                await asyncio.wait({rounds}, timeout=self._policy.downtime)
                rounds.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return began

    async def _rounds(self, taken: Callable[[], Awaitable[bool]] | None) -> None:
        try:
            await self._engine.keep_in_step(self._policy)
        except (RequestError, SourceReadError) as error:
            if taken is None or not await taken():
                raise
            log.info("the round under way at the pause is left to the last one: %s", error)

    async def fits(self, paused: float) -> bool:
        """With the guest paused since `paused`: whether what is dirty fits what is left of the downtime, if it ran."""
        figures = await self._engine.refresh()
        left = self._steering.downtime - (self._clock.now() - paused)
        may_last = self.may_last or not self._life.job.record.was_running
        reading = 0.0 if self._caught_up else self._verification.predicted
        if may_last or not (figures.pending or reading):
            return True
        return (figures.predicted or 0.0) + reading <= left

    async def complete(self) -> None:
        """Copy what is left, the guest being paused, and make it stable. Raises `Stalled` when that takes too long."""
        self._verification.hold()
        predicted = self._engine.figures().predicted or 0.0
        limit = max(PATIENCE, 10 * self._steering.downtime, 4 * predicted)
        try:
            async with time_limit(limit):
                await self._engine.complete(self._verification.ahead)
        except TimeoutError:
            raise Stalled(f"the last pass did not end within {limit:.0f} s; the guest was given back") from None

    async def verify(self) -> None:
        """Prove what was asked for. Raises `ContentsDiffer`."""
        if self._options.verify is Verify.FULL:
            with self._watch.phase("verify"):
                await self._carriage.compare(self._verification, self.complete)
            self._watch.step("both sides compared")
        if self._verification.wanted:
            with self._watch.phase("verify"):
                while not await self._verification.rest():
                    await self.complete()
            self._watch.step("read back")
