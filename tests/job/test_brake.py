"""A guest is never slowed, nor moved, while its watchdog would let a coordinator hang: whatever happens at once."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock, MagicMock

import pytest

from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.job.brake import Brake
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.managed_switchover import ManagedSwitchover
from qemu_blkmig.job.record import Record

DRIVE = {"qdev": "/machine/vda", "inserted": {"bps": 0, "bps_rd": 0, "bps_wr": 0}}
STATISTICS = {"qdev": "/machine/vda", "stats": {"wr_bytes": 0, "wr_operations": 0}}


class _Watchdog:
    """Answers after a moment, as another process does."""

    armed = False

    async def arm(self, _seconds: float) -> None:
        self.armed = True
        await asyncio.sleep(0)

    def disarm(self) -> None:
        self.armed = False


class _Life(Lifecycle):
    """A job whose QEMU, disk and watchdog answer after a moment; `asked`: what of QEMU, and whether it was armed."""

    def __init__(self) -> None:
        self.watchdog = cast(Any, _Watchdog())
        self.job = MagicMock(record=Record("1a2b", "/run"))
        self.job.save = partial(asyncio.sleep, 0)
        self.reporter = self.steering = MagicMock()
        self.asked: list[tuple[str, bool]] = []
        self._source = cast(Any, SimpleNamespace(execute=self._execute))

    async def _execute(self, command: str, *_: object, **__: object) -> Any:
        await asyncio.sleep(0)
        self.asked.append((command, cast(Any, self.watchdog).armed))
        return {"query-block": [DRIVE], "query-blockstats": [STATISTICS]}.get(command)


def _parts() -> tuple[_Life, Brake, ManagedSwitchover]:
    life, connected, ends = _Life(), MagicMock(), MagicMock()
    connected.guest, ends.domain.xml = AsyncMock(), "<domain/>"
    clock = cast(Clock, SimpleNamespace(now=asyncio.get_running_loop().time))
    disk = SimpleNamespace(name="vda", qdev="/machine/vda")
    connected.guard.libvirt_has_ended = AsyncMock()
    over = ManagedSwitchover(life, MagicMock(), MagicMock(), MagicMock(), connected, ends, MagicMock(), [], AsyncMock())
    return life, Brake(life, cast(Any, [disk]), 64 << 10, clock), over


@pytest.mark.parametrize("turns", range(12))
async def test_a_guest_is_slowed_with_the_watchdog_armed_though_an_attempt_is_called_off_just_then(turns: int) -> None:
    life, brake, over = _parts()
    figures = cast(Any, SimpleNamespace(speed=1e6, dirty_rate=1e6, disks=[], predicted=0.1))
    await over._take_run_state(live=True)
    pressing = asyncio.create_task(brake.press(figures, 0.5, 0.3))
    for _ in range(turns):
        await asyncio.sleep(0)
    await over._give_run_state_back()
    await pressing
    assert ("block_set_io_throttle", True) in life.asked
    assert cast(Any, life.watchdog).armed
    await brake.release()
    assert not cast(Any, life.watchdog).armed


@pytest.mark.parametrize("turns", range(12))
async def test_a_guest_is_moved_with_the_watchdog_armed_though_it_is_slowed_no_more_just_then(turns: int) -> None:
    life, brake, over = _parts()
    figures = cast(Any, SimpleNamespace(speed=1e6, dirty_rate=1e6, disks=[], predicted=0.1))
    await brake.press(figures, 0.5, 0.3)
    releasing = asyncio.create_task(brake.release())
    for _ in range(turns):
        await asyncio.sleep(0)
    await over._take_run_state(live=True)
    assert cast(Any, life.watchdog).armed
    await releasing
    assert cast(Any, life.watchdog).armed
    await over._give_run_state_back()
    assert not cast(Any, life.watchdog).armed
