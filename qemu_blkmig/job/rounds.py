"""Rounds until the last one would fit the downtime, and how they end when it never comes to that."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

from qemu_blkmig.engine.convergence import Policy, Verdict
from qemu_blkmig.errors import Stalled
from qemu_blkmig.job.adapting import Adapting
from qemu_blkmig.job.brake import SHARES, Brake
from qemu_blkmig.job.connected import Connected, begin
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.moment import reached
from qemu_blkmig.job.options import MigrateOptions, OnStall, Verify
from qemu_blkmig.job.reporting import STANDBY, Stopwatch
from qemu_blkmig.job.result import Downtime
from qemu_blkmig.job.sharing import Sharing
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.units import show_seconds

SHARE_OF_DISKS = 0.5
"""The disks' share of the downtime that the rounds aim at; the rest is for RAM and device state."""
SHARE_OF_COPYING = 0.6
"""Of the disks' share, what is left to copying when all that is copied is to be read back as well."""
ROUNDS_OF_A_SHARE = 8
"""Rounds in which it shows whether the guest is slowed far enough."""


def disks_budget(options: MigrateOptions | ManagedOptions, downtime: float) -> float:
    """Seconds of `downtime` that the last round of the disks is to fit."""
    share = 1.0 if isinstance(options, MigrateOptions) and options.pause_only else SHARE_OF_DISKS
    return downtime * share * (SHARE_OF_COPYING if options.verify is Verify.WRITTEN else 1.0)


class Rounds:
    """The rounds over a guest's disks, from the bulk pass to the switchover."""

    def __init__(
        self,
        life: Lifecycle,
        options: MigrateOptions | ManagedOptions,
        watch: Stopwatch,
        connected: Connected,
        disks: Sequence[Disk],
    ) -> None:
        self._life = life
        self._options = options
        self._reporter = life.reporter
        self._watch = watch
        self._clock = watch.clock
        self._connected = connected
        self._engine = connected.engine
        max_rounds = None if options.on_stall is OnStall.WAIT else options.max_rounds
        self._policy = Policy(downtime=0.0, max_rounds=max_rounds, put_off=options.put_off)
        self._hurried = False
        life.journal.fact("disks' share", str(disks_budget(options, 1.0)))
        self.brake = Brake(life, disks, options.transfer.granularity, self._clock)
        self._adapting = Adapting(life, disks, self._clock, wanted=options.transfer.adaptive)

    async def lead_to(self, switch_over: Callable[[], Awaitable[Downtime | None]]) -> Downtime | None:
        """The bulk pass, and rounds until the guest may be switched over; then `switch_over`, and what that returns.

        What was written is read back beside it, where that was asked for. Raises `Stalled` when the guest may not be
        switched over and the user wants no more rounds; what is raised ends a job.
        """
        life = self._life
        payload = self._connected.carriage.payload
        transfer = self._options.transfer
        async with Sharing(life.job.record.job, transfer, life.steering, self._reporter, payload) as sharing:
            life.steering.on_change(self._follow)
            await self._follow()
            self._engine.aim(self._policy)
            async with self._connected.verification.in_background():
                async with self._adapting:
                    with self._watch.phase("bulk"):
                        await begin(life, self._connected.carriage, self._connected.engine)
                        with self._connected.verification.beside_pass():
                            await self._engine.bulk()
                sharing.bulk_over()
                if self._options.switchover.waits:
                    await self._wait_for_word()
                else:
                    await self.converge()
                return await switch_over()

    def hurry(self) -> None:
        """The next round is the last one, however long the guest stands still for it."""
        self._policy.downtime = math.inf
        self._hurried = True

    async def _wait_for_word(self) -> None:
        """Keep the disks in step until somebody says that the guest may move, and the last round fits then."""
        when, word = self._options.switchover, self._life.steering.switchover
        timer = asyncio.create_task(self._give_word(when.at)) if when.at is not None else None
        try:
            while True:
                self._reporter.note(
                    f"the disks are kept in step; the guest moves {f'at {when}, or ' if timer else ''}"
                    f"when you run: qemu-blkmig switchover {self._life.job.record.job}"
                )
                with self._watch.phase(STANDBY):
                    await self._engine.stand_by(self._policy, word)
                try:
                    return await self.converge()
                except Stalled as error:
                    # What days of copying have brought over is not thrown away for that.
                    word.clear()
                    self._reporter.note(f"not moved: {error}")
        finally:
            if timer is not None:
                timer.cancel()

    async def _give_word(self, at: float) -> None:
        await reached(at, self._clock.sleep)
        self._life.steering.switchover.set()

    async def _follow(self) -> None:
        """The rounds aim at the downtime in force."""
        if not self._hurried:
            self._policy.downtime = disks_budget(self._options, self._life.steering.downtime)

    async def converge(self) -> None:
        """Rounds until the last one would fit. Raises `Stalled` when it does not and the user wants no more."""
        with self._watch.phase("dirty"):
            await self.brake.look()
            verdict = await self._engine.converge(self._policy)
            if verdict is Verdict.STALLED and self._options.on_stall is OnStall.THROTTLE:
                verdict = await self._converge_slowed()
        if verdict is Verdict.FITS:
            return
        figures = self._engine.figures()
        text = (
            f"after {figures.round} rounds the last one is still predicted to take "
            f"{show_seconds(figures.predicted or 0)}, more than the disks' share "
            f"({show_seconds(self._policy.downtime)}) of --downtime: the guest writes faster than its disks are copied"
        )
        if self._options.on_stall is OnStall.PAUSE:
            self._reporter.note(f"{text}; it will be paused for as long as it takes (--on-stall pause)")
            return
        await self.brake.release()
        raise Stalled(text, advice="raise --downtime or --bandwidth, or choose --on-stall throttle, pause or wait")

    async def _converge_slowed(self) -> Verdict:
        """Rounds with the guest's writes slowed, the more the longer it takes."""
        usual, self._policy.max_rounds = self._policy.max_rounds, ROUNDS_OF_A_SHARE
        try:
            for share in SHARES:
                await self.brake.press(self._engine.figures(), share, self._policy.downtime)
                if await self._engine.converge(self._policy) is Verdict.FITS:
                    return Verdict.FITS
            return Verdict.STALLED
        finally:
            self._policy.max_rounds = usual
