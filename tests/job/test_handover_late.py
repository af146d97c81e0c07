"""A handover that does not come to an end in time, after which the source has the guest: what is told of it."""

from __future__ import annotations

import asyncio
import contextlib
from unittest.mock import AsyncMock, MagicMock

import pytest

from qemu_blkmig.errors import DestinationFailed, LibvirtFailed
from qemu_blkmig.job import managed_switchover, switchover
from qemu_blkmig.job.managed_switchover import ManagedSwitchover
from qemu_blkmig.job.place import Local
from qemu_blkmig.job.record import Owner
from qemu_blkmig.job.settlement import Settlement
from qemu_blkmig.job.switchover import Switchover


async def _never() -> None:
    await asyncio.Event().wait()


def _parts() -> tuple[MagicMock, MagicMock, MagicMock, MagicMock, MagicMock]:
    """Life, options, interrupts, watch, and what is connected."""
    life, options, connected = MagicMock(), MagicMock(), MagicMock()
    life.steering.downtime = 0.001
    life.exports.stop = life.job.undecided = AsyncMock()
    life.settle = AsyncMock(return_value=Settlement(Owner.SOURCE))
    connected.carriage.close = connected.guard.stand_down = AsyncMock()
    options.target.place = Local("/there")
    return life, options, MagicMock(), MagicMock(), connected


async def test_of_two_qemus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switchover, "HANDOVER", 0.05)
    over = Switchover(*_parts(), [], AsyncMock())
    ram = AsyncMock()
    ram.wait_completed = _never
    with pytest.raises(DestinationFailed, match="within 0 s"):
        await over._hand_over(ram, 0.0)


async def test_of_a_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(managed_switchover, "HANDOVER", 0.05)
    monkeypatch.setattr(managed_switchover, "starts_of", MagicMock(return_value=contextlib.nullcontext(MagicMock())))
    ends = MagicMock()
    ends.domain.xml = "<domain/>"
    over = ManagedSwitchover(*_parts(), ends, MagicMock(), [], AsyncMock())
    passage = MagicMock()
    passage.migration.wait = _never
    with pytest.raises(LibvirtFailed, match="within 0 s"):
        await over._hand_over(passage, 0.0)
    passage.gate.open.assert_called_once_with()
