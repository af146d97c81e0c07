"""Jobs that share: who is there is known at once, everybody gets the same, slots are bounded and taken in turn."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.options import Transfer
from qemu_blkmig.job.sharing import Circle, Sharing
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.places import STATE_VARIABLE

MIB = 1 << 20


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of the test's own, and short waits."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.setattr("qemu_blkmig.job.sharing.POLL", 0.01)
    return tmp_path / "state"


def job(name: str, transfer: Transfer, told: list[str] | None = None) -> tuple[Sharing, Steering]:
    """A job that shares."""
    steering = Steering(0.3, transfer.bandwidth)
    heard = told if told is not None else []
    reporter: Any = SimpleNamespace(note=heard.append, stage=heard.append)
    return Sharing(name, transfer, steering, reporter), steering


async def until(steering: Steering, rate: int) -> None:
    """Wait until the job may carry `rate`."""
    async with asyncio.timeout(10):
        while steering.rate != rate:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_a_member_that_died_is_none_any_more(tmp_path: Path) -> None:
    circle = Circle(tmp_path / "circle")
    lives, dies = circle.join("lives", 1), circle.join("dies", 2)
    assert lives is not None and dies is not None
    assert circle.members() == {"lives": 1, "dies": 2}
    os.close(dies)
    assert circle.members() == {"lives": 1}
    assert circle.join("late", 3, lambda members: len(members) < 1) is None
    os.close(lives)


async def test_a_group_s_budget_is_shared_evenly_and_a_leaver_s_part_goes_to_the_others() -> None:
    transfer = Transfer(group=("backup", 12 * MIB))
    (one, rate_one), (two, rate_two) = job("1", transfer), job("2", transfer)
    limited, rate_limited = job("3", Transfer(group=("backup", 12 * MIB), bandwidth=MIB))
    async with one:
        assert rate_one.rate == 12 * MIB
        async with two, limited:
            await until(rate_one, 4 * MIB)
            await until(rate_two, 4 * MIB)
            assert rate_limited.rate == MIB, "the job's own limit holds as well"
        await until(rate_one, 12 * MIB)
        async with job("4", Transfer(group=("other", MIB)))[0]:
            await asyncio.sleep(0.05)
            assert rate_one.rate == 12 * MIB, "another group is another's affair"


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
