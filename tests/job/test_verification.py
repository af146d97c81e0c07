"""What reads back what was written: by an engine and an agent that are played."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import cast

import pytest

from qemu_blkmig.cli.clock import RealClock
from qemu_blkmig.destination.protocol import VerifyReply
from qemu_blkmig.engine.convergence import Policy
from qemu_blkmig.engine.device import SECTOR
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.migration import BlockMigration, Phase, Tuning
from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import ContentsDiffer, DestinationFailed, DestinationWriteError
from qemu_blkmig.job import verification
from qemu_blkmig.job.verification import Verification
from tests.engine.world import Disk, World, Write

SIZE = 11
POLICY = Policy(downtime=0.3, max_rounds=None)


class Impatient(RealClock):
    """Counts sleeps, which are short."""

    slept = 0

    async def sleep(self, seconds: float) -> None:
        """See `Clock`."""
        self.slept += 1
        await super().sleep(seconds / 100)


class Played:
    """An agent that answers what it is told to, and then that nothing is left; `asked` counts."""

    def __init__(self, world: World, *replies: VerifyReply, clock: Clock | None = None) -> None:
        self.replies = deque(replies)
        self.asked = 0
        self.below: list[int | None] = []
        self.notes: list[str] = []
        self.verification = Verification(self.read_back, ["vda"], world.engine, self.notes.append, clock or RealClock())

    async def read_back(self, disk: str, limit: int, below: int | None) -> VerifyReply:
        """See `ReadBack`."""
        self.asked += 1
        self.below.append(below)
        await asyncio.sleep(0)
        return self.replies.popleft() if self.replies else VerifyReply(0, 0, [])


async def copied(*, paused: bool) -> World:
    """A world whose bulk pass is done, and if `paused` its last round."""
    disk = Disk("vda", bytearray(range(1, SIZE + 1)), None, False, bytearray(SIZE), [True] * SIZE)
    world = World([disk], granularity=2, tuning=Tuning(chunk_size=4 * SECTOR, range_size=4 * SECTOR))
    await world.engine.setup()
    await world.engine.bulk()
    if paused:
        world.pause()
        await world.engine.complete()
    return world


@contextlib.asynccontextmanager
async def reading(verification: Verification) -> AsyncIterator[None]:
    """It reads back in the background, the first pass being over."""
    async with verification.in_background():
        with verification.beside_pass():
            pass
        yield


async def reach(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_what_is_not_as_it_was_written_is_copied_again_and_read_back_again() -> None:
    world = await copied(paused=True)
    world.disks[0].destination[4] = world.disks[0].flushed[4] = 99
    world.disks[0].damaged.add(4)
    bad = VerifyReply(SIZE * SECTOR, 2 * SECTOR, [(4 * SECTOR, 2 * SECTOR)])
    played = Played(world, bad, VerifyReply(0, 2 * SECTOR, []), VerifyReply(2 * SECTOR, 0, []))
    assert not await played.verification.rest()
    assert world.engine.figures().pending == 2 * SECTOR
    await world.engine.complete()
    world.check_equal()
    assert await played.verification.rest()
    assert "disk vda" in played.notes[0] and "1024 bytes from offset 2048" in played.notes[0]
    assert (played.verification.read_back, played.verification.mended) == ((SIZE + 2) * SECTOR, 2 * SECTOR)


async def test_what_is_wrong_twice_ends_it_and_is_told_by_disk_and_offset() -> None:
    world = await copied(paused=True)
    bad = VerifyReply(SIZE * SECTOR, SECTOR, [(4 * SECTOR, SECTOR)])
    played = Played(world, bad, VerifyReply(0, SECTOR, []), bad)
    assert not await played.verification.rest()
    await world.engine.complete()
    with pytest.raises(ContentsDiffer, match="twice not what was written: 512 bytes from offset 2048") as failure:
        await played.verification.rest()
    assert (failure.value.disk, failure.value.offset, failure.value.exit_code) == ("vda", 2048, 5)
    assert "storage" in str(failure.value.advice)


@pytest.mark.parametrize("differ", [(-SECTOR, SECTOR), (0, 0), (0, -SECTOR), ((SIZE - 1) * SECTOR, 2 * SECTOR)])
async def test_what_cannot_differ_is_no_defect_of_ours(differ: tuple[int, int]) -> None:
    world = await copied(paused=True)
    played = Played(world, VerifyReply(SECTOR, SECTOR, [differ]))
    with pytest.raises(DestinationFailed, match="makes no sense"):
        await played.verification.rest()


async def test_what_differs_at_the_end_and_at_the_beginning_is_copied_again() -> None:
    world = await copied(paused=True)
    for sector in (0, 8):
        world.disks[0].destination[sector] = world.disks[0].flushed[sector] = 99
        world.disks[0].damaged.add(sector)
    bad = VerifyReply(SIZE * SECTOR, 4 * SECTOR, [(8 * SECTOR, 2 * SECTOR), (0, 2 * SECTOR)])
    played = Played(world, bad, VerifyReply(0, 4 * SECTOR, []), VerifyReply(4 * SECTOR, 0, []))
    assert not await played.verification.rest()
    assert world.engine.figures().pending == 4 * SECTOR
    await world.engine.complete()
    world.check_equal()
    assert await played.verification.rest()


async def test_what_both_sides_differ_in_is_owed_unless_it_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    world = await copied(paused=True)
    played = Played(world)
    played.verification.differ("vda", [Extent(4 * SECTOR, 2 * SECTOR)])
    assert (world.engine.figures().pending, played.verification.mended) == (2 * SECTOR, 2 * SECTOR)
    assert "1024 bytes from offset 2048" in played.notes[0]
    monkeypatch.setattr(verification, "MOST_MENDED", SECTOR)
    with pytest.raises(ContentsDiffer, match="too much"):
        played.verification.differ("vda", [Extent(4 * SECTOR, 2 * SECTOR)])


async def test_nothing_is_taken_for_verified_that_is_left() -> None:
    world = await copied(paused=True)
    played = Played(world, VerifyReply(0, SECTOR, []))
    with pytest.raises(DestinationFailed, match="512 bytes were not read back"):
        await played.verification.rest()


async def test_what_fails_in_the_background_ends_what_goes_on() -> None:
    world = await copied(paused=False)
    bad = VerifyReply(SECTOR, SECTOR, [(0, SECTOR)])
    played = Played(world, bad, bad)
    with pytest.raises(ContentsDiffer):
        async with reading(played.verification):
            await asyncio.Event().wait()

    async def lost(_disk: str, _limit: int, _below: int | None) -> VerifyReply:
        raise DestinationWriteError("cannot be read back", disk="vda", offset=None, errno=5)

    verification = Verification(lost, ["vda"], world.engine, played.notes.append, RealClock())
    with pytest.raises(DestinationWriteError):
        async with reading(verification):
            await asyncio.Event().wait()


async def test_beside_the_first_pass_only_what_is_stable_is_read_back_and_nothing_is_owed() -> None:
    world = await copied(paused=False)
    played = Played(world, VerifyReply(SECTOR, SECTOR, [(0, SECTOR)]))
    verification = played.verification
    async with verification.in_background():
        await asyncio.sleep(0.05)
        assert not played.asked
        with verification.beside_pass():
            await reach(lambda: not played.replies)
            assert set(played.below) == {SIZE * SECTOR} and not played.notes
            assert world.engine.figures().pending == 0
            played.below.clear()
        assert "not what was written" in played.notes[0] and world.engine.figures().pending == SECTOR
        await reach(lambda: None in played.below)


async def test_a_pass_whose_storage_loses_what_it_is_given_does_not_go_on_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verification, "MOST_MENDED", SECTOR)
    played = Played(await copied(paused=False), VerifyReply(2 * SECTOR, 0, [(0, 2 * SECTOR)]))
    async with asyncio.timeout(10):
        with pytest.raises(ContentsDiffer, match="too much to be mended"):
            async with played.verification.in_background():
                with played.verification.beside_pass():
                    await asyncio.Event().wait()


async def test_what_is_amiss_in_very_many_places_is_judged_at_once() -> None:
    """An agent that hears nothing for 20 s gives up."""
    count, unit = 16 << 10, 64 << 10
    disk = SimpleNamespace(name="vda", size=2 * count * unit, stable=0, copied=0, zeroed=0)
    owed: list[Extent] = []
    engine = SimpleNamespace(figures=lambda: SimpleNamespace(disks=[disk]), owe=lambda _, extents: owed.extend(extents))
    replies = deque([(2 * at * unit, unit) for at in range(first, first + 1024)] for first in range(0, count, 1024))
    replies.rotate()

    async def read_back(_disk: str, _limit: int, _below: int | None) -> VerifyReply:
        return VerifyReply(verification.BESIDE, 0, replies.popleft()) if replies else VerifyReply(0, 0, [])

    calls = itertools.count()

    def count_calls(*_: object) -> None:
        assert next(calls) < 64 * count, "what it takes grows faster than the number of places"

    tried = Verification(read_back, ["vda"], cast(BlockMigration, engine), lambda _: None, RealClock())
    async with tried.in_background():
        with tried.beside_pass():
            await reach(lambda: not replies)
            sys.setprofile(count_calls)
        sys.setprofile(None)
    assert owed == [Extent(2 * at * unit, unit) for at in range(count)] and tried.mended == count * unit


async def test_what_was_left_beside_the_first_pass_is_not_what_is_left_after_it() -> None:
    world = await copied(paused=False)
    played = Played(world, VerifyReply(SECTOR, 0, []))
    verification = played.verification
    async with asyncio.timeout(10), verification.in_background():
        with verification.beside_pass():
            await reach(lambda: not played.replies)
        asked = played.asked
        await verification.until_caught_up(POLICY)
        assert played.asked > asked


async def test_what_fails_inside_is_raised_as_it_is() -> None:
    world = await copied(paused=False)
    with pytest.raises(DestinationFailed):
        async with reading(Played(world).verification):
            raise DestinationFailed("gone")


async def test_it_catches_up_when_little_is_left_and_when_all_was_read_back_once() -> None:
    world = await copied(paused=False)
    endless = [VerifyReply(SECTOR, SIZE * SECTOR, []) for _ in range(100)]
    for replies in ([VerifyReply(SIZE * SECTOR, 0, [])], endless):
        played = Played(world, *replies)
        async with asyncio.timeout(10), reading(played.verification):
            await played.verification.catch_up(Policy(downtime=1e-9, max_rounds=None))


async def test_held_nothing_is_owed_until_the_rest_is_read_back() -> None:
    world = await copied(paused=False)
    answer = asyncio.Event()

    async def slowly(_disk: str, _limit: int, _below: int | None) -> VerifyReply:
        await answer.wait()
        return replies.popleft() if replies else VerifyReply(0, 0, [])

    replies = deque([VerifyReply(SECTOR, SECTOR, [(0, SECTOR)]), VerifyReply(0, SECTOR, [])])
    verification = Verification(slowly, ["vda"], world.engine, lambda _: None, RealClock())
    async with reading(verification):
        await asyncio.sleep(0)
        verification.hold()
        answer.set()
        await reach(lambda: len(replies) == 1)
        world.pause()
        await world.engine.complete()
        assert world.engine.figures().phase is Phase.COMPLETED
        assert not await verification.rest()
        assert world.engine.figures().pending == SECTOR


async def test_when_nothing_was_written_nobody_is_asked_again_and_again() -> None:
    world = await copied(paused=False)
    clock = Impatient()
    played = Played(world, clock=clock)
    async with reading(played.verification):
        await reach(lambda: clock.slept > 3)
        assert played.asked == 1
        world.act(Write(0, 0, 1, 3))
        await world.engine.round()
        await reach(lambda: played.asked > 1)


async def test_what_was_read_back_ahead_is_not_asked_for_again_unless_more_was_copied() -> None:
    world = await copied(paused=False)
    played = Played(world)
    world.log.mark(0, range(4))
    await world.engine.refresh()
    world.pause()
    await world.engine.complete(played.verification.ahead)
    assert played.asked == 1
    assert await played.verification.rest()
    assert played.asked == 1
    world.log.mark(0, range(4))
    await world.engine.round()
    await world.engine.complete(played.verification.ahead)
    assert played.asked == 2
    assert await played.verification.rest()
    assert played.asked == 2


async def test_what_is_found_amiss_ahead_is_copied_again() -> None:
    world = await copied(paused=False)
    bad = VerifyReply(SIZE * SECTOR, SECTOR, [(4 * SECTOR, SECTOR)])
    played = Played(world, bad, VerifyReply(0, SECTOR, []), VerifyReply(SECTOR, 0, []))
    world.pause()
    await world.engine.complete(played.verification.ahead)
    world.disks[0].destination[4] = world.disks[0].flushed[4] = 99
    world.disks[0].damaged.add(4)
    assert world.engine.figures().phase is Phase.COMPLETED
    assert not await played.verification.rest()
    await world.engine.complete(played.verification.ahead)
    world.check_equal()
    assert await played.verification.rest()
    assert played.verification.mended == SECTOR
