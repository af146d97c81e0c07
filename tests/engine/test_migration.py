"""The state machine by its sentences: what is refused, what an error leaves behind, how it is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile

import pytest

from qemu_blkmig.engine.convergence import Policy
from qemu_blkmig.engine.device import SECTOR, DiskSpec
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.migration import BlockMigration, Figures, Phase, Tuning
from qemu_blkmig.engine.ports import CopyKind, CopyReport
from qemu_blkmig.errors import DestinationFailed, MigrationError, TopologyChanged
from tests.engine.world import (
    Cancel,
    Damage,
    Disk,
    FakeGuest,
    FakeLog,
    FakeRound,
    Fault,
    Injected,
    Nothing,
    Snapshot,
    World,
    Write,
    WritebackError,
)

TUNING = Tuning(chunk_size=4 * SECTOR, range_size=4 * SECTOR, batch=2, flushes=1)
AHEAD = replace(TUNING, room=1)


def disk(name: str = "vda", content: bytes = bytes(range(1, 12))) -> Disk:
    size = len(content)
    return Disk(name, bytearray(content), None, False, bytearray([99] * size), [True] * size)


def make(*disks: Disk, tuning: Tuning = TUNING) -> World:
    return World(disks or [disk()], granularity=2, tuning=tuning)


async def dirty(*disks: Disk) -> World:
    """A world whose bulk pass is done."""
    world = make(*disks)
    await world.engine.setup()
    await world.engine.bulk()
    return world


async def reach(condition: Callable[[], bool]) -> None:
    """Let the other tasks go on, step by step, until the condition holds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("never reached")


async def test_a_migration_ends_with_both_sides_equal_and_the_recording_stopped() -> None:
    world = await dirty(disk("vda"), disk("vdb", b"\1"))
    world.act(Write(0, 9, 2, 5))
    await world.engine.round()
    world.act(Write(1, 0, 1, 0))
    world.pause()
    await world.engine.complete()
    world.check_equal()
    assert world.engine.figures().percent == 100
    assert world.log.started
    world.may_stop_recording = True
    await world.engine.finish()
    assert not world.log.started


async def test_a_switchover_during_bulk_is_refused_with_what_has_arrived() -> None:
    world = make()
    await world.engine.setup()
    world.script.extend([Nothing()] * 13 + [Fault()])
    with pytest.raises(Injected):
        await world.engine.bulk()
    world.pause()
    with pytest.raises(MigrationError, match=rf"'bulk'.* {4 * SECTOR} of {11 * SECTOR} bytes"):
        await world.engine.complete()


async def test_a_switchover_of_a_running_guest_is_refused() -> None:
    world = await dirty()
    with pytest.raises(MigrationError, match="not paused"):
        await world.engine.complete()
    assert world.engine.figures().phase is Phase.DIRTY


async def test_a_switchover_while_something_is_in_flight_is_refused() -> None:
    world = await dirty()
    world.pause()
    world.log.mark(0, range(4))
    round_ = asyncio.create_task(world.engine.round())
    await reach(lambda: bool(world.mover.in_flight(0)))
    with pytest.raises(MigrationError, match="a dirty round is under way"):
        await world.engine.complete()
    await round_


async def test_a_disk_that_is_written_to_though_the_guest_is_paused_is_not_switched_over() -> None:
    world = await dirty()
    world.pause()
    take = world.log.take

    def take_and_write() -> object:
        round_ = take()
        world.log.mark(0, range(1))
        return round_

    world.log.mark(0, range(1))
    world.log.take = take_and_write  # type: ignore[method-assign, assignment]
    with pytest.raises(MigrationError, match="written to though the guest is paused"):
        await world.engine.complete()


