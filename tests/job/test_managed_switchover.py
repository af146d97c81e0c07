"""What begins the switchover of a domain of libvirt's, and what becomes of the job where it does not."""

from __future__ import annotations

from unittest.mock import AsyncMock, MagicMock

import pytest

from qemu_blkmig.errors import BlkmigError, LibvirtFailed, Refused
from qemu_blkmig.job import managed_switchover
from qemu_blkmig.job.managed_switchover import ManagedSwitchover
from qemu_blkmig.job.passage import Passage
from qemu_blkmig.virt.connection import LibvirtError


def _switchover(life: MagicMock | None = None) -> ManagedSwitchover:
    life = life or MagicMock()
    life.watchdog.arm = life.job.save = AsyncMock()
    life.job.record.throttled = []
    connected = MagicMock()
    connected.guest = AsyncMock()
    ends = MagicMock()
    ends.domain.xml = "<domain/>"
    parts = [MagicMock() for _ in range(3)]
    return ManagedSwitchover(life, parts[0], parts[1], parts[2], connected, ends, MagicMock(), [], AsyncMock())


@pytest.mark.parametrize(
    "refused", [Refused("cannot listen", advice="mend that"), LibvirtError("the source's libvirt", "too many", 38)]
)
async def test_what_is_refused_after_hours_of_copying_does_not_cost_the_copies(
    monkeypatch: pytest.MonkeyPatch, refused: BlkmigError
) -> None:
    monkeypatch.setattr(managed_switchover, "probe", AsyncMock())
    monkeypatch.setattr(Passage, "begin", AsyncMock(side_effect=refused))
    over = _switchover()
    with pytest.raises(LibvirtFailed, match="could not begin") as told:
        await over.begin_beforehand()
    assert told.value.mendable and told.value.advice == refused.advice and str(refused) in str(told.value)


@pytest.mark.parametrize(
    ("migration", "state", "overtaken"),
    [
        ("completed", "running", False),
        ("completed", "paused", False),
        ("completed", "postmigrate", True),
        ("pre-switchover", "finish-migrate", True),
        ("active", "running", False),
    ],
)
async def test_a_guest_that_came_here_by_a_migration_is_not_taken_for_paused_by_ours(
    migration: str, state: str, overtaken: bool
) -> None:
    life = MagicMock()
    told = {"query-migrate": {"status": migration}, "query-status": {"status": state}}
    life.source.execute = AsyncMock(side_effect=lambda command, **_: told[command])
    over = _switchover(life)
    assert await over.is_overtaken(MagicMock(found_running=life.job.record.was_running)) == overtaken
