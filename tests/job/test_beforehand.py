"""libvirt's migration that begins with the first pass: what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from qemu_blkmig.engine.migration import DiskFigures, Figures, Phase
from qemu_blkmig.errors import BlkmigError, GuestStateError, LibvirtFailed, RecordFailed
from qemu_blkmig.job import beforehand
from qemu_blkmig.job.beforehand import Beforehand, seconds_left
from qemu_blkmig.job.passage import Passage
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.qmp.monitor import NoAnswer

MIB = 1 << 20


class _Migration:
    def __init__(self) -> None:
        self.ended = False
        self.why: LibvirtFailed | None = None

    async def failed(self) -> LibvirtFailed | None:
        return self.why


class _Gate:
    def __init__(self, passed: int) -> None:
        self.passed = passed


class _Passage:
    def __init__(self, passed: int) -> None:
        self.migration = _Migration()
        self.gate = _Gate(passed)
        self.fit = True
        self.ends = 0

    async def end(self) -> None:
        self.ends += 1

    def fail(self, why: LibvirtFailed) -> None:
        self.fit = False
        self.migration.ended, self.migration.why = True, why


class _Lab:
    """A pass at 64 MiB a second over a disk that QEMU says occupies 512 MiB, and libvirt."""

    def __init__(self) -> None:
        self.phase = Phase.BULK
        self.speed = 64 * MIB
        self.begun: list[_Passage] = []
        self.called_off: list[_Passage] = []
        self.failures: list[LibvirtFailed] = []
        self.told: list[str] = []
        self.refuses: list[BlkmigError] = []
        self.paused = self.silent = self.full = False
        self.passed = 32 << 10

    def beforehand(self, *, taken: bool = True, may: bool = True) -> Beforehand:
        disk = cast(Disk, _disk("vda", 4096 * MIB, 512 * MIB))
        figures = lambda: _figures(self.phase, 0, self.speed)  # noqa: E731
        return Beforehand(figures, [disk], self, self.failures.append, self.told.append, taken=taken, may=may)

    async def begin_beforehand(self) -> Passage:
        await asyncio.sleep(0)
        if self.refuses:
            raise self.refuses.pop()
        self.begun.append(_Passage(self.passed))
        return cast(Passage, self.begun[-1])

    async def call_off(self, passage: Passage) -> None:
        self.called_off.append(cast(Any, passage))
        if self.full:
            raise RecordFailed("the disk is full")

    async def why_failed(self, passage: Passage) -> LibvirtFailed:
        why: LibvirtFailed | None = cast(Any, passage).migration.why
        assert why is not None
        return why

    async def end(self, passage: Passage) -> None:
        await passage.end()

    async def is_overtaken(self, passage: Passage) -> bool:
        if self.silent:
            raise NoAnswer("source QEMU did not answer query-migrate within 30 s")
        return self.paused

    async def begins(self, number: int = 1) -> _Passage:
        await _until(lambda: len(self.begun) == number)
        return self.begun[-1]


def _disk(name: str, size: int, allocated: int | None) -> Any:
    return type("_Disk", (), {"name": name, "size": size, "allocated": allocated})


def _figures(phase: Phase, copied: int, speed: float | None = 64 * MIB, size: int = 4096 * MIB) -> Figures:
    disk = DiskFigures("vda", size, copied, 0, 0, 0, bulk_done=copied, dirty=0, copied_dirty=0)
    return Figures(phase, 0, size, size - copied, (disk,), 0, speed, None, None)


async def _until(come: Callable[[], bool]) -> None:
    for _ in range(200):
        if come():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to that")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is a hundredth of one."""
    for name in ("KEPT", "JUDGED", "WATCH", "AGAIN"):
        monkeypatch.setattr(beforehand, name, getattr(beforehand, name) / 100)
    usual = seconds_left
    monkeypatch.setattr(beforehand, "seconds_left", lambda *arguments: usual(*arguments) / 100)


