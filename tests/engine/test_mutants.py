"""The classic bugs, put in on purpose: the model test must find every one of them.

What it finds too seldom has tests of its own in `test_migration`: which flush holds for what of the bulk pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

import pytest

from qemu_blkmig.engine import carrier
from qemu_blkmig.engine.bulk import BulkPass, DiskPass, Settle
from qemu_blkmig.engine.carrier import Carrier
from qemu_blkmig.engine.completion import Completion
from qemu_blkmig.engine.device import Device
from qemu_blkmig.engine.dirty import DirtyRounds
from qemu_blkmig.engine.extents import Batcher, Extent, Remainder, clip
from qemu_blkmig.engine.migration import BlockMigration, Phase
from qemu_blkmig.engine.outlast import Outlasted
from qemu_blkmig.engine.ports import CopyKind, CopyReport, Round
from qemu_blkmig.errors import MigrationError
from tests.engine import world
from tests.engine.machine import explore
from tests.engine.world import FakeLog, FakeRound, Violation

Patch = pytest.MonkeyPatch


def clear_bits_after_the_read(patch: Patch) -> None:
    """The bits of a round are cleared in the recording only once its data has been read."""

    class LateLog(FakeLog):
        def take(self) -> FakeRound:
            round_ = LateRound(self._world, [set(granules) for granules in self.recording])
            self.rounds.append(round_)
            return round_

    class LateRound(FakeRound):
        def forget(self) -> None:
            super().forget()
            for recording, granules in zip(self._world.log.recording, self.granules, strict=True):
                recording -= granules

    patch.setattr(world, "FakeLog", LateLog)


def skip_zeroed_ranges_in_dirty_rounds(patch: Patch) -> None:
    """Dirty ranges are treated as those of the bulk pass: unallocated ones skipped, zeroes not written to zeroes."""

    class SkippingMover(world.FakeMover):
        async def copy_piece(self, index: int, sectors: range, kind: CopyKind, tally: dict[str, int]) -> None:
            await super().copy_piece(index, sectors, CopyKind.BULK, tally)

    patch.setattr(carrier, "_check", lambda *_: None)
    patch.setattr(world, "FakeMover", SkippingMover)


def switch_over_during_bulk(patch: Patch) -> None:
    """The switchover is not refused while the bulk pass is not done."""
    guarded = BlockMigration._alone

    @asynccontextmanager
    async def unguarded(self: BlockMigration, what: str, *phases: Phase) -> AsyncIterator[None]:
        early = (Phase.RECORDING, Phase.BULK) if what == "the switchover" else ()
        async with guarded(self, what, *phases, *early):
            yield

    patch.setattr(BlockMigration, "_alone", unguarded)


def switch_over_while_the_guest_runs(patch: Patch) -> None:
    """The switchover does not look whether the guest is paused."""

    async def check_nothing(_self: Completion) -> None:
        return

    patch.setattr(Completion, "_check_guest", check_nothing)


def start_recording_after_the_first_read(patch: Patch) -> None:
    """Recording starts when the first range has been copied."""
    begin = DirtyRounds.start
    run = BulkPass.run

    async def pretend(self: DirtyRounds) -> None:
        rounds.append(self)

    async def run_then_start(self: BulkPass, devices: Sequence[Device]) -> None:
        if rounds:
            await self.carrier.copy(devices[0], [Extent(0, min(self.range_size, devices[0].size))], CopyKind.BULK)
            await begin(rounds.pop())
        await run(self, devices)

    rounds: list[DirtyRounds] = []
    patch.setattr(DirtyRounds, "start", pretend)
    patch.setattr(BulkPass, "run", run_then_start)


def retire_before_the_flush(patch: Patch) -> None:
    """A round is forgotten as soon as it is copied; the flush comes after."""
    flush = Carrier.flush
    take = DirtyRounds._take

    def remember(self: DirtyRounds, round_: Round) -> None:
        taken[self._carrier] = round_
        take(self, round_)

    async def retire_first(self: Carrier, device: Device) -> float:
        if round_ := taken.pop(self, None):
            await round_.retire()
        return await flush(self, device)

    taken: WeakKeyDictionary[Carrier, Round] = WeakKeyDictionary()
    patch.setattr(DirtyRounds, "_take", remember)
    patch.setattr(Carrier, "flush", retire_first)


def forget_a_failed_round(patch: Patch) -> None:
    """What a failed round had harvested is given up, as if it had arrived."""

    async def forget(self: DirtyRounds, round_: Round, error: BaseException) -> None:
        await round_.retire()

    patch.setattr(DirtyRounds, "_give_back", forget)


def forget_what_a_failed_round_should_have_mended(patch: Patch) -> None:
    """What a failed round had taken to be mended is given up."""
    patch.setattr(Device, "unmended", lambda self: setattr(self, "mending", ()))


def mend_before_the_harvest_is_all(patch: Patch) -> None:
    """What is amiss is taken for mended once any round has gone well."""
    retired = Device.retired

    def retire_all(self: Device) -> None:
        retired(self)
        self.amiss = ()

    patch.setattr(Device, "retired", retire_all)


def complete_with_something_amiss(patch: Patch) -> None:
    """The switchover looks at what is recorded only."""
    patch.setattr(Device, "to_harvest", property(lambda self: self.recorded))


def leave_a_failed_round_lying(patch: Patch) -> None:
    """What a failed round had harvested stays harvested, and nobody asks for it again."""

    async def leave(self: DirtyRounds, round_: Round, error: BaseException) -> None:
        return None

    patch.setattr(DirtyRounds, "_give_back", leave)


def lose_the_round_of_a_cancelled_harvest(patch: Patch) -> None:
    """A cancellation that comes while the log harvests is raised before anybody holds the round."""
    result = Outlasted.result

    def raise_at_once(self: Outlasted[object]) -> object:
        # Asked for: else asyncio tells of it when it collects the task, with a traceback, amid whatever is parsed then.
        failure = self.failure
        self.raise_cancellation()
        if failure is not None:
            raise failure
        return result(self)

    patch.setattr(Outlasted, "result", raise_at_once)


def drop_the_tail_of_an_odd_disk_in_rounds(patch: Patch) -> None:
    """Dirty extents are clipped to whole chunks of the disk."""

    def too_short(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
        return clip(extents, size - size % 1024)

    patch.setattr("qemu_blkmig.engine.dirty.clip", too_short)
    patch.setattr("qemu_blkmig.engine.dirty._check_whole", lambda *_: None)


def drop_the_tail_of_an_odd_disk_in_bulk(patch: Patch) -> None:
    """The bulk pass copies whole pairs of sectors only, and takes the rest for done."""
    bring = Carrier.bring

    async def bring_less(self: Carrier, device: Device, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        last = extents[-1]
        if kind is CopyKind.BULK and last.length % 1024:
            return CopyReport(last.length, 0, 0, 0.0)
        return await bring(self, device, extents, kind)

    patch.setattr(Carrier, "bring", bring_less)


def move_the_cursor_before_the_report(patch: Patch) -> None:
    """The bulk cursor counts what was submitted, not what arrived."""
    bring = Carrier.bring

    async def count_first(self: Carrier, device: Device, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        if kind is CopyKind.BULK:
            device.cursor = extents[-1].end
        return await bring(self, device, extents, kind)

    patch.setattr(Carrier, "bring", count_first)


def take_unflushed_bulk_for_done(patch: Patch) -> None:
    """The bulk pass goes on where it was, whatever the flush said."""
    patch.setattr(Device, "unsecured", lambda self: None)


def stop_recording_at_the_last_round(patch: Patch) -> None:
    """Recording ends with the last round rather than with the handover, which may still fail."""
    run = Completion.run

    async def run_and_stop(self: Completion, beside: Callable[[], Awaitable[None]]) -> None:
        await run(self, beside)
        await self._rounds._log.stop()

    patch.setattr(Completion, "run", run_and_stop)


def send_all_extents_at_once(patch: Patch) -> None:
    """A round's extents are gathered into one request."""
    patch.setattr(Batcher, "_has_no_room_for", lambda self, piece: False)


