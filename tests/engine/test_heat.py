"""What the guest writes all the time is put off, and what that saves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_blkmig.engine.convergence import Policy, Verdict
from qemu_blkmig.engine.extents import Extent, Remainder
from qemu_blkmig.engine.forecast import Forecasts, Outlook, time_to_converge
from qemu_blkmig.engine.heat import CELLS, Heat, Sieve
from tests.engine.simulated import Simulation, Writer, appender, hot_spot, sequential, uniform, zipf

GRANULE = 64 << 10
MIB = 1 << 20
GIB = 1 << 30
SPEED = 200.0 * MIB


def sift(heat: Heat, sieve: Sieve, *extents: Extent) -> tuple[list[Extent], list[Extent]]:
    put_off: list[Extent] = []
    heat.begin_round()
    return list(sieve.sift(heat, extents, put_off)), put_off


def test_what_is_dirty_in_several_of_the_last_rounds_is_put_off_and_what_is_in_one_is_not() -> None:
    heat = Heat(100 * GRANULE, GRANULE)
    hot, cold = Extent(3 * GRANULE, 2 * GRANULE), Extent(7 * GRANULE, GRANULE)
    first = Sieve(GIB)
    assert sift(heat, first, hot) == ([hot], [])
    assert sift(heat, Sieve(GIB, first.seen), hot, cold) == ([cold], [hot])


def test_no_more_is_put_off_than_there_is_room_for_and_whole_granules_only() -> None:
    heat = Heat(100 * GRANULE, GRANULE)
    hot = Extent(0, 10 * GRANULE)
    first = Sieve(0)
    sift(heat, first, hot)
    copied, put_off = sift(heat, Sieve(4 * GRANULE + 512, first.seen), hot)
    assert put_off == [Extent(0, 4 * GRANULE)] and copied == [Extent(4 * GRANULE, 6 * GRANULE)]


def test_a_place_that_is_left_alone_is_hot_no_more_after_a_few_rounds() -> None:
    heat = Heat(100 * GRANULE, GRANULE)
    place = Extent(0, GRANULE)
    sieve = Sieve(GIB)
    for _ in range(4):
        sift(heat, sieve, place)
    for _ in range(4):
        sift(heat, sieve)
    assert sift(heat, Sieve(GIB, sieve.seen), place) == ([place], [])


def test_a_disk_of_any_size_takes_no_more_memory_than_that() -> None:
    heat = Heat(64 << 40, GRANULE)
    far = Extent((64 << 40) - 3 * GRANULE, 3 * GRANULE)
    long = Extent(0, 2 * CELLS * GRANULE)
    assert [part for part, _ in heat.note(far)] == [far]
    parts = list(heat.note(long))
    assert sum(part.length for part, _ in parts) == long.length and len(parts) > 1
    assert len(heat._cells) == CELLS


runs = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=12)


def laid_out(gaps: list[tuple[int, int]]) -> list[Extent]:
    extents, at = [], 0
    for gap, length in gaps:
        extents.append(Extent(at + gap, length))
        at += gap + length
    return extents


def covered(extents: list[Extent]) -> set[int]:
    return {byte for extent in extents for byte in range(extent.offset, extent.end)}


@given(runs, runs, st.integers(1, 4))
def test_a_remainder_is_what_no_extent_of_the_stream_had(first: list[tuple[int, int]], second: list[tuple[int, int]],
                                                         group: int) -> None:  # fmt: skip
    kept, stream = laid_out(first), laid_out(second)
    remainder = Remainder(kept)
    for at in range(0, len(stream), group):
        remainder.take_out(stream[at : at + group])
    rest = list(remainder.rest())
    assert covered(rest) == covered(kept) - covered(stream)
    assert rest == sorted(rest) and sum(extent.length for extent in rest) == len(covered(rest))


async def sent(writer: Writer, policy: Policy, *, ram: float, size: int = GIB) -> Simulation:
    simulation = Simulation(size, SPEED, writer)
    assert await simulation.migrate(policy, ram=ram) is Verdict.FITS
    return simulation


@pytest.mark.parametrize("speed_share", [0.2, 0.5, 0.8])
async def test_hot_places_that_fit_the_pause_cost_a_fraction_of_what_rounds_without_putting_off_send(
    speed_share: float,
) -> None:
    """90 % of the writes go to a tenth of 256 MiB, while RAM migrates for ten seconds."""
    granules = 256 * MIB // GRANULE
    naive, ours = [
        await sent(hot_spot(granules, speed_share * SPEED), Policy(0.3, None, put_off), ram=10, size=256 * MIB)
        for put_off in (False, True)
    ]
    assert ours.sent_dirty <= 0.7 * naive.sent_dirty
    assert ours.downtime <= 0.3


@pytest.mark.parametrize("make", [uniform, sequential, appender, zipf])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
async def test_no_writer_makes_putting_off_send_more_or_take_longer(
    make: Callable[[int, float], Writer], share: float
) -> None:
    granules = GIB // GRANULE
    naive, ours = [
        await sent(make(granules, share * SPEED), Policy(0.3, None, put_off), ram=5) for put_off in (False, True)
    ]
    assert ours.sent_dirty <= 1.05 * naive.sent_dirty
    assert ours.time <= 1.05 * naive.time
    assert ours.downtime <= 0.3


def test_a_forecast_is_what_the_rounds_then_take() -> None:
    outlook = Outlook(bulk=0, dirty=1000 * MIB, speed=100.0 * MIB, dirtying=50.0 * MIB, overhead=0.0, downtime=0.1)
    assert time_to_converge(outlook) == pytest.approx(sum(10 / 2**number for number in range(7)))


@pytest.mark.parametrize(("dirtying", "overhead"), [(150.0 * MIB, 0.0), (50.0 * MIB, 0.2)])
def test_it_is_not_forecast_that_what_never_fits_will(dirtying: float, overhead: float) -> None:
    outlook = Outlook(0, 1000 * MIB, 100.0 * MIB, dirtying, overhead, downtime=0.1)
    assert time_to_converge(outlook) is None


def test_confidence_is_what_forecasts_were_worth() -> None:
    forecasts = Forecasts()
    assert forecasts.confidence is None
    for expected, came in ((100, 100), (100, 50), (100, 200)):
        forecasts.expect(expected)
        forecasts.came(came)
    assert forecasts.confidence == pytest.approx(1 - (0 + 0.5 + 0.5) / 3)


async def test_the_engine_tells_when_it_will_have_converged_and_is_right_for_a_steady_writer() -> None:
    simulation = Simulation(GIB, SPEED, uniform(GIB // GRANULE, 0.4 * SPEED))
    engine = simulation.engine()
    policy = Policy(downtime=0.1, max_rounds=None, put_off=False)
    engine.aim(policy)
    await engine.setup()
    await engine.refresh()
    await engine.bulk()
    await engine.round()
    told = (await engine.refresh()).converges_in
    began = simulation.time
    await engine.converge(policy)
    assert told is not None and told == pytest.approx(simulation.time - began, rel=0.4)
    confidence = engine.figures().confidence
    assert confidence is not None and confidence > 0.6
