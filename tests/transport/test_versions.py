"""Coordinator and agent of different versions: which is older, and what to install where."""

from __future__ import annotations

import sys

import pytest

from qemu_blkmig import errors
from qemu_blkmig.destination import protocol
from qemu_blkmig.destination.service import Service
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.piped import Piped
from qemu_blkmig.transport.starting import start


async def speak(answer: str) -> AgentClient:
    """A client of an agent that greets, and then says `answer` to whatever it is asked."""
    script = f"print('welcome to hostb', flush=True); input(); print({answer!r}, flush=True); input()"
    return AgentClient(await Piped.of(start([sys.executable, "-c", script]), protocol.LINE_LIMIT), where="hostb")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            '{"type":"reply","id":1,"outcome":{"type":"hello","version":"9","protocol":99,"new":1}}',
            "speaks protocol 99",
        ),
        (
            '{"type":"reply","id":1,"outcome":{"type":"failure","kind":"refused","what":"not a request"}}',
            "not a request",
        ),
    ],
    ids=["newer", "older"],
)
async def test_an_agent_of_another_version_is_told_of(answer: str, words: str) -> None:
    client = await speak(answer)
    with pytest.raises(errors.Refused, match=words) as caught:
        await client.hello()
    assert "the same version" in (caught.value.advice or "")
    await client.abandon()


@pytest.mark.parametrize(
    ("theirs", "who"), [(protocol.PROTOCOL + 1, "install qemu-blkmig 9 on"), (1, "on the source host")]
)
async def test_an_agent_tells_which_side_is_older(theirs: int, who: str) -> None:
    async def tell(_: protocol.Progress | protocol.Space) -> None:
        """Nobody listens."""

    outcome = await Service(tell).perform(protocol.Hello("9", theirs))
    assert isinstance(outcome, protocol.Failure)
    assert who in outcome.what


async def test_noise_without_end_is_no_greeting() -> None:
    script = "import sys\nwhile True: print('noise', flush=True)"
    client = AgentClient(await Piped.of(start([sys.executable, "-c", script]), protocol.LINE_LIMIT))
    with pytest.raises(errors.DestinationFailed, match="makes no sense"):
        await client.hello()
    await client.abandon()