def settle_a_compared_range_before_its_copies(patch: Patch) -> None:
    """The cursor passes over a range once it is compared; what differs in it is copied after that."""
    bring = DiskPass._bring

    async def settle_first(self: DiskPass, extent: Extent) -> Settle:
        if self._way.comparer is not None:
            self._device.compared(extent, 0)
        return await bring(self, extent)

    patch.setattr(DiskPass, "_bring", settle_first)


def note_in_the_journal_before_the_flush(patch: Patch) -> None:
    """The journal is told what is about to be flushed."""
    secure = DiskPass._secure

    async def tell_and_secure(self: DiskPass) -> int:
        self._way.on_stable(self._device.name, self._device.cursor)
        return await secure(self)

    patch.setattr(DiskPass, "_secure", tell_and_secure)


def resume_at_the_cursor(patch: Patch) -> None:
    """The journal is told where the cursor stands, not what is flushed."""
    settle = Device.settle
    tell: list[Callable[[str, int], None]] = []

    async def run(self: BulkPass, devices: Sequence[Device]) -> None:
        tell[:] = [self.on_stable]
        await original(self, devices)

    def settle_and_tell(self: Device, extents: Sequence[Extent], kind: CopyKind, report: CopyReport) -> None:
        settle(self, extents, kind, report)
        if tell:
            tell[0](self.name, self.cursor)

    original = BulkPass.run
    patch.setattr(BulkPass, "run", run)
    patch.setattr(Device, "settle", settle_and_tell)


