"""`--retry`: a job that comes to be suspended by a failure that may pass is gone on with by itself."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from qemu_blkmig.errors import BlkmigError, Interrupted
from qemu_blkmig.job.interrupts import Interrupts

if TYPE_CHECKING:
    from qemu_blkmig.engine.ports import Clock
    from qemu_blkmig.job.reporting import Reporter
    from qemu_blkmig.job.result import Result

WAITS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds before each attempt of `--retry`; the last one for all that follow."""


async def persist(
    first: Callable[[Interrupts], Awaitable[Result]],
    again: Callable[[str, Interrupts], Awaitable[Result]],
    retries: int,
    reporter: Reporter,
    clock: Clock,
    on_failure: Callable[[BlkmigError], None],
    *,
    more_follows: bool = False,
) -> Result:
    """Run `first`, and up to `retries` times `again` with the job's name while the job comes to be suspended.

    `on_failure` is told of each failure that another attempt follows. `more_follows`: other work does, which is ended
    by an interrupt that came too late for this. Raises `Interrupted` then, and what the attempts raise.
    """
    suspended: str | None = None
    for number in itertools.count():
        interrupts = Interrupts(reporter.note)
        try:
            result = await (first(interrupts) if suspended is None else again(suspended, interrupts))
            if more_follows and (late := interrupts.error()) is not None:
                raise late
            return result
        except BlkmigError as error:
            suspended = error.suspended
            if suspended is None or number >= retries or error.lasting or isinstance(error, Interrupted):
                raise
            on_failure(error)
            seconds = WAITS[min(number, len(WAITS) - 1)]
            reporter.note(f"{error}; trying again in {seconds:g} s ({number + 1} of {retries})")
            await _wait(clock, seconds, error)
    raise AssertionError("counting has ended")


async def _wait(clock: Clock, seconds: float, error: BlkmigError) -> None:
    try:
        await clock.sleep(seconds)
    except asyncio.CancelledError:
        raise error from None
