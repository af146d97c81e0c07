"""Pieces in whole units: a unit of which parts have different fates is read whole."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd import plan as nbd_plan
from qemu_blkmig.nbd.connection import STATUS_LIMIT, Connection, Entries
from qemu_blkmig.nbd.plan import ALLOCATION, DEPTH, Action, Piece, Plan

ZERO = 2


class FakeConnection:
    """Answers what a map of bytes to fates says: at most `most` entries, cut at `reach` bytes."""

    def __init__(
        self, fates: str, most: int, reach: int, contexts: frozenset[str] = frozenset((ALLOCATION, DEPTH))
    ) -> None:
        self.contexts = contexts
        self._fates = fates
        self._most = most
        self._reach = reach

    def status(self, offset: int, length: int, completed: list[tuple[dict[str, Entries], int]]) -> None:
        """See `Connection`."""
        told = self._fates[offset : offset + min(length, self._reach)]
        runs = [(fate, len(list(group))) for fate, group in groupby(told)][: self._most]
        allocation = [(count, ZERO if fate == "z" else 0) for fate, count in runs]
        depth = [(count, 2 if fate == "s" else 1) for fate, count in runs]
        answer = {ALLOCATION: allocation, DEPTH: depth}
        completed.append(({context: answer[context] for context in self.contexts}, 0))


def classify(zero: bool, depth: int | None) -> Action:
    """As a mover does whose image has one private layer."""
    return Action.SKIP if depth == 2 else Action.ZERO if zero else Action.DATA


@given(
    fates=st.lists(st.tuples(st.sampled_from("dzs"), st.integers(1, 9)), min_size=1, max_size=12),
    unit=st.sampled_from((1, 2, 4, 8)),
    most=st.integers(1, 3),
    reach=st.integers(1, 20),
    cut=st.sampled_from((8, 16)),
    start=st.integers(0, 3),
    told=st.sampled_from((frozenset((ALLOCATION, DEPTH)), frozenset((ALLOCATION,)))),
    window=st.sampled_from((8, 1 << 20)),
)
def test_every_unit_has_one_fate_that_of_its_bytes_or_is_data_and_mixed(
    fates: list[tuple[str, int]],
    unit: int,
    most: int,
    reach: int,
    cut: int,
    start: int,
    told: frozenset[str],
    window: int,
) -> None:
    fate = "".join(kind * count for kind, count in fates)
    fate = fate if DEPTH in told else fate.replace("s", "d")
    start = min(start * unit, (len(fate) - 1) // unit * unit)
    connection = cast("Connection", FakeConnection(fate, most, reach, told))
    plan = Plan(connection, [Extent(start, len(fate) - start)], classify, look_from=0, disk="d", unit=unit)
    pieces: list[Piece] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nbd_plan, "WINDOW", window)
        plan._window = window
        while not plan.exhausted:
            plan.look_ahead()
            while (piece := plan.take(lambda piece: cut - piece.offset % cut)) is not None:
                pieces.append(piece)
    assert pieces[0].offset == start and pieces[-1].end == len(fate)
    assert all(before.end == after.offset for before, after in pairwise(pieces))
    for piece in pieces:
        assert piece.offset % unit == 0 and (piece.end % unit == 0 or piece.end == len(fate))
        for at in range(piece.offset, piece.end, unit):
            own = set(fate[at : min(at + unit, piece.end)])
            expected = {"d": Action.DATA, "z": Action.ZERO, "s": Action.SKIP}[own.pop()] if len(own) == 1 else None
            assert (piece.action, piece.mixed) == ((expected, False) if expected else (Action.DATA, True))


@given(
    fates=st.lists(st.tuples(st.sampled_from("dzs"), st.integers(1, 9)), min_size=1, max_size=12),
    ends=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    most=st.integers(1, 3),
    reach=st.integers(1, 20),
)
def test_no_piece_is_given_of_what_is_not_wanted_yet_and_pieces_end_where_what_was_wanted_ends(
    fates: list[tuple[str, int]], ends: list[int], most: int, reach: int
) -> None:
    fate = "".join(kind * count for kind, count in fates)
    wanted = sorted({min(end, len(fate)) for end in ends} | {len(fate)})
    connection = cast("Connection", FakeConnection(fate, most, reach))
    plan = Plan(connection, [Extent(0, len(fate))], classify, look_from=0, disk="d", wanted=wanted[0])
    pieces: list[Piece] = []
    for end in wanted:
        if end > wanted[0]:
            plan.go_on(end)
        while not plan.exhausted:
            plan.look_ahead()
            while (piece := plan.take(lambda piece: piece.length)) is not None:
                pieces.append(piece)
        assert pieces[-1].end == plan.goes_on_at == end
    assert [piece.offset for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
    told = {"d": Action.DATA, "z": Action.ZERO, "s": Action.SKIP}
    assert all({told[each] for each in fate[piece.offset : piece.end]} == {piece.action} for piece in pieces)


@given(
    fates=st.lists(st.tuples(st.sampled_from("dz"), st.integers(1, 9)), min_size=8, max_size=24),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    unit=st.sampled_from((1, 2, 4)),
    look_from=st.sampled_from((0, 4, 8, 16)),
    most=st.integers(1, 3),
    reach=st.integers(1, 20),
)
def test_answers_that_come_short_leave_nothing_of_short_ranges_out(
    fates: list[tuple[str, int]], lengths: list[int], unit: int, look_from: int, most: int, reach: int
) -> None:
    """Of a range the rest may be too short to be worth a lookup, and begin amid a unit."""
    fate = "".join(kind * count for kind, count in fates) + "d" * sum(lengths) * 2 * unit
    ranges, end = [], 0
    for length in lengths:
        ranges.append(Extent(end, length * unit))
        end += 2 * length * unit
    connection = cast("Connection", FakeConnection(fate, most, reach, frozenset((ALLOCATION,))))
    plan = Plan(connection, ranges, classify, look_from=look_from, disk="d", unit=unit)
    given_out: list[int] = []
    while not plan.exhausted:
        plan.look_ahead()
        while (piece := plan.take(lambda piece: piece.length)) is not None:
            given_out += range(piece.offset, piece.end)
    assert given_out == [at for each in ranges for at in range(each.offset, each.end)]


class Desert:
    """A disk with nothing stored on it but in its last GiB, which is full of holes; keeps what it was asked."""

    contexts = frozenset((ALLOCATION,))
    size = 64 << 30

    def __init__(self) -> None:
        self.asked: list[Extent] = []

    def status(self, offset: int, length: int, completed: list[tuple[dict[str, Entries], int]]) -> None:
        """See `Connection`."""
        self.asked.append(Extent(offset, length))
        stored = self.size - (1 << 30)
        runs = [(stored - offset, ZERO)] if offset < stored else []
        runs += [(64 << 10, 0), (64 << 10, ZERO)] * 1000 if offset + length > stored else []
        completed.append(({ALLOCATION: runs}, 0))


def test_lookups_grow_where_little_is_found_most_of_all_in_a_desert_and_shrink_where_it_ends() -> None:
    desert = Desert()
    plan = Plan(cast("Connection", desert), [Extent(0, desert.size)], classify, look_from=0, disk="d")
    while not plan.exhausted:
        plan.look_ahead()
        while plan.take(lambda piece: piece.length) is not None:
            pass
    lengths = [asked.length for asked in desert.asked]
    assert lengths[:3] == [nbd_plan.WINDOW, 2 * nbd_plan.WINDOW, nbd_plan.WIDEST]
    assert max(lengths[: nbd_plan.DESERT]) == nbd_plan.WIDEST, "not before it is known to be one"
    assert max(lengths) == STATUS_LIMIT
    beyond = next(number for number, asked in enumerate(desert.asked) if asked.end > desert.size - (1 << 30))
    assert max(lengths[beyond + 1 :]) == nbd_plan.WINDOW