async def test_the_bulk_pass_goes_on_at_the_range_that_failed() -> None:
    world = make()
    await world.engine.setup()
    world.script.extend([Nothing()] * 13 + [Fault()])
    with pytest.raises(Injected):
        await world.engine.bulk()
    assert world.engine.figures().disks[0].bulk_done == 4 * SECTOR
    copied = world.engine.figures().disks[0].copied
    await world.engine.bulk()
    assert copied == 4 * SECTOR
    assert world.engine.figures().disks[0].copied == 11 * SECTOR


async def test_a_range_is_copied_again_if_the_writer_died_before_it_was_flushed() -> None:
    world = make()
    await world.engine.setup()
    world.script.extend([Nothing()] * 13)
    vda = world.disks[0]
    bulk = asyncio.create_task(world.engine.bulk())
    await reach(lambda: world.engine.figures().disks[0].bulk_done > 0)
    vda.lose_unflushed()
    vda.dead = True
    with pytest.raises(Exception, match="the writer died") as caught:
        await bulk
    assert "goes on at byte 0" in caught.value.__notes__[0]
    assert world.engine.figures().percent == 36
    assert world.engine.figures().disks[0].bulk_done == 0


async def test_a_failed_round_is_owed_again() -> None:
    world = await dirty()
    world.log.mark(0, range(4))
    world.script.extend([Nothing()] * 3 + [Fault()])
    with pytest.raises(Injected, match="mover"):
        await world.engine.round()
    assert world.log.recording[0] == {0, 1}
    assert world.engine.figures().disks[0].dirty == 4 * SECTOR


async def test_a_changed_topology_owes_nothing_anew() -> None:
    world = await dirty()
    world.act(Snapshot())
    with pytest.raises(TopologyChanged):
        await world.engine.round()
    assert world.engine.figures().phase is Phase.DIRTY
    assert world.engine.figures().pending == 0


async def test_a_round_that_cannot_be_restored_ends_the_migration_with_the_first_error() -> None:
    world = await dirty()
    world.log.mark(0, range(4))
    world.script.extend([Nothing()] * 3 + [Fault(), Fault()])
    with pytest.raises(Injected, match="mover") as caught:
        await world.engine.round()
    assert "back into the recording failed as well: Injected('restore')" in caught.value.__notes__[0]
    assert world.engine.figures().phase is Phase.FAILED
    with pytest.raises(MigrationError, match="'failed'"):
        await world.engine.round()


@pytest.mark.parametrize("steps", range(30))
async def test_a_cancellation_at_any_step_of_a_round_leaves_everything_owed_or_done(steps: int) -> None:
    world = await dirty()
    world.act(Write(0, 0, 11, 5))
    world.finish_writes()
    world.operation = asyncio.create_task(world.engine.round())
    world.script.extend([Nothing()] * steps + [Cancel()])
    with pytest.raises(asyncio.CancelledError):
        await world.operation
    world.check()
    assert not world.log.rounds
    assert world.mover.idle


@pytest.mark.parametrize(
    ("owner", "step", "faults"),
    [
        (FakeLog, "harvest", 0),
        (FakeLog, "harvest", 1),
        (FakeRound, "retire", 0),
        (FakeRound, "retire", 1),
        (FakeRound, "restore", 1),
        (FakeRound, "restore", 2),
    ],
)
async def test_a_cancellation_that_comes_in_a_step_that_is_not_interrupted_is_raised_after_it(
    monkeypatch: pytest.MonkeyPatch, owner: type, step: str, faults: int
) -> None:
    """Whether the step itself fails or not; a restore is called for by a fault before it."""
    world = await dirty()
    world.log.mark(0, range(2))
    original = getattr(owner, step)
    if step == "restore":
        world.script.extend([*[Nothing()] * 3, Fault()])
        faults -= 1

    async def cancelled_meanwhile(self: object) -> object:
        operation.cancel()
        await asyncio.sleep(0)
        world.script.extend([Fault()] * faults)
        return await original(self)

    monkeypatch.setattr(owner, step, cancelled_meanwhile)
    operation = asyncio.create_task(world.engine.round())
    with pytest.raises(asyncio.CancelledError):
        await operation
    world.check()


