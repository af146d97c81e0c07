"""Jobs that share: who is there is known at once, everybody gets the same or leaves it to others, slots are bounded."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.options import Transfer
from qemu_blkmig.job.sharing import TURN, Circle, Member, Sharing, divide
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.places import STATE_VARIABLE

MIB = 1 << 20


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of the test's own, and short waits."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.setattr("qemu_blkmig.job.sharing.POLL", 0.01)
    monkeypatch.setattr("qemu_blkmig.job.sharing.HOLD", 0.1)
    return tmp_path / "state"


class Carried:
    """Bytes that a job has carried: as much as it may, but no more than `able` a second (None: any rate)."""

    def __init__(self, able: int | None = None) -> None:
        self.able = able
        self.steering = Steering(0.3, None)
        self._count = 0.0
        self._last = asyncio.get_running_loop().time()

    async def payload(self) -> int:
        """What `Sharing` asks."""
        now = asyncio.get_running_loop().time()
        rates = [rate for rate in (self.able, self.steering.rate) if rate is not None]
        self._count += (now - self._last) * min(rates, default=0)
        self._last = now
        return int(self._count)


def job(
    name: str, transfer: Transfer, told: list[str] | None = None, able: int | None = None
) -> tuple[Sharing, Steering]:
    """A job that shares, and carries as much as it may, or is `able` to."""
    carried = Carried(able)
    carried.steering.bandwidth = transfer.bandwidth
    heard = told if told is not None else []
    reporter: Any = SimpleNamespace(note=heard.append, stage=heard.append)
    return Sharing(name, transfer, carried.steering, reporter, carried.payload), carried.steering


async def until(steering: Steering, rate: int) -> None:
    """Wait until the job may carry `rate`."""
    async with asyncio.timeout(10):
        while steering.rate != rate:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_a_member_that_died_is_none_any_more(tmp_path: Path) -> None:
    circle = Circle(tmp_path / "circle")
    lives, dies = circle.join("lives", 1), circle.join("dies", 2)
    assert lives is not None and dies is not None
    assert {name: member.worth for name, member in circle.members().items()} == {"lives": 1, "dies": 2}
    os.close(dies)
    assert circle.members() == {"lives": Member(1, None)}
    assert circle.join("late", 3, lambda members: len(members) < 1) is None
    os.close(lives)


async def test_a_group_s_budget_is_shared_evenly_and_a_leaver_s_part_goes_to_the_others() -> None:
    transfer = Transfer(group=("backup", 12 * MIB))
    (one, rate_one), (two, rate_two), (three, rate_three) = job("1", transfer), job("2", transfer), job("3", transfer)
    async with one:
        assert rate_one.rate == 12 * MIB
        async with two, three:
            for each in (rate_one, rate_two, rate_three):
                await until(each, 4 * MIB)
        await until(rate_one, 12 * MIB)
        async with job("4", Transfer(group=("other", MIB)))[0]:
            await asyncio.sleep(0.05)
            assert rate_one.rate == 12 * MIB, "another group is another's affair"


@pytest.mark.parametrize("how", ["idle", "slower", "limited"])
async def test_what_a_job_leaves_of_its_part_goes_to_those_who_have_use_for_it_and_back_again(how: str) -> None:
    transfer = Transfer(group=("backup", 12 * MIB))
    (one, rate_one), (two, rate_two) = job("1", transfer), job("2", transfer)
    limit = MIB if how == "limited" else None
    other = Transfer(group=("backup", 12 * MIB), bandwidth=limit)
    lazy, rate_lazy = job("3", other, able={"idle": 0, "slower": MIB}.get(how))
    least = 12 * MIB // 2 if how == "idle" else 11 * MIB // 2 - MIB // 4
    async with one, two:
        async with lazy:
            for each in (rate_one, rate_two):
                await until_at_least(each, least)
            assert rate_lazy.rate == (limit or 4 * MIB), "it need not ask before it carries more"
            rate_lazy.bandwidth = None
            able(lazy, None)
            for each in (rate_one, rate_two, rate_lazy):
                await until(each, 4 * MIB)
        for each in (rate_one, rate_two):
            await until(each, 6 * MIB)


def able(sharing: Sharing, rate: int | None) -> None:
    """From now on the job can carry so much."""
    carried: Any = sharing._appetite._payload
    carried.__self__.able = rate


async def until_at_least(steering: Steering, rate: int) -> None:
    """Wait until the job may carry `rate`, or more."""
    async with asyncio.timeout(10):
        while (steering.rate or 0) < rate:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


wishes = st.none() | st.integers(0, 20 * MIB)


@given(st.lists(wishes, min_size=1, max_size=8), st.integers(64 << 10, 16 * MIB))
def test_a_budget_is_divided_so_that_nobody_goes_short_and_nothing_is_left_over_that_somebody_wants(
    wanted: list[int | None], budget: int
) -> None:
    members = {str(number): Member(budget, wants) for number, wants in enumerate(wanted)}
    shares = divide(members)
    even = budget // len(wanted)
    used = {
        name: shares[name] if member.wants is None else min(member.wants, shares[name])
        for name, member in members.items()
    }
    assert all(share >= even for share in shares.values())
    assert sum(used.values()) <= budget
    short = [name for name, member in members.items() if member.wants is None or used[name] < member.wants]
    if short:
        assert sum(used.values()) > budget - len(wanted), "somebody wants what is left over"
        assert len({shares[name] for name in short}) == 1, "and those who do get the same"
        assert shares[short[0]] == max(shares.values())


async def test_who_joins_a_group_that_has_less_is_told_so() -> None:
    told: list[str] = []
    async with job("1", Transfer(group=("wan", MIB)))[0], job("2", Transfer(group=("wan", 2 * MIB)), told)[0]:
        assert told == ["group wan has 1.0 MiB/s in all, as another of its jobs asked for"]


async def test_slots_are_bounded_taken_in_turn_and_waiting_is_told() -> None:
    transfer, order = Transfer(slots=2), list[str]()
    (one, _), (two, _) = job("1", transfer), job("2", transfer)
    told: list[str] = []

    async def enter(name: str) -> None:
        sharing, _ = job(name, transfer, told)
        async with sharing:
            order.append(name)

    async with one, two:
        waiting = []
        for name in ("b", "a", "c"):
            waiting.append(asyncio.create_task(enter(name)))
            async with asyncio.timeout(10):
                while told.count("waits for a slot, 2 of 2 taken") < len(waiting):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        assert order == [] and "waiting" in told
        two.bulk_over()
        await asyncio.gather(*waiting)
    assert order == ["b", "a", "c"]


@pytest.mark.parametrize("group", [("../x", MIB), ("", MIB), (".turn", MIB), ("a", 5)])
def test_a_group_that_makes_no_sense_is_refused(group: tuple[str, int]) -> None:
    with pytest.raises(UsageError):
        Transfer(group=group)


async def test_what_is_told_as_a_job_ends_goes_into_no_file_that_has_its_descriptor_since(state: Path) -> None:
    group = state / "sharing" / "group-wan"
    sharing, _ = job("a", Transfer(group=("wan", 100 * MIB)))
    turns = []
    async with sharing:
        turns.append(os.open(group / TURN, os.O_RDWR))
        fcntl.flock(turns[0], fcntl.LOCK_EX)
        # The next look is on its way, and waits for its turn.
        await asyncio.sleep(0.1)
    others = [os.open(state / f"record{number}", os.O_RDWR | os.O_CREAT, 0o600) for number in range(8)]
    for other in others:
        os.write(other, b"undecided")
    os.close(turns.pop())
    await asyncio.get_running_loop().shutdown_default_executor()
    found = {(state / f"record{number}").read_bytes() for number in range(8)}
    for other in others:
        os.close(other)
    assert found == {b"undecided"}


async def test_a_job_that_ends_just_when_it_gets_a_slot_leaves_it_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be gone on with in this very process, and would wait for itself."""
    joined, told = threading.Event(), threading.Event()
    join = Circle.join

    def join_late(circle: Circle, *arguments: Any) -> int | None:
        member = join(circle, *arguments)
        joined.set()
        assert told.wait(60)
        return member

    sharing, _ = job("one", Transfer(slots=1))
    monkeypatch.setattr(Circle, "join", join_late)
    entering = asyncio.create_task(sharing.__aenter__())
    assert await asyncio.to_thread(joined.wait, 60)
    entering.cancel()
    await asyncio.sleep(0)
    told.set()
    await asyncio.wait({entering})
    assert entering.cancelled()
    monkeypatch.setattr(Circle, "join", join)
    again, _ = job("one", Transfer(slots=1))
    async with asyncio.timeout(60), again:
        again.bulk_over()