def take_all_for_known_that_something_known_lies_beyond(patch: Patch) -> None:
    """What lies between extents that are known to be there is not copied."""

    async def pass_over(self: DiskPass, extent: Extent) -> Settle:
        report = CopyReport(0, 0, extent.length, 0.0)
        return lambda seconds: self._carrier.settle(self._device, [extent], CopyKind.BULK, report, seconds)

    patch.setattr(DiskPass, "_bring_unknown", pass_over)


def count_ranges_as_they_arrive(patch: Patch) -> None:
    """The cursor passes over a range that is still under way once a later one has arrived."""

    def settle_any(self: DiskPass) -> None:
        for flight in [each for each in self._flights if each.task.done()]:
            flight.task.result()(0.0)
            self._flights.remove(flight)

    patch.setattr(DiskPass, "_settle", settle_any)


def count_a_range_whose_predecessor_failed(patch: Patch) -> None:
    """What has arrived when a range, or its flush, fails is counted whatever lies before it."""
    end = DiskPass._end_flights

    async def end_and_count(self: DiskPass, *, hurried: bool) -> asyncio.CancelledError | None:
        cancellation = await end(self, hurried=hurried)
        for flight in self._flights:
            if not flight.task.cancelled() and flight.task.exception() is None:
                flight.task.result()(0.0)
        return cancellation

    patch.setattr(DiskPass, "_end_flights", end_and_count)


def leave_the_ranges_ahead_in_flight(patch: Patch) -> None:
    """When a range fails, nobody waits for those that were asked for after it."""

    async def end_nothing(self: DiskPass, *, hurried: bool) -> None:
        self._flights.clear()

    patch.setattr(DiskPass, "_end_flights", end_nothing)


def forget_that_a_flush_beside_a_copy_failed(patch: Patch) -> None:
    """The next flush, which succeeds, is taken to make up for the one that failed."""
    note = DiskPass._note_flush

    def note_success(self: DiskPass) -> None:
        stable = self._device.stable, self._device.cursor
        try:
            note(self)
        except MigrationError:
            self._device.stable, self._device.cursor = stable

    patch.setattr(DiskPass, "_note_flush", note_success)


def forget_the_rounds_of_the_dead(patch: Patch) -> None:
    """What a dead coordinator had harvested and not brought over is not recorded again."""

    class ForgetfulLog(FakeLog):
        def left_behind(self) -> FakeLog:
            log = super().left_behind()
            log.orphans.clear()
            return log

    patch.setattr(world, "FakeLog", ForgetfulLog)


def record_anew_when_resumed(patch: Patch) -> None:
    """Who resumes starts to record afresh, as if nothing had been written before."""

    class FreshLog(FakeLog):
        async def reattach(self) -> None:
            self.recording = [set() for _ in self.recording]
            await super().reattach()

    patch.setattr(world, "FakeLog", FreshLog)