async def test_a_gentle_stop_lets_the_round_under_way_end() -> None:
    world = await dirty()
    world.log.mark(0, range(4))
    stepping = asyncio.create_task(world.engine.keep_in_step(Policy(downtime=0.001, max_rounds=None)))
    await reach(lambda: bool(world.mover.in_flight(0)))
    world.engine.request_stop()
    await stepping
    assert world.engine.figures().disks[0].rounds == 1
    assert world.engine.figures().disks[0].copied_dirty == 4 * SECTOR
    assert world.engine.figures().pending == 0


async def test_a_stop_ends_the_pause_between_two_looks() -> None:
    world = await dirty()
    asleep = asyncio.Event()

    async def sleep(_seconds: float) -> None:
        asleep.set()
        await asyncio.Event().wait()

    world.clock.sleep = sleep  # type: ignore[assignment,method-assign]
    stepping = asyncio.create_task(world.engine.keep_in_step(Policy(downtime=1, max_rounds=None)))
    await asleep.wait()
    world.engine.request_stop()
    await stepping


async def test_the_log_stands_ready_while_the_disks_are_kept_in_step() -> None:
    world = await dirty()
    ready: list[int] = []

    async def stand_ready() -> None:
        ready.append(world.engine.figures().round)
        if world.engine.figures().round:
            world.engine.request_stop()

    world.log.stand_ready = stand_ready  # type: ignore[method-assign]
    world.log.mark(0, range(4))
    await world.engine.keep_in_step(Policy(downtime=0.001, max_rounds=None))
    assert ready == [0, 1]


async def test_a_completion_is_judged_by_what_is_dirty_after_the_last_copy_whatever_was_seen_before() -> None:
    world = await dirty()
    await world.engine.refresh()
    world.pause()
    world.log.mark(0, range(4))
    assert world.engine.figures().pending == 0
    besides: list[int] = []

    async def beside() -> None:
        besides.append(world.engine.figures().disks[0].copied_dirty)

    await world.engine.complete(beside)
    assert besides == [0, 4 * SECTOR]
    assert world.engine.figures().pending == 0


async def test_what_fails_beside_a_completion_takes_it_back() -> None:
    world = await dirty()
    world.pause()

    async def beside() -> None:
        raise DestinationFailed("cannot be read back")

    with pytest.raises(DestinationFailed, match="cannot be read back"):
        await world.engine.complete(beside)
    assert world.engine.figures().phase is Phase.DIRTY


async def test_a_stop_asked_for_before_keeping_in_step_began_holds() -> None:
    world = await dirty()
    world.log.mark(0, range(4))
    world.engine.request_stop()
    await world.engine.keep_in_step(Policy(downtime=0, max_rounds=None))
    assert world.engine.figures().round == 0


async def test_a_cancel_waits_for_the_batch_in_flight_and_lets_no_other_begin() -> None:
    world = make()
    await world.engine.setup()
    bulk = asyncio.create_task(world.engine.bulk())
    await reach(lambda: bool(world.mover.in_flight(0)))
    world.may_stop_recording = True
    await world.engine.cancel()
    assert world.mover.idle
    with pytest.raises(MigrationError, match="being cancelled"):
        await bulk
    assert world.engine.figures().disks[0].copied == 4 * SECTOR
    assert world.disks[0].flushed == bytes([99] * 11)
    assert world.engine.figures().phase is Phase.CANCELLED
    await world.engine.cancel()


async def test_a_cancel_after_the_end_changes_nothing() -> None:
    world = await dirty()
    world.pause()
    await world.engine.complete()
    world.may_stop_recording = True
    await world.engine.finish()
    await world.engine.cancel()
    assert world.engine.figures().phase is Phase.COMPLETED