def test_what_is_left_of_the_pass_is_told_by_what_the_image_occupies() -> None:
    occupied = {"vda": 512 * MIB}
    assert seconds_left(_figures(Phase.BULK, 256 * MIB), occupied) == 4
    assert seconds_left(_figures(Phase.BULK, 600 * MIB), occupied) == 0
    assert seconds_left(_figures(Phase.BULK, 0, size=128 * MIB), occupied) == 2
    assert seconds_left(_figures(Phase.BULK, 0, speed=None), occupied) == float("inf")
    assert seconds_left(_figures(Phase.RECORDING, 0), occupied) == float("inf")
    assert seconds_left(_figures(Phase.DIRTY, 512 * MIB), occupied) == 0


async def test_it_begins_with_the_pass_and_is_whose_takes_it() -> None:
    lab = _Lab()
    async with lab.beforehand() as before:
        begun = await lab.begins()
        await asyncio.sleep(3 * beforehand.JUDGED)
        assert cast(Any, await before.take()) is begun
        assert await before.take() is None
    assert not begun.ends and not lab.called_off and len(lab.begun) == 1


async def test_it_does_not_begin_while_the_pass_waits_for_others() -> None:
    lab = _Lab()
    lab.phase = Phase.CREATED
    async with lab.beforehand() as before:
        await asyncio.sleep(3 * beforehand.BEGUN)
        assert not lab.begun
        lab.phase = Phase.RECORDING
        begun = await lab.begins()
        lab.phase = Phase.BULK
        assert cast(Any, await before.take()) is begun


async def test_nothing_begins_when_it_is_time_anyway_or_where_nothing_may() -> None:
    lab = _Lab()
    async with lab.beforehand() as before:
        assert await before.take() is None
    async with lab.beforehand(may=False) as before:
        await asyncio.sleep(2 * beforehand.WATCH)
        assert await before.take() is None
    assert not lab.begun


async def test_one_that_may_not_be_taken_is_called_off_as_soon_as_the_destination_s_qemu_waits() -> None:
    lab = _Lab()
    lab.passed = 0
    async with lab.beforehand(taken=False) as before:
        begun = await lab.begins()
        await asyncio.sleep(3 * beforehand.WATCH)
        assert not lab.called_off
        begun.gate.passed = 1
        await _until(lambda: bool(lab.called_off))
        assert await before.take() is None
    async with lab.beforehand(taken=False) as before:
        begun = await lab.begins(2)
        taking = asyncio.create_task(before.take())
        await asyncio.sleep(3 * beforehand.WATCH)
        assert lab.called_off == lab.begun[:1], "libvirt would not end it yet"
        begun.gate.passed = 1
        assert await taking is None
    assert lab.called_off == lab.begun and not lab.failures


@pytest.mark.parametrize("phase", [Phase.BULK, Phase.RECORDING])
async def test_where_the_pass_is_a_long_one_it_is_called_off_and_not_made_again(phase: Phase) -> None:
    lab = _Lab()
    lab.speed, lab.phase = 16 * MIB, phase
    async with lab.beforehand() as before:
        await _until(lambda: bool(lab.called_off))
        await asyncio.sleep(2 * beforehand.AGAIN)
        assert await before.take() is None
    assert lab.called_off == lab.begun and len(lab.begun) == 1 and not lab.failures


async def test_one_that_is_not_taken_in_time_is_called_off() -> None:
    lab = _Lab()
    lab.phase = Phase.DIRTY
    async with lab.beforehand() as before:
        await _until(lambda: bool(lab.called_off))
        assert await before.take() is None
    assert lab.called_off == lab.begun and len(lab.begun) == 1 and not lab.failures


async def test_the_time_counts_from_when_the_destination_s_qemu_waits() -> None:
    lab = _Lab()
    lab.passed = 0
    async with lab.beforehand() as before:
        begun = await lab.begins()
        await asyncio.sleep(2 * beforehand.KEPT)
        assert cast(Any, await before.take()) is begun


async def test_one_that_nobody_takes_is_ended_when_the_job_fails() -> None:
    lab = _Lab()
    with pytest.raises(LibvirtFailed, match="disk is full"):
        async with lab.beforehand():
            await lab.begins()
            raise LibvirtFailed("the disk is full")
    assert [passage.ends for passage in lab.begun] == [1] and not lab.called_off


