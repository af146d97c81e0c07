"""The extent algebra."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qemu_blkmig.engine.extents import Batcher, Extent, clip, union


def batches(extents: list[Extent], most: int, volume: int) -> list[list[Extent]]:
    batcher = Batcher(most=most, volume=volume, size=1 << 40)
    full = list(batcher.feed(extents))
    rest = batcher.rest()
    return [*full, rest] if rest else full


def test_an_extent_beyond_the_end_is_cut_there_or_dropped() -> None:
    extents = [Extent(0, 512), Extent(1024, 1024), Extent(2048, 512)]
    assert list(clip(extents, 1536)) == [Extent(0, 512), Extent(1024, 512)]


def test_neighbours_are_joined_even_when_they_come_in_different_groups() -> None:
    batcher = Batcher(most=4, volume=1000, size=1 << 40)
    assert list(batcher.feed([Extent(0, 10)])) == []
    assert list(batcher.feed([Extent(10, 10), Extent(30, 10)])) == []
    assert batcher.rest() == [Extent(0, 20), Extent(30, 10)]


def test_a_full_batch_still_takes_the_neighbour_of_its_last_extent() -> None:
    assert batches([Extent(0, 10), Extent(10, 10), Extent(30, 10)], most=1, volume=1000) == [
        [Extent(0, 20)],
        [Extent(30, 10)],
    ]


def test_an_extent_longer_than_a_batch_is_divided() -> None:
    assert batches([Extent(5, 25)], most=4, volume=10) == [[Extent(5, 10)], [Extent(15, 10)], [Extent(25, 5)]]


@given(
    runs=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=20),
    most=st.integers(1, 4),
    volume=st.integers(1, 12),
)
def test_batches_hold_every_byte_once_in_order_within_their_bounds(
    runs: list[tuple[int, int]], most: int, volume: int
) -> None:
    extents: list[Extent] = []
    at = 0
    for gap, length in runs:
        extents.append(Extent(at + gap, length))
        at += gap + length
    found = batches(extents, most, volume)
    assert [byte for batch in found for e in batch for byte in range(e.offset, e.end)] == [
        byte for e in extents for byte in range(e.offset, e.end)
    ]
    for batch in found:
        assert 0 < len(batch) <= most
        assert sum(extent.length for extent in batch) <= volume
        assert all(before.end < after.offset for before, after in pairwise(batch))


@given(
    runs=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=20),
    unit=st.sampled_from((1, 2, 8)),
    tail=st.integers(0, 9),
)
def test_extents_are_rounded_out_to_whole_units_and_never_beyond_the_disk(
    runs: list[tuple[int, int]], unit: int, tail: int
) -> None:
    extents: list[Extent] = []
    at = 0
    for gap, length in runs:
        extents.append(Extent(at + gap, length))
        at += gap + length
    size = at + tail
    batcher = Batcher(most=3, volume=16, size=size, unit=unit)
    found = [each for batch in (*batcher.feed(extents), batcher.rest()) for each in batch]
    touched = {byte // unit for e in extents for byte in range(e.offset, e.end)}
    assert [byte for e in found for byte in range(e.offset, e.end)] == [
        byte for number in sorted(touched) for byte in range(number * unit, min(size, (number + 1) * unit))
    ]


def test_a_union_is_ascending_disjoint_and_joined() -> None:
    first = [Extent(0, 4), Extent(10, 4), Extent(30, 2)]
    assert union(first, [Extent(2, 6), Extent(14, 1), Extent(20, 5)]) == [
        Extent(0, 8),
        Extent(10, 5),
        Extent(20, 5),
        Extent(30, 2),
    ]
    assert union((), ()) == []
