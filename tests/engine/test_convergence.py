"""When it is time to switch over, on a link and a guest that are simulated."""

from __future__ import annotations

import math

import pytest

from qemu_blkmig.engine.convergence import Pace, Policy, Rate, Verdict
from qemu_blkmig.engine.migration import BlockMigration, Phase
from qemu_blkmig.engine.ports import CopyKind, CopyReport
from tests.engine.link import GRANULE, Link

MIB = float(1 << 20)


async def after_bulk(link: Link) -> BlockMigration:
    migration = link.migration()
    await migration.setup()
    await migration.bulk()
    return migration


async def test_a_writer_faster_than_the_link_stalls() -> None:
    link = Link(size=1 << 30, speed=100 * MIB, writer=150 * MIB)
    migration = await after_bulk(link)
    assert await migration.converge(Policy(downtime=0.3, max_rounds=12)) is Verdict.STALLED
    figures = migration.figures()
    assert figures.round == 12
    assert figures.predicted is not None and figures.predicted > 0.3


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.8])
async def test_a_writer_slower_than_the_link_fits(share: float) -> None:
    link = Link(size=1 << 30, speed=100 * MIB, writer=100 * MIB * share)
    migration = await after_bulk(link)
    assert await migration.converge(Policy(downtime=0.3, max_rounds=None)) is Verdict.FITS


async def test_the_final_round_takes_no_longer_than_was_predicted() -> None:
    link = Link(size=2 << 30, speed=100 * MIB, writer=40 * MIB)
    migration = await after_bulk(link)
    await migration.converge(Policy(downtime=0.3, max_rounds=None))
    link.paused = True
    began, predicted = link.time, migration.figures().predicted
    await migration.complete()
    assert predicted is not None and link.time - began <= predicted + 2 * link.flush_time


async def test_an_idle_guest_fits_after_the_one_round_however_small_the_budget() -> None:
    link = Link(size=1 << 30, speed=100 * MIB, writer=0)
    migration = await after_bulk(link)
    assert await migration.converge(Policy(downtime=0, max_rounds=None)) is Verdict.FITS
    assert migration.figures().round == 1


async def test_a_guest_that_only_zeroes_fits() -> None:
    link = Link(size=1 << 30, speed=100 * MIB, writer=10 * MIB)
    link.zeroes = True
    migration = await after_bulk(link)
    assert await migration.converge(Policy(downtime=0.3, max_rounds=5)) is Verdict.FITS


async def test_what_the_flush_costs_counts_against_the_budget() -> None:
    link = Link(size=1 << 30, speed=1000 * MIB, writer=1 * MIB, flush_time=0.5)
    migration = await after_bulk(link)
    assert await migration.converge(Policy(downtime=0.3, max_rounds=5)) is Verdict.STALLED


async def test_the_dirty_rate_is_what_the_guest_writes() -> None:
    link = Link(size=2 << 30, speed=100 * MIB, writer=40 * MIB)
    migration = await after_bulk(link)
    await migration.converge(Policy(downtime=0.3, max_rounds=None))
    assert migration.figures().dirty_rate == pytest.approx(40 * MIB, rel=0.05)


async def test_keeping_in_step_leaves_no_more_dirty_than_half_of_the_budget_and_a_pause_cost() -> None:
    link = Link(size=2 << 30, speed=100 * MIB, writer=40 * MIB)
    migration = await after_bulk(link)
    policy = Policy(downtime=0.3, max_rounds=None, put_off=False)
    await migration.converge(policy)
    left: list[float] = []
    sleep = link.sleep

    async def watch(seconds: float) -> None:
        left.append(link.recorded / link.speed)
        await sleep(seconds)
        if len(left) == 200:
            migration.request_stop()

    link.sleep = watch  # type: ignore[method-assign]
    await migration.keep_in_step(policy)
    assert migration.figures().round > 2
    assert max(left) <= policy.downtime / 2 + GRANULE / link.speed
    assert migration.figures().phase is Phase.DIRTY


def test_a_tiny_round_does_not_wipe_out_what_long_copying_has_told() -> None:
    pace = Pace()
    pace.copied(CopyKind.DIRTY, CopyReport(1000 << 20, 0, 0, 10.0), 10.0)
    pace.copied(CopyKind.DIRTY, CopyReport(1 << 10, 0, 0, 0.001), 0.001)
    assert pace.speed == pytest.approx(100 * MIB, rel=0.01)


def test_the_speed_of_the_bulk_pass_serves_until_dirty_rounds_have_one() -> None:
    pace = Pace()
    assert pace.speed is None
    assert pace.final_round(1, 1) is None
    pace.copied(CopyKind.BULK, CopyReport(100, 0, 0, 1.0), 1.0)
    assert pace.speed == 100
    pace.copied(CopyKind.DIRTY, CopyReport(20, 0, 0, 1.0), 1.0)
    assert pace.speed == 20


def test_nothing_is_put_off_for_a_guest_that_may_stand_still_for_ever() -> None:
    pace = Pace()
    pace.copied(CopyKind.BULK, CopyReport(100, 0, 0, 1.0), 1.0)
    assert pace.room(Policy(downtime=10.0, max_rounds=None), 1) > 0
    assert pace.room(Policy(downtime=math.inf, max_rounds=None), 1) == 0


def test_zeroes_do_not_make_the_link_look_fast() -> None:
    pace = Pace()
    pace.copied(CopyKind.DIRTY, CopyReport(100, 0, 0, 1.0), 1.0)
    pace.copied(CopyKind.DIRTY, CopyReport(0, 10**12, 0, 1.0), 1.0)
    assert pace.speed == 100


def test_a_link_that_has_become_slow_is_believed_within_seconds() -> None:
    rate = Rate()
    rate.add(1000, 10)
    for _ in range(6):
        rate.add(10, 1)
    assert rate.value is not None and rate.value < 20