async def test_after_a_cancel_that_failed_there_is_nothing_to_do_but_to_cancel_again() -> None:
    world = await dirty()
    world.pause()
    world.may_stop_recording = True
    world.script.append(Fault())
    with pytest.raises(Injected, match="stop"):
        await world.engine.cancel()
    with pytest.raises(MigrationError, match="the switchover is refused: the migration is cancelled"):
        await world.engine.complete()
    await world.engine.cancel()
    assert world.engine.figures().phase is Phase.CANCELLED


async def test_a_stop_holds_once_and_not_beyond_a_completion() -> None:
    world = await dirty()
    world.engine.request_stop()
    await world.engine.keep_in_step(Policy(downtime=0, max_rounds=None))
    world.log.mark(0, range(4))
    await world.engine.keep_in_step(Policy(downtime=0, max_rounds=None))
    assert world.engine.figures().round == 1
    world.engine.request_stop()
    world.pause()
    await world.engine.complete()
    world.log.mark(0, range(4))
    await world.engine.keep_in_step(Policy(downtime=0, max_rounds=None))
    assert world.engine.figures().round == 2


@pytest.mark.parametrize("what", ["the guest runs again", "a snapshot is taken"])
async def test_what_a_completion_stands_on_is_checked_again_at_its_end(what: str) -> None:
    world = await dirty()
    world.pause()
    flush = world.mover.flush

    async def meanwhile(disk: str) -> None:
        await flush(disk)
        if what == "the guest runs again":
            world.paused = False
        else:
            world.act(Snapshot())

    world.mover.flush = meanwhile  # type: ignore[method-assign]
    with pytest.raises(MigrationError, match=r"not paused|a snapshot was taken"):
        await world.engine.complete()
    assert world.engine.figures().phase is Phase.DIRTY


async def test_a_completion_flushes_every_disk_even_if_nothing_was_dirty() -> None:
    world = await dirty(disk("vda"), disk("vdb"))
    world.pause()
    flushed: list[str] = []

    async def flush(disk: str) -> None:
        flushed.append(disk)

    world.mover.flush = flush  # type: ignore[method-assign]
    await world.engine.complete()
    assert flushed == ["vda", "vdb"]


async def test_what_was_dirty_before_a_harvest_is_not_shown_after_it() -> None:
    world = await dirty()
    world.log.mark(0, range(4))
    asked, answer = asyncio.Event(), asyncio.Event()

    async def pending() -> Mapping[str, int]:
        before = world.log.count(world.log.recording)
        asked.set()
        await answer.wait()
        return before

    world.log.pending = pending  # type: ignore[method-assign]
    looking = asyncio.create_task(world.engine.refresh())
    await asked.wait()
    await world.engine.round()
    answer.set()
    assert (await looking).pending == 0


async def test_the_dirty_rate_is_never_negative() -> None:
    world = await dirty()
    world.log.mark(0, range(8))
    round_ = asyncio.create_task(world.engine.round())
    await reach(lambda: bool(world.mover.in_flight(0)))
    world.log.mark(0, range(8))
    await world.engine.refresh()
    world.script.append(Fault())
    with pytest.raises(Injected):
        await round_
    world.clock.time += 100
    rate = (await world.engine.refresh()).dirty_rate
    assert rate is not None and rate >= 0


@pytest.mark.parametrize("tuning", [TUNING, AHEAD], ids=["alone", "beside"])
@pytest.mark.parametrize("steps", range(20))
async def test_a_flush_that_was_cancelled_proves_nothing_to_the_bulk_pass(steps: int, tuning: Tuning) -> None:
    """Its failure may have been told to nobody, and the next one may succeed all the same."""
    world = make(disk(content=b"\1\2\3\4"), tuning=tuning)
    await world.engine.setup()
    world.operation = asyncio.create_task(world.engine.bulk())
    world.script.extend([WritebackError(), *[Nothing()] * steps, Cancel()])
    await asyncio.wait({world.operation})
    with suppress(Injected):
        await world.engine.bulk()
    await world.engine.bulk()
    world.check()
    assert world.disks[0].flushed == world.disks[0].source


