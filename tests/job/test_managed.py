"""A domain's migration, where libvirt does not do at once what it is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast
from unittest.mock import AsyncMock, MagicMock

from qemu_blkmig.job.managed import _Run
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.managed_switchover import ManagedSwitchover
from qemu_blkmig.virt.connection import LibvirtError


async def test_a_guest_that_libvirt_did_not_pause_when_the_timeout_had_passed_is_paused_later() -> None:
    life, clock = MagicMock(), MagicMock(sleep=AsyncMock())
    options = cast(ManagedOptions, SimpleNamespace(timeout=7, switchover=SimpleNamespace(waits=False)))
    run = _Run(life, options, MagicMock(), clock, MagicMock())
    run._rounds = MagicMock()
    busy = LibvirtError("the source's libvirt", "cannot acquire state change lock", 68)
    over = MagicMock(hurry=AsyncMock(side_effect=[busy, busy, None]))
    await run._time_out(cast(ManagedSwitchover, over))
    assert over.hurry.await_count == 3
    told = [call.args[0] for call in life.reporter.note.call_args_list]
    assert sum("could not be paused" in each for each in told) == 1
