"""When libvirt's migration begins while the first pass ends, and what becomes of it when that takes longer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from qemu_blkmig.engine.migration import DiskFigures, Figures, Phase
from qemu_blkmig.errors import BlkmigError, LibvirtFailed
from qemu_blkmig.job import beforehand
from qemu_blkmig.job.beforehand import Beforehand, seconds_left
from qemu_blkmig.job.passage import Passage
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.virt.connection import LibvirtError, libvirt

MIB = 1 << 20
NEARLY_OVER = 64 * MIB


class _Migration:
    def __init__(self) -> None:
        self.ended = False
        self.why: BlkmigError | None = None

    async def failed(self) -> BlkmigError | None:
        return self.why


class _Gate:
    def __init__(self) -> None:
        self.passed = 32 << 10


class _Passage:
    def __init__(self) -> None:
        self.migration = _Migration()
        self.gate = _Gate()
        self.fit = True
        self.ends = 0

    async def end(self) -> None:
        self.ends += 1

    def fail(self, why: BlkmigError) -> None:
        self.fit = False
        self.migration.ended, self.migration.why = True, why


class _Lab:
    """A pass at 64 MiB a second over a disk that QEMU says occupies 512 MiB, and libvirt."""

    def __init__(self) -> None:
        self.phase = Phase.BULK
        self.copied = 0
        self.begun: list[_Passage] = []
        self.called_off: list[_Passage] = []
        self.told_aborted: list[_Passage] = []
        self.refuses = self.paused = False

    def beforehand(self, *, may: bool = True) -> Beforehand:
        disk = cast(Disk, _disk("vda", 4096 * MIB, 512 * MIB))
        return Beforehand(lambda: _figures(self.phase, self.copied), [disk], self, may=may)

    async def begin_beforehand(self) -> Passage:
        await asyncio.sleep(0)
        if self.refuses:
            raise LibvirtFailed("no")
        self.begun.append(_Passage())
        return cast(Passage, self.begun[-1])

    async def call_off(self, passage: Passage) -> None:
        self.called_off.append(cast(Any, passage))

    async def aborted(self, passage: Passage) -> None:
        self.told_aborted.append(cast(Any, passage))

    async def end(self, passage: Passage) -> None:
        await passage.end()

    async def is_overtaken(self, passage: Passage) -> bool:
        return self.paused

    async def come_to_its_end(self) -> None:
        self.copied = 512 * MIB - NEARLY_OVER
        await _until(lambda: bool(self.begun) or self.refuses)


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


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt waits for no more than a moment."""
    monkeypatch.setattr(beforehand, "KEPT", 0.05)
    monkeypatch.setattr(beforehand, "WATCH", 0.02)


def test_what_is_left_of_the_pass_is_told_by_what_the_image_occupies() -> None:
    occupied = {"vda": 512 * MIB}
    assert seconds_left(_figures(Phase.BULK, 256 * MIB), occupied) == 4
    assert seconds_left(_figures(Phase.BULK, 600 * MIB), occupied) == 0
    assert seconds_left(_figures(Phase.BULK, 0, size=128 * MIB), occupied) == 2
    assert seconds_left(_figures(Phase.BULK, 0, speed=None), occupied) == float("inf")
    assert seconds_left(_figures(Phase.RECORDING, 0), occupied) == float("inf")
    assert seconds_left(_figures(Phase.DIRTY, 512 * MIB), occupied) == 0


async def test_it_begins_when_the_pass_is_nearly_over_and_is_whose_takes_it() -> None:
    lab = _Lab()
    async with lab.beforehand() as before:
        await asyncio.sleep(3 * beforehand.LOOK)
        assert not lab.begun
        await lab.come_to_its_end()
        assert cast(Any, await before.take()) is lab.begun[0]
        assert await before.take() is None
    assert not lab.begun[0].ends and not lab.called_off


async def test_nothing_begins_where_it_may_not_or_when_it_is_time_anyway() -> None:
    lab = _Lab()
    lab.copied = 512 * MIB
    async with lab.beforehand(may=False) as before:
        await asyncio.sleep(2 * beforehand.LOOK)
        assert await before.take() is None
    lab.copied = 0
    async with lab.beforehand() as before:
        assert await before.take() is None
    assert not lab.begun


async def test_nothing_begins_where_the_pass_is_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beforehand, "WORTH_IT", 0.2)
    lab = _Lab()
    async with lab.beforehand() as before:
        await asyncio.sleep(0.3)
        lab.copied = 512 * MIB
        await asyncio.sleep(2 * beforehand.LOOK)
        assert await before.take() is None
    assert not lab.begun


async def test_one_that_nobody_takes_is_ended_when_the_job_fails() -> None:
    lab = _Lab()
    with pytest.raises(LibvirtFailed, match="disk is full"):
        async with lab.beforehand():
            await lab.come_to_its_end()
            raise LibvirtFailed("the disk is full")
    assert [passage.ends for passage in lab.begun] == [1] and not lab.called_off


@pytest.mark.usefixtures("impatient")
async def test_one_that_is_not_taken_in_time_is_called_off() -> None:
    lab = _Lab()
    async with lab.beforehand() as before:
        await lab.come_to_its_end()
        await _until(lambda: bool(lab.called_off))
        assert await before.take() is None
    assert lab.called_off == lab.begun and len(lab.begun) == 1


@pytest.mark.usefixtures("impatient")
async def test_the_time_counts_from_when_the_destination_s_qemu_waits() -> None:
    lab = _Lab()
    async with lab.beforehand() as before:
        await lab.come_to_its_end()
        lab.begun[0].gate.passed = 0
        await asyncio.sleep(0.2)
        assert cast(Any, await before.take()) is lab.begun[0]


async def test_one_that_cannot_begin_is_left_to_be_made_again() -> None:
    lab = _Lab()
    lab.refuses = True
    async with lab.beforehand() as before:
        await lab.come_to_its_end()
        assert await before.take() is None


@pytest.mark.parametrize("waited_for", [True, False])
async def test_one_that_fails_is_called_off_and_left_to_be_made_again(waited_for: bool) -> None:
    lab = _Lab()
    async with lab.beforehand() as before:
        await lab.come_to_its_end()
        lab.begun[0].fail(LibvirtFailed("the destination's libvirt was started anew"))
        if waited_for:
            await _until(lambda: bool(lab.called_off))
        assert await before.take() is None
    assert lab.called_off == lab.begun


async def test_one_for_which_the_guest_was_paused_too_early_is_called_off_at_once() -> None:
    lab = _Lab()
    async with lab.beforehand():
        await lab.come_to_its_end()
        lab.paused = True
        await _until(lambda: bool(lab.called_off))


async def test_one_that_somebody_aborted_is_told_at_once_and_not_made_again() -> None:
    lab = _Lab()
    async with lab.beforehand():
        await lab.come_to_its_end()
        lab.begun[0].fail(LibvirtError("libvirt", "canceled by client", libvirt().VIR_ERR_OPERATION_ABORTED))
        await _until(lambda: bool(lab.told_aborted))
    assert lab.told_aborted == lab.begun and not lab.called_off


async def test_a_defect_in_it_costs_no_job_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    lab = _Lab()
    lab.begun = cast(Any, None)
    async with lab.beforehand() as before:
        lab.copied = 512 * MIB
        await asyncio.sleep(2 * beforehand.LOOK)
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
            lab.copied = 512 * MIB
            await asyncio.sleep(2 * beforehand.LOOK)
            await before.take()

    task = asyncio.create_task(work())
    await asyncio.sleep(3 * beforehand.LOOK)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not lab.begun