async def test_a_range_is_flushed_while_the_next_ones_are_copied_and_stable_only_after_that() -> None:
    disks = [disk(name, bytes(range(1, 41))) for name in ("vda", "vdb")]
    world = make(*disks, tuning=replace(TUNING, room=32 * SECTOR))
    await world.engine.setup()
    beside: list[tuple[bool, bool]] = []
    flush, copy, turn = world.mover.flush, world.mover.copy, asyncio.Lock()

    async def in_turn(name: str, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        async with turn:
            return await copy(name, extents, kind)

    async def watched(name: str) -> None:
        reported = world.engine.figures().disks[world.index(name)].bulk_done
        beside.append((bool(world.mover.in_flight(0)), bool(world.mover.in_flight(1))))
        await flush(name)
        assert world.stable().get(name, 0) < reported

    world.mover.flush = watched  # type: ignore[assignment, method-assign]
    world.mover.copy = in_turn  # type: ignore[assignment, method-assign]
    await world.engine.bulk()
    assert (True, False) in beside
    assert (False, True) in beside, "the second disk is begun while the last range of the first one is flushed"
    assert world.stable() == {"vda": 40 * SECTOR, "vdb": 40 * SECTOR}


async def test_a_flush_holds_for_what_was_reported_before_it_and_for_nothing_that_came_meanwhile() -> None:
    copied = disk(content=bytes(range(1, 41)))
    world = make(copied, tuning=replace(TUNING, room=32 * SECTOR))
    await world.engine.setup()
    flush, copy, flushed = world.mover.flush, world.mover.copy, asyncio.Event()
    came_meanwhile = 0

    def safe() -> int:
        """Bytes from the disk's beginning that outlive the writer."""
        same = (there == here for there, here in zip(copied.flushed, copied.source, strict=True))
        return SECTOR * len(list(takewhile(bool, same)))

    async def not_before(name: str, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        if extents[0].offset:
            await flushed.wait()
        return await copy(name, extents, kind)

    async def slowly(name: str) -> None:
        nonlocal came_meanwhile
        assert world.stable().get(name, 0) <= safe()
        if flushed.is_set():
            copied.lose_unflushed()
            raise Injected("flush")
        reported = world.engine.figures().disks[0].bulk_done
        await flush(name)
        flushed.set()
        for _ in range(100):
            await asyncio.sleep(0)
        came_meanwhile += world.engine.figures().disks[0].bulk_done - reported

    world.mover.flush = slowly  # type: ignore[assignment, method-assign]
    world.mover.copy = not_before  # type: ignore[assignment, method-assign]
    with pytest.raises(Injected, match="flush"):
        await world.engine.bulk()
    assert came_meanwhile
    world.mover.flush = flush  # type: ignore[method-assign]
    await world.engine.bulk()
    assert world.stable() == {"vda": 40 * SECTOR} and safe() == 40 * SECTOR


async def test_what_a_migration_that_is_gone_on_with_is_known_to_have_brought_over_is_not_read_again() -> None:
    content = bytes(range(1, 41))
    one = disk(content=content)
    world = make(one, tuning=replace(TUNING, room=32 * SECTOR))
    one.destination[:] = one.flushed[:] = bytes(
        [*content[:8], 99, 99, *content[10:14], 99, *content[15:18], *[99] * 22]
    )
    world.log.started = True
    read: list[Extent] = []
    copy = world.mover.copy

    async def watched(name: str, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        read.extend(extents)
        return await copy(name, extents, kind)

    world.mover.copy = watched  # type: ignore[assignment, method-assign]
    known = [Extent(10 * SECTOR, 4 * SECTOR), Extent(15 * SECTOR, 3 * SECTOR)]
    await world.engine.resume({"vda": 8 * SECTOR}, {"vda": known})
    await world.engine.bulk()
    assert read[:2] == [Extent(8 * SECTOR, 2 * SECTOR), Extent(14 * SECTOR, SECTOR)]
    assert sum(extent.length for extent in read) == (2 + 1 + 22) * SECTOR
    figures = world.engine.figures().disks[0]
    assert figures.resumed == (8 + 4 + 3) * SECTOR and figures.copied == (2 + 1 + 22) * SECTOR
    world.pause()
    await world.engine.complete()
    world.check_equal()


@pytest.mark.parametrize("known", [Extent(0, SECTOR), Extent(11 * SECTOR, SECTOR), Extent(8 * SECTOR, 0)])
async def test_what_does_not_lie_beyond_what_is_stable_cannot_be_known(known: Extent) -> None:
    world = make()
    world.log.started = True
    with pytest.raises(ValueError, match="cannot be known"):
        await world.engine.resume({"vda": 4 * SECTOR}, {"vda": [known]})


async def test_a_range_that_fails_takes_those_with_it_that_were_asked_for_after_it() -> None:
    world = make(tuning=AHEAD)
    await world.engine.setup()
    copy = world.mover.copy

    async def fail_first(name: str, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        report = await copy(name, extents, kind)
        if extents[0].offset == 0:
            raise Injected("copy")
        return report

    world.mover.copy = fail_first  # type: ignore[assignment, method-assign]
    with pytest.raises(Injected):
        await world.engine.bulk()
    assert world.mover.idle
    assert world.engine.figures().disks[0].bulk_done == 0
    world.mover.copy = copy  # type: ignore[method-assign]
    await world.engine.bulk()
    assert world.disks[0].flushed == world.disks[0].source


async def test_a_setup_that_fails_records_nothing_and_may_be_repeated() -> None:
    world = make()
    world.may_stop_recording = True
    world.script.extend([Nothing(), Fault()])
    with pytest.raises(Injected, match="start"):
        await world.engine.setup()
    assert not world.log.started
    await world.engine.setup()
    assert world.engine.figures().phase is Phase.RECORDING


async def test_rounds_may_be_run_again_when_the_handover_failed_after_the_completion() -> None:
    world = await dirty()
    world.pause()
    await world.engine.complete()
    world.paused = False
    world.act(Write(0, 0, 1, 77))
    world.finish_writes()
    assert await world.engine.round() == 2 * SECTOR
    assert world.engine.figures().phase is Phase.DIRTY
    assert world.engine.figures().percent == 99


async def test_extents_that_are_fewer_than_the_round_counts_are_an_error() -> None:
    class CutShort(FakeLog):
        def count(self, granules: Sequence[set[int]]) -> dict[str, int]:
            return {name: 2 * length for name, length in super().count(granules).items()}

    world = await dirty()
    world.log.mark(0, range(2))
    world.log.__class__ = CutShort
    with pytest.raises(MigrationError, match=rf"{4 * SECTOR} dirty bytes, but extents of only {2 * SECTOR}"):
        await world.engine.round()
    assert world.log.recording[0] == {0}


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (CopyReport(SECTOR, 0, 0, 0.1), f"accounts for {SECTOR} of {2 * SECTOR} bytes"),
        (CopyReport(SECTOR, 0, SECTOR, 0.1), f"skipped {SECTOR} bytes that the guest wrote"),
    ],
)
async def test_a_report_that_does_not_account_for_every_byte_is_an_error(report: CopyReport, message: str) -> None:
    world = await dirty()
    world.log.mark(0, range(2))

    async def copy(disk: str, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        return report

    world.mover.copy = copy  # type: ignore[method-assign]
    with pytest.raises(MigrationError, match=message):
        await world.engine.round()
    assert world.log.recording[0] == {0}


async def test_the_extents_are_closed_before_a_failed_round_is_restored() -> None:
    order: list[str] = []

    class Watched:
        dirty: Mapping[str, int] = {"vda": SECTOR}

        async def extents(self, disk: str) -> AsyncIterator[Sequence[Extent]]:
            try:
                yield [Extent(0, SECTOR), Extent(2 * SECTOR, SECTOR), Extent(4 * SECTOR, SECTOR)]
            finally:
                order.append("closed")

        async def retire(self) -> None:
            order.append("retired")

        async def restore(self) -> None:
            order.append("restored")

    world = await dirty()
    world.log.take = Watched  # type: ignore[assignment, method-assign]
    world.script.extend([Nothing()] * 2 + [Fault()])
    with pytest.raises(Injected):
        await world.engine.round()
    assert order == ["closed", "restored"]


async def test_figures_are_told_when_they_change_and_who_watches_them_cannot_break_the_migration() -> None:
    told: list[Figures] = []

    def watch(figures: Figures) -> None:
        told.append(figures)
        raise RuntimeError("broken bar")

    world = make()
    specs = [disk.spec for disk in world.disks]
    engine = BlockMigration(specs, world.log, world.mover, FakeGuest(world), world.clock, TUNING, watch)
    await engine.setup()
    await engine.bulk()
    await engine.refresh()
    await engine.refresh()
    assert [figures.percent for figures in told] == sorted(figures.percent for figures in told)
    assert len(set(told)) == len(told)
    assert told[-1] == engine.figures()
    assert told[-1].phase is Phase.DIRTY


@pytest.mark.parametrize("size", [0, -512, 513])
def test_a_disk_that_is_no_whole_sectors_long_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes"):
        DiskSpec("vda", size)


def test_tuning_that_makes_no_sense_is_refused() -> None:
    for values in ({"chunk_size": 100}, {"range_size": (1 << 20) + 512}, {"range_size": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match=r"size|batch"):
            Tuning(**values)


def test_no_disk_and_two_of_one_name_are_refused() -> None:
    for disks in ([], [disk(), disk()]):
        with pytest.raises(ValueError, match="differ in name"):
            World(disks, granularity=1, tuning=TUNING)


async def test_what_is_amiss_is_pending_until_a_round_has_copied_it_again() -> None:
    world = await dirty()
    await world.engine.round()
    world.act(Damage(0, 2, 3))
    assert world.engine.figures().pending == 3 * SECTOR
    world.script.extend([Nothing()] * 4 + [Fault()])
    with pytest.raises(Injected):
        await world.engine.round()
    assert world.engine.figures().pending >= 3 * SECTOR
    await world.engine.round()
    assert world.engine.figures().pending == 0
    world.check_equal()


async def test_something_amiss_after_the_last_round_takes_the_completion_back() -> None:
    world = await dirty()
    world.pause()
    await world.engine.complete()
    world.act(Damage(0, 0, 1))
    assert world.engine.figures().phase is Phase.DIRTY
    with pytest.raises(MigrationError):
        await world.engine.finish()
    await world.engine.complete()
    world.check_equal()


async def test_nothing_can_be_owed_that_is_not_there_or_while_nothing_is_recorded() -> None:
    world = make()
    with pytest.raises(MigrationError):
        world.engine.owe("vda", [Extent(0, SECTOR)])
    await world.engine.setup()
    for extent in (Extent(10 * SECTOR, 2 * SECTOR), Extent(0, 0)):
        with pytest.raises(ValueError, match="there is no"):
            world.engine.owe("vda", [extent])
    with pytest.raises(ValueError, match="there is no"):
        world.engine.owe("vdz", [Extent(0, SECTOR)])


async def test_onto_an_older_copy_only_what_differs_is_sent() -> None:
    older = Disk("vda", bytearray(range(1, 12)), None, False, bytearray(range(1, 12)), [True] * 11)
    older.destination[5] = 99
    older.flushed[:] = older.destination
    world = World([older], granularity=2, tuning=TUNING, compare=True)
    await world.engine.setup()
    await world.engine.bulk()
    (told,) = world.engine.figures().disks
    assert (told.copied, told.skipped, told.bulk_done) == (2 * SECTOR, 9 * SECTOR, 11 * SECTOR)
    assert told.copied_dirty == 0
    assert older.flushed == older.source
