"""Another host by ssh, where this one is short of what that takes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qemu_blkmig.errors import DestinationFailed
from qemu_blkmig.transport.route import Route
from qemu_blkmig.transport.ssh import SshHost


async def test_that_no_process_can_be_started_is_told_as_an_end_of_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who settles a job tells by that what cannot be reached, and goes on with the rest."""

    async def connected() -> None:
        """It stands."""

    def none_left(*_: object, **__: object) -> subprocess.Popen[bytes]:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    route = Route("hostb", None, None, "qemu-blkmig")
    host = SshHost(route, tmp_path)
    monkeypatch.setattr(host, "_connect", connected)
    monkeypatch.setattr("qemu_blkmig.transport.route.start", none_left)
    monkeypatch.setattr("asyncio.create_subprocess_exec", none_left)
    with pytest.raises(DestinationFailed, match="ssh cannot be started: Resource"):
        await host.start_agent()
    with pytest.raises(DestinationFailed, match="ssh cannot be started: Resource"):
        await host.reach("/run/socket")


async def test_what_was_forwarded_by_a_connection_that_is_gone_is_not_tried_through_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = SshHost(Route("hostb", None, None, "qemu-blkmig"), tmp_path)
    forwarded = []

    async def made() -> bool:
        return True

    async def forward(_direction: str, paths: str) -> None:
        forwarded.append(paths)

    monkeypatch.setattr(host, "_make", made)
    monkeypatch.setattr(host, "_forward", forward)
    monkeypatch.setattr(host, "_echo", "/of/the/first/connection")
    here = await host.reach("/there")
    assert forwarded == [f"{here}:/there"]
