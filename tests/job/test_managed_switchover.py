"""What begins the switchover of a domain of libvirt's, and what becomes of the job where it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast
from unittest.mock import AsyncMock, MagicMock

import pytest

from qemu_blkmig.errors import BlkmigError, LibvirtFailed, Refused
from qemu_blkmig.job import managed_switchover
from qemu_blkmig.job.managed_switchover import ManagedSwitchover
from qemu_blkmig.job.passage import Passage
from qemu_blkmig.job.record import Owner
from qemu_blkmig.virt.connection import LibvirtError


def _switchover(life: MagicMock | None = None) -> ManagedSwitchover:
    life = life or MagicMock()
    life.watchdog.arm = life.job.save = AsyncMock()
    life.job.record.throttled = []
    connected = MagicMock()
    connected.guest = AsyncMock()
    connected.guard.libvirt_has_ended = AsyncMock()
    ends = MagicMock()
    ends.domain.xml = "<domain/>"
    ends.domain.name = "web1"
    parts = [MagicMock() for _ in range(3)]
    parts[0].source_uri = None
    return ManagedSwitchover(life, parts[0], parts[1], parts[2], connected, ends, MagicMock(), [], AsyncMock())


@pytest.mark.parametrize(
    "refused", [Refused("cannot listen", advice="mend that"), LibvirtError("the source's libvirt", "too many", 38)]
)
async def test_what_is_refused_after_hours_of_copying_does_not_cost_the_copies(
    monkeypatch: pytest.MonkeyPatch, refused: BlkmigError
) -> None:
    monkeypatch.setattr(managed_switchover, "probe", AsyncMock())
    monkeypatch.setattr(managed_switchover, "renewed", AsyncMock(return_value=(MagicMock(), [])))
    monkeypatch.setattr(Passage, "begin", AsyncMock(side_effect=refused))
    over = _switchover()
    with pytest.raises(LibvirtFailed, match="could not begin") as told:
        await over.begin_beforehand()
    assert told.value.mendable and told.value.advice == refused.advice and str(refused) in str(told.value)


class _Unending:
    """An attempt that libvirt has not ended, although it was told to, until `over` is set."""

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.migration = self
        self.found_running = True

    @property
    def ended(self) -> bool:
        return self.over.is_set()

    async def end(self) -> None:
        return

    async def failed(self) -> None:
        await self.over.wait()


async def test_what_libvirt_ends_late_is_waited_for_and_its_run_state_given_back_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    life = MagicMock()
    over, late, following = _switchover(life), _Unending(), MagicMock()
    record = life.job.record
    record.run_state_taken = record.migrating = record.was_running = True
    monkeypatch.setattr(over._ends.source, "call", paused := AsyncMock())
    monkeypatch.setattr(over, "_begin", AsyncMock(return_value=following))
    monkeypatch.setattr(managed_switchover, "ENDING", 0.05)
    await over.call_off(cast(Passage, late))
    assert record.run_state_taken and record.migrating, "it is under way still"
    assert "has not ended" in life.reporter.note.call_args[0][0]
    with pytest.raises(LibvirtFailed, match="cannot begin another") as told:
        await over.begin_beforehand()
    assert told.value.mendable and told.value.busy and record.migrating
    monkeypatch.setattr(over._beforehand, "take", AsyncMock(return_value=None))
    with pytest.raises(LibvirtFailed, match="cannot begin another"):
        async with over._under_way(1):
            pytest.fail("two at once")
    record.was_running = False
    late.over.set()
    assert await over.begin_beforehand() is following
    assert not record.run_state_taken and not record.migrating
    paused.assert_awaited_once_with(over._ends.handle.suspend)
    assert "it is paused again (virsh resume web1)" in life.reporter.note.call_args[0][0]


async def test_a_guest_that_cannot_be_paused_again_is_told_of_and_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    life = MagicMock()
    over, ended = _switchover(life), _Unending()
    ended.over.set()
    life.job.record.was_running = False
    busy = LibvirtError("the source's libvirt", "busy", 68)
    monkeypatch.setattr(over._ends.source, "call", AsyncMock(side_effect=busy))
    await over.call_off(cast(Passage, ended))
    assert "did not pause" in life.reporter.note.call_args[0][0]
    cast(AsyncMock, over._guard.libvirt_has_ended).assert_awaited_once_with()


@pytest.mark.parametrize("owner", Owner)
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("state", [1, 3], ids=["running", "paused"])
async def test_a_guest_that_libvirt_pauses_for_us_when_its_migration_has_failed_goes_on(
    monkeypatch: pytest.MonkeyPatch, state: int, owner: Owner, *, told: bool
) -> None:
    life = MagicMock()
    over, ended = _switchover(life), _Unending()
    ended.over.set()
    record = life.job.record
    record.was_running, record.owner, record.told_to_pause = True, owner, False
    handle = over._ends.handle
    cast(MagicMock, handle.state).return_value = [state, 0]

    async def call(function: Callable[[], object]) -> object:
        return function()

    monkeypatch.setattr(over._ends.source, "call", call)
    over._moving = told
    await over.hurry()
    assert cast(MagicMock, handle.suspend).called is record.told_to_pause is told
    await over.end(cast(Passage, ended))
    resumed = told and state == 3 and owner is Owner.SOURCE
    assert cast(MagicMock, handle.resume).called is resumed
    assert record.told_to_pause is (told and owner is not Owner.SOURCE)


async def test_a_pause_that_was_about_to_be_asked_for_when_the_migration_ended_is_not() -> None:
    life = MagicMock()
    over, ended, synced = _switchover(life), _Unending(), asyncio.Event()
    ended.over.set()
    record, handle = life.job.record, over._ends.handle
    record.was_running, record.owner, record.told_to_pause = True, Owner.SOURCE, False
    cast(MagicMock, handle.state).return_value = [1, 0]
    life.job.save = AsyncMock(side_effect=synced.wait)

    async def call(function: Callable[[], object]) -> object:
        return function()

    cast(MagicMock, over._ends.source).call = call
    over._beforehand = AsyncMock()
    over._beforehand.take.return_value = ended
    async with over._under_way(1):
        over._moving = True
        hurrying = asyncio.create_task(over.hurry())
        await asyncio.sleep(0)
        assert record.told_to_pause
    synced.set()
    await hurrying
    assert not cast(MagicMock, handle.suspend).called, "nobody would have it go on, and the next attempt leave it so"
    assert not record.told_to_pause


@pytest.mark.parametrize("found_running", [True, False], ids=["meanwhile", "before"])
async def test_a_guest_that_somebody_has_paused_stays_so_though_libvirt_was_told_to_pause_it(
    monkeypatch: pytest.MonkeyPatch, *, found_running: bool
) -> None:
    life = MagicMock()
    over, ended = _switchover(life), _Unending()
    ended.over.set()
    ended.found_running = found_running
    life.job.record.was_running, life.job.record.owner, life.job.record.told_to_pause = False, Owner.SOURCE, True
    handle = over._ends.handle
    cast(MagicMock, handle.state).return_value = [3, 0]

    async def call(function: Callable[[], object]) -> object:
        return function()

    monkeypatch.setattr(over._ends.source, "call", call)
    await over.end(cast(Passage, ended))
    assert not cast(MagicMock, handle.resume).called
    assert cast(MagicMock, handle.suspend).called is found_running
    cast(MagicMock, handle.suspend).reset_mock()
    life.job.record.owner = Owner.DESTINATION
    await over.end(cast(Passage, ended))
    assert not cast(MagicMock, handle.suspend).called, "it is not here any more"


async def test_what_libvirt_has_not_ended_when_the_job_ends_is_left_to_who_settles_it() -> None:
    life = MagicMock()
    over, late = _switchover(life), _Unending()
    life.job.record.migrating = True
    over._beforehand = AsyncMock()
    async with over.attempts():
        await over.call_off(cast(Passage, late))
    late.over.set()
    await asyncio.sleep(0.01)
    assert life.job.record.migrating


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


@pytest.mark.parametrize(("passed", "told"), [(0, "no such host"), (1, "Bad file descriptor")])
async def test_why_nobody_was_reached_is_told_and_not_what_libvirt_makes_of_it(passed: int, told: str) -> None:
    passage = MagicMock()
    passage.gate.failure, passage.gate.passed = OSError("no such host"), passed
    assert told in str(await _switchover()._reason(LibvirtFailed("Bad file descriptor"), passage))