def stop_recording_when_resuming_fails(patch: Patch) -> None:
    """A reattachment that fails is undone, as a start that fails is."""

    async def reattach(self: DirtyRounds) -> None:
        try:
            await self._log.reattach()
        except BaseException:
            await self._log.stop()
            raise

    patch.setattr(DirtyRounds, "reattach", reattach)


def forget_what_is_put_off(patch: Patch) -> None:
    """Nobody remembers what a round has put off, though the round is kept."""
    patch.setattr(Device, "_put_off", lambda self, extents: setattr(self, "putting_off", []))


def retire_the_round_that_holds_what_is_put_off(patch: Patch) -> None:
    """A round is forgotten although a part of it was put off, of which memory alone knows then."""

    async def retire_all(self: DirtyRounds, round_: Round) -> None:
        await round_.retire()

    patch.setattr(DirtyRounds, "_retire", retire_all)


def retire_the_kept_round_before_the_next_is_flushed(patch: Patch) -> None:
    """What was put off is taken for brought over when the next round begins."""
    carry = DirtyRounds._carry

    async def retire_and_carry(self: DirtyRounds, round_: Round, room: int) -> float:
        for kept in self._kept:
            await kept.retire()
        self._kept = ()
        return await carry(self, round_, room)

    patch.setattr(DirtyRounds, "_carry", retire_and_carry)


def complete_without_what_is_put_off(patch: Patch) -> None:
    """The switchover looks at what is recorded, or amiss."""
    patch.setattr(Device, "to_harvest", property(lambda self: self.recorded + sum(e.length for e in self.amiss)))


def bring_over_only_what_is_harvested(patch: Patch) -> None:
    """What was put off and not written since is left where it is."""
    patch.setattr(Remainder, "rest", lambda self: ())


def leave_a_kept_round_lying_that_was_not_retired(patch: Patch) -> None:
    """Where the retirement of a kept round fails, only the round under way is put back."""

    async def restore(self: DirtyRounds, round_: Round) -> None:
        await round_.restore()
        for device in self._devices:
            device.restored()
            device.recorded_again()
        self._kept, self._leaving = (), []
        self.unrestored = False

    patch.setattr(DirtyRounds, "_restore", restore)


MUTANTS: Sequence[Callable[[Patch], None]] = (
    clear_bits_after_the_read,
    skip_zeroed_ranges_in_dirty_rounds,
    switch_over_during_bulk,
    switch_over_while_the_guest_runs,
    start_recording_after_the_first_read,
    retire_before_the_flush,
    forget_a_failed_round,
    forget_what_a_failed_round_should_have_mended,
    mend_before_the_harvest_is_all,
    complete_with_something_amiss,
    leave_a_failed_round_lying,
    lose_the_round_of_a_cancelled_harvest,
    drop_the_tail_of_an_odd_disk_in_rounds,
    drop_the_tail_of_an_odd_disk_in_bulk,
    move_the_cursor_before_the_report,
    take_unflushed_bulk_for_done,
    stop_recording_at_the_last_round,
    send_all_extents_at_once,
    settle_a_compared_range_before_its_copies,
    note_in_the_journal_before_the_flush,
    resume_at_the_cursor,
    take_all_for_known_that_something_known_lies_beyond,
    count_ranges_as_they_arrive,
    count_a_range_whose_predecessor_failed,
    leave_the_ranges_ahead_in_flight,
    forget_that_a_flush_beside_a_copy_failed,
    forget_the_rounds_of_the_dead,
    record_anew_when_resumed,
    stop_recording_when_resuming_fails,
    forget_what_is_put_off,
    retire_the_round_that_holds_what_is_put_off,
    retire_the_kept_round_before_the_next_is_flushed,
    complete_without_what_is_put_off,
    bring_over_only_what_is_harvested,
    leave_a_kept_round_lying_that_was_not_retired,
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_model_finds_the_bug(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises(Violation):
        explore(range(500))


def test_the_model_finds_nothing_in_the_engine_as_it_is() -> None:
    explore(range(2))
