"""When RAM is ready the guest stands still: a dirty round under way must not keep it so for as long as it takes."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from qemu_blkmig.cli.clock import RealClock
from qemu_blkmig.errors import RequestError
from qemu_blkmig.job.last_round import LastRound
from qemu_blkmig.job.options import MigrateOptions, OnStall, Target
from qemu_blkmig.job.place import Local
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.job.switchover import Switchover


class SlowRounds:
    """An engine in a round that takes an hour (--bandwidth)."""

    def __init__(self) -> None:
        self.stop_requested = self.cancelled = False

    def figures(self) -> Any:
        return SimpleNamespace(predicted=None)

    def request_stop(self) -> None:
        self.stop_requested = True

    async def keep_in_step(self, _policy: object) -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def one() -> int:
    """Passes over RAM."""
    return 1


async def nothing(*_: object, **__: object) -> None:
    """Done."""


async def test_a_long_round_is_cut_off_when_the_guest_is_paused() -> None:
    job: Any = SimpleNamespace(record=SimpleNamespace(), save=nothing)
    life: Any = SimpleNamespace(
        job=job,
        watchdog=SimpleNamespace(arm=nothing),
        target=SimpleNamespace(claim=nothing),
        source=None,
        reporter=None,
        steering=Steering(0.05, None),
    )
    options = MigrateOptions(
        source="/s", target=Target(Local("/d"), qmp="/q"), downtime=0.05, on_stall=OnStall.WAIT, max_rounds=1
    )
    engine = SlowRounds()
    connected: Any = SimpleNamespace(
        engine=engine,
        guest=SimpleNamespace(check_still_here=nothing, check_awake=nothing),
        log=None,
        guard=None,
        carriage=None,
        verification=None,
    )
    over: Any = Switchover(life, options, Any, SimpleNamespace(clock=RealClock()), connected, (), Any)  # type: ignore[arg-type]
    ram = SimpleNamespace(
        start=nothing, wait_set_up=nothing, allow=nothing, passes=one, wait_paused=lambda: asyncio.sleep(0.01)
    )
    began = RealClock().now()
    async with asyncio.timeout(20):
        paused = await over._migrate_ram(ram)
    assert engine.stop_requested and engine.cancelled
    assert began < paused < RealClock().now()


@pytest.mark.parametrize("taken", [True, False])
async def test_a_round_that_fails_is_left_to_the_last_one_only_if_the_guest_has_been_paused(taken: bool) -> None:
    async def refused(_policy: object) -> None:
        raise RequestError("no block status")

    async def is_taken() -> bool:
        return taken

    asked: list[bool] = []
    engine = SimpleNamespace(keep_in_step=refused, request_stop=lambda: asked.append(True))
    life: Any = SimpleNamespace(steering=Steering(0.4, None))
    watch: Any = SimpleNamespace(clock=RealClock())
    connected: Any = SimpleNamespace(engine=engine, carriage=None, verification=None)
    options = MigrateOptions(source="/s", target=Target(Local("/d"), qmp="/q"), on_stall=OnStall.ABORT)
    last = LastRound(life, options, watch, connected)
    with contextlib.nullcontext() if taken else pytest.raises(RequestError):
        await last.keep_in_step(asyncio.sleep(0.01), nothing(), is_taken)
    # There is nothing to stop: the next call of its would end at once.
    assert not asked


@pytest.mark.parametrize(("spent", "fits"), [(0.0, True), (0.1, True), (0.3, False), (9.0, False)])
async def test_what_the_pause_has_lasted_is_no_more_there_for_the_last_round(spent: float, fits: bool) -> None:
    async def refresh() -> Any:
        return SimpleNamespace(pending=1 << 20, predicted=0.25)

    job = SimpleNamespace(record=SimpleNamespace(was_running=True))
    life: Any = SimpleNamespace(job=job, steering=Steering(0.4, None))
    watch: Any = SimpleNamespace(clock=SimpleNamespace(now=lambda: 100.0 + spent))
    connected: Any = SimpleNamespace(
        engine=SimpleNamespace(refresh=refresh), carriage=None, verification=SimpleNamespace(predicted=0.0)
    )
    options = MigrateOptions(source="/s", target=Target(Local("/d"), qmp="/q"), on_stall=OnStall.ABORT)
    assert await LastRound(life, options, watch, connected).fits(100.0) is fits
