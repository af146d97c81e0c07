"""Who has the guest of two plain QEMUs, where the start at the destination comes to be uncertain."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import AsyncMock, MagicMock

import pytest

from qemu_blkmig.errors import RecordFailed
from qemu_blkmig.job.record import Job, Owner
from qemu_blkmig.job.settle_qemus import Qemus
from qemu_blkmig.job.settlement import Settlement
from qemu_blkmig.job.switchover import Switchover


def _qemu(state: str) -> AsyncMock:
    """One whose migration has completed."""
    told = {"query-migrate": {"status": "completed"}, "query-status": {"status": state, "running": False}}
    monitor = AsyncMock()
    monitor.execute.side_effect = lambda command, *_, **__: told.get(command)
    return monitor


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("QEMU_BLKMIG_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    job = Job.create()
    job.record.owner = Owner.UNDECIDED
    return job


@pytest.mark.parametrize("source_lives", [True, False])
async def test_a_start_that_no_record_tells_of_is_not_told_while_the_source_could_be_given_the_guest(
    job: Job, monkeypatch: pytest.MonkeyPatch, source_lives: bool
) -> None:
    source, destination = _qemu("postmigrate"), _qemu("paused")
    here, there = MagicMock(), MagicMock()
    here.monitor = AsyncMock(return_value=source if source_lives else None)
    there.monitor, there.fence = AsyncMock(return_value=destination), AsyncMock(return_value=True)
    sides = Qemus(job, here, there, MagicMock(), is_off=False)
    with monkeypatch.context() as full:
        full.setattr(job, "save", AsyncMock(side_effect=RecordFailed("no space left on device")))
        owner = await sides.decide(Settlement(Owner.UNDECIDED))
    told = [call.args[0] for call in destination.execute.call_args_list]
    # Whoever settles next goes by the record: it would take one that was told nothing for unable to run the guest.
    assert ("cont" in told, owner) == ((False, Owner.SOURCE) if source_lives else (True, Owner.DESTINATION))
    assert there.fence.await_count == source_lives
    assert job.record.started_there is not source_lives
    job.remove()


async def test_a_start_that_cannot_be_recorded_was_not_told(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    life, connected, target = MagicMock(job=job), MagicMock(), AsyncMock()
    connected.guest.is_paused = AsyncMock(return_value=True)
    parts = [MagicMock() for _ in range(3)]
    over = Switchover(life, parts[0], parts[1], parts[2], connected, [], AsyncMock())
    with monkeypatch.context() as full:
        full.setattr(job, "save", AsyncMock(side_effect=RecordFailed("no space left on device")))
        with pytest.raises(RecordFailed):
            await over._activate(target)
    target.start_guest.assert_not_awaited()
    assert not job.record.started_there
    job.remove()