async def test_one_that_fails_is_made_again_once_and_then_ends_the_job() -> None:
    lab = _Lab()
    async with lab.beforehand():
        (await lab.begins()).fail(LibvirtFailed("its libvirt was started anew"))
        assert not lab.failures
        (await lab.begins(2)).fail(LibvirtFailed("the port is in use"))
        await _until(lambda: bool(lab.failures))
    assert lab.called_off == lab.begun and [str(each) for each in lab.failures] == ["the port is in use"]
    assert len(lab.told) == 1 and lab.told[0].endswith("once more: its libvirt was started anew")


async def test_one_that_cannot_even_begin_is_made_again_once_and_then_ends_the_job() -> None:
    lab = _Lab()
    lab.refuses = [LibvirtFailed("no"), LibvirtFailed("no")]
    async with lab.beforehand():
        await _until(lambda: bool(lab.failures))
    assert [str(each) for each in lab.failures] == ["no"] and not lab.begun
    lab = _Lab()
    lab.refuses = [LibvirtFailed("no")]
    async with lab.beforehand() as before:
        begun = await lab.begins()
        assert cast(Any, await before.take()) is begun and not lab.failures


async def test_one_that_is_prevented_by_what_the_guest_does_is_left_to_who_wants_it() -> None:
    lab = _Lab()
    lab.refuses = [GuestStateError("it sleeps")]
    async with lab.beforehand() as before:
        await asyncio.sleep(2 * beforehand.AGAIN)
        assert await before.take() is None
    assert not lab.failures and not lab.begun


async def test_one_that_fails_when_it_is_wanted_is_left_to_who_wants_it() -> None:
    lab = _Lab()
    async with lab.beforehand() as before:
        (await lab.begins()).fail(LibvirtFailed("its libvirt was started anew"))
        assert await before.take() is None
    assert lab.called_off == lab.begun and not lab.failures


async def test_one_for_which_the_guest_was_paused_too_early_is_called_off_at_once() -> None:
    lab = _Lab()
    lab.passed = 0
    async with lab.beforehand():
        await lab.begins()
        lab.paused = True
        await _until(lambda: bool(lab.called_off))
    assert not lab.failures


async def test_a_libvirt_that_is_busy_with_the_domain_ends_no_job() -> None:
    lab = _Lab()
    busy = LibvirtFailed("cannot acquire state change lock")
    busy.busy = True
    async with lab.beforehand() as before:
        (await lab.begins()).fail(busy)
        await asyncio.sleep(2 * beforehand.AGAIN)
        assert await before.take() is None
    assert lab.called_off == lab.begun and len(lab.begun) == 1 and not lab.failures


async def test_one_that_cannot_be_looked_after_is_called_off() -> None:
    lab = _Lab()
    async with lab.beforehand() as before:
        await lab.begins()
        lab.silent = True
        await _until(lambda: bool(lab.called_off))
        assert await before.take() is None
    assert lab.called_off == lab.begun and not lab.failures


async def test_one_whose_end_cannot_be_recorded_is_not_taken() -> None:
    lab = _Lab()
    lab.paused = lab.full = True
    async with lab.beforehand() as before:
        await _until(lambda: bool(lab.called_off))
        assert await before.take() is None
    assert lab.called_off == lab.begun and not lab.failures


@pytest.mark.parametrize("wanted", [False, True])
async def test_one_that_somebody_aborted_ends_the_job_at_once(wanted: bool) -> None:
    lab = _Lab()
    aborted = LibvirtFailed("canceled by client")
    aborted.aborted = True
    async with lab.beforehand() as before:
        (await lab.begins()).fail(aborted)
        if wanted:
            assert await before.take() is None
        await _until(lambda: bool(lab.failures))
    assert lab.failures == [aborted] and len(lab.begun) == 1


async def test_a_defect_in_it_costs_no_job_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    lab = _Lab()
    lab.begun = cast(Any, None)
    async with lab.beforehand() as before:
        await asyncio.sleep(2 * beforehand.WATCH)
        assert await before.take() is None
    assert "defect" in caplog.text


async def test_a_cancellation_while_it_is_taken_leaves_nothing() -> None:
    lab = _Lab()
    begin = lab.begin_beforehand

    async def slowly() -> Passage:
        await asyncio.sleep(0.2)
        return await begin()

    lab.begin_beforehand = slowly  # type: ignore[method-assign]

    async def work() -> None:
        async with lab.beforehand() as before:
            await asyncio.sleep(0.05)
            await before.take()

    task = asyncio.create_task(work())
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not lab.begun
