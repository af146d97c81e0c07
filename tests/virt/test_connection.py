"""Connecting to a libvirt."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from unittest.mock import MagicMock

import pytest

from qemu_blkmig.errors import Refused
from qemu_blkmig.virt.connection import TARGET, Connection, libvirt


def test_nobody_who_ends_waits_for_a_host_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, called, answered = threading.Event(), threading.Event(), threading.Event()

    def connect(_uri: str) -> None:
        called.set()
        answers.wait(30)
        answered.set()

    monkeypatch.setattr(libvirt(), "open", connect)

    async def interrupted() -> None:
        connecting = asyncio.create_task(Connection.open("qemu+ssh://hostb/system", TARGET))
        await asyncio.to_thread(called.wait)
        connecting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await connecting

    asyncio.run(interrupted())
    assert not answered.is_set()
    answers.set()


def test_nobody_who_ends_waits_for_a_call_that_does_not_come_back() -> None:
    answers, called, answered = threading.Event(), threading.Event(), threading.Event()

    def migrate() -> None:
        called.set()
        answers.wait(10)
        answered.set()

    async def settled() -> None:
        moving = asyncio.create_task(Connection(MagicMock(), "test:///default", TARGET).call(migrate))
        await asyncio.to_thread(called.wait)
        assert not moving.done()

    asyncio.run(settled())
    assert not answered.is_set()
    answers.set()


async def test_what_libvirt_says_of_a_host_is_told() -> None:
    with pytest.raises(Refused, match="the destination's libvirt: cannot connect to test:///missing"):
        await Connection.open("test:///missing", TARGET)


async def test_what_a_libvirt_can_do_is_asked_once(daemonless: Connection) -> None:
    handle, daemonless.handle = daemonless.handle, MagicMock(wraps=daemonless.handle)
    told = [await daemonless.capabilities() for _ in range(2)]
    assert told[0] == told[1] and "<host>" in told[0]
    daemonless.handle.getCapabilities.assert_called_once_with()
    daemonless.handle = handle
