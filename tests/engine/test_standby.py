"""Keeping disks in step while the switchover waits: what it costs, and what it keeps."""

from __future__ import annotations

import asyncio

import pytest

from qemu_blkmig.engine.convergence import Policy, Verdict
from qemu_blkmig.engine.migration import BlockMigration
from qemu_blkmig.engine.standby import LEAST, MOST, STALE, Standby
from tests.engine.link import Link

MIB = float(1 << 20)
DAY = 86400.0
POLICY = Policy(downtime=0.3, max_rounds=None)


class Watched(Link):
    """A link that notes its pauses and what a switchover would have cost at each, and ends the standby after a time."""

    def __init__(self, *, size: int = 2 << 30, speed: float, writer: float, lasts: float) -> None:
        super().__init__(size=size, speed=speed, writer=writer)
        self.lasts = lasts
        self.until = asyncio.Event()
        self.pauses: list[float] = []
        self.owed: list[float] = []

    async def sleep(self, seconds: float) -> None:
        """Note it."""
        self.pauses.append(seconds)
        self._pass(seconds)
        self.owed.append(self.recorded / self.speed)
        if self.time >= self.lasts:
            self.until.set()


async def stand_by(link: Watched) -> BlockMigration:
    """Stand by for as long as the link lasts."""
    migration = link.migration()
    await migration.setup()
    await migration.bulk()
    await migration.converge(Policy(downtime=0.3, max_rounds=20))
    link.lasts += link.time
    link.dirty_bytes = 0
    await migration.stand_by(POLICY, link.until)
    return migration


async def test_a_day_of_an_idle_guest_costs_nothing_but_ever_fewer_looks() -> None:
    link = Watched(speed=100 * MIB, writer=0, lasts=DAY)
    await stand_by(link)
    assert link.dirty_bytes == 0
    assert len(link.pauses) < DAY / MOST * 1.1
    assert link.pauses[:20] == sorted(link.pauses[:20]) and link.pauses[-1] == MOST


async def test_a_guest_that_writes_little_is_copied_as_seldom_as_may_be_and_is_always_ready() -> None:
    link = Watched(speed=100 * MIB, writer=0.1 * MIB, lasts=6 * 3600.0)
    migration = await stand_by(link)
    assert max(link.owed) <= POLICY.downtime, "the switchover would have fitted at any time"
    assert link.dirty_bytes <= 0.1 * MIB * link.lasts, "nothing is copied oftener than it was written"
    assert migration.figures().round < link.lasts / 100
    assert await migration.converge(POLICY) is Verdict.FITS


@pytest.mark.parametrize("share", [0.05, 0.3])
async def test_pauses_shrink_with_the_dirty_rate_so_that_the_prediction_stays_within_the_limit(share: float) -> None:
    link = Watched(speed=100 * MIB, writer=100 * MIB * share, lasts=120.0)
    await stand_by(link)
    assert max(link.pauses) <= POLICY.downtime / share
    assert sorted(link.owed)[len(link.owed) * 9 // 10] <= POLICY.downtime


async def test_a_guest_that_dirties_faster_than_the_link_carries_does_not_get_the_link_all_to_itself() -> None:
    link = Watched(size=256 << 20, speed=1 * MIB, writer=2 * MIB, lasts=4 * 3600.0)
    await stand_by(link)
    assert link.dirty_bytes <= 0.3 * link.speed * link.time


async def test_the_word_to_switch_over_ends_a_pause_at_once() -> None:
    link = Watched(speed=100 * MIB, writer=0, lasts=DAY)
    asleep = asyncio.Event()

    async def sleep(_seconds: float) -> None:
        asleep.set()
        await asyncio.Event().wait()

    link.sleep = sleep  # type: ignore[method-assign,assignment]
    standing = asyncio.create_task(stand_by(link))
    await asleep.wait()
    link.until.set()
    async with asyncio.timeout(10):
        await standing


def test_what_is_dirty_is_not_left_for_ever_however_little_it_is() -> None:
    standby = Standby(0.0)
    assert not standby.due(0.01, 4096, 0.3, STALE - 1)
    assert standby.due(0.01, 4096, 0.3, STALE)
    assert not standby.due(0.0, 0, 0.3, 10 * STALE)
    assert standby.rest(0.001, 0.0, 0.3, STALE) == LEAST
    assert not standby.due(0.01, 4096, 0.3, STALE + 1)
