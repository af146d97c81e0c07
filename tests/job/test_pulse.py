"""What is done while a guest stands still ends when the other host falls silent, and only then."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from qemu_blkmig.errors import DestinationFailed, HostSilent
from qemu_blkmig.job import pulse as module
from qemu_blkmig.job.pulse import LIMIT, pulse
from qemu_blkmig.transport.client import AgentClient


class Agent:
    """Answers, or not, or is gone."""

    where = "hostb"

    def __init__(self, answer: bool | DestinationFailed, slowest: float = 0.0) -> None:
        self.slowest = slowest
        self.limits: list[float] = []
        self.asked = asyncio.Event()
        self._answer = answer

    async def answers(self, seconds: float) -> bool:
        self.limits.append(seconds)
        self.asked.set()
        if isinstance(self._answer, DestinationFailed):
            raise self._answer
        return self._answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.0)


async def test_a_silent_host_ends_the_work() -> None:
    agent = Agent(answer=False)
    with pytest.raises(HostSilent, match="hostb did not answer for 5 s"):
        async with pulse(cast(AgentClient, agent)):
            await asyncio.Event().wait()
    await asyncio.sleep(0)


@pytest.mark.parametrize("answer", [True, DestinationFailed("gone")])
async def test_one_that_answers_or_is_known_to_be_gone_does_not(answer: bool | DestinationFailed) -> None:
    agent = Agent(answer)
    async with pulse(cast(AgentClient, agent)):
        await agent.asked.wait()
        await asyncio.sleep(0)


async def test_another_s_cancellation_is_not_taken_for_silence() -> None:
    agent = Agent(answer=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0), pulse(cast(AgentClient, agent)):
            await asyncio.Event().wait()


@pytest.mark.parametrize(("slowest", "limit"), [(0.1, LIMIT), (3.0, 12.0), (15.0, 20.0)])
async def test_a_narrow_line_is_given_more_time(slowest: float, limit: float) -> None:
    agent = Agent(True, slowest)
    async with pulse(cast(AgentClient, agent)):
        await agent.asked.wait()
    assert agent.limits[0] == limit
