"""Maps of what was copied: they add up, stay small whatever is copied for however long, and can be gone on with."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.ports import CopyKind, CopyReport
from qemu_blkmig.job.diskmap import BANDS, CELLS, SLOTS, Cells, DiskMap, Maps

MIB = 1 << 20
KIB = 1 << 10


class Mover:
    """Copies half of what it is asked for; the rest is zero."""

    async def copy(self, disk: str, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        """See `Mover`."""
        if disk == "broken":
            raise OSError
        await asyncio.sleep(0)
        asked = sum(extent.length for extent in extents)
        return CopyReport(asked // 2, asked - asked // 2, 0, 0.1)

    async def flush(self, disk: str) -> None:
        """See `Mover`."""

    async def set_bandwidth(self, rate: int | None) -> None:
        """See `Mover`."""


@pytest.mark.parametrize("size", [512, 64 * KIB, 100 * MIB + 512, 1 << 40, 1 << 50])
def test_a_map_is_bounded_and_covers_the_whole_disk(size: int) -> None:
    made = DiskMap(size, 0.0)
    assert len(made.passes) <= CELLS
    assert (len(made.passes) - 1) * made.cell < size <= len(made.passes) * made.cell


def test_a_first_pass_goes_over_every_cell_once_and_draws_a_diagonal() -> None:
    made = DiskMap(128 * MIB, 1000.0)
    for number in range(8):
        extent = Extent(number * 16 * MIB, 16 * MIB)
        made.bulk(extent, 0.5, 1000 + number * 2 * 0.125, 1000 + (number + 1) * 2 * 0.125)
    assert set(made.passes) == {1}
    assert sum(made.sent) == sum(made.picture) == 64 * KIB
    busy = [[band for band in range(BANDS) if made.picture[slot * BANDS + band]] for slot in range(16)]
    assert [bands[0] for bands in busy] == list(range(0, 128, 8))
    assert made.used == 16


def test_ranges_that_are_smaller_than_a_cell_are_one_pass_together() -> None:
    made = DiskMap(1 << 40, 0.0)
    for number in range(4):
        made.bulk(Extent(number * made.cell // 4, made.cell // 4), 1.0, 0, 1)
    assert list(made.passes[:2]) == [1, 0]


def test_a_round_counts_once_for_each_cell_however_many_batches_and_extents_it_comes_in() -> None:
    made = DiskMap(128 * MIB, 0.0)
    step = made.cell // 4
    for _ in range(3):
        made.dirty([Extent(0, step), Extent(2 * step, step)], 1.0)
        made.dirty([Extent(3 * step, 3 * step)], 1.0)
    assert list(made.passes[:3]) == [3, 3, 0]
    assert list(made.sent[:2]) == [3 * 3 * step / KIB, 3 * 2 * step / KIB]


def test_time_slots_double_and_nothing_is_lost_of_what_was_sent() -> None:
    made = DiskMap(128 * MIB, 0.0)
    for second in range(5000):
        made.dirty([Extent(second % 128 * MIB, 64 * KIB)], float(second))
    assert made.slot == 64.0, "the first power of two with which 5000 seconds fit"
    assert len(made.picture) == BANDS * SLOTS
    assert sum(made.picture) == sum(made.sent) == 5000 * 64


@given(
    size=st.integers(1, 1 << 24).map(lambda sectors: sectors * 512),
    rounds=st.lists(st.lists(st.tuples(st.integers(0, 1 << 33), st.integers(1, 1 << 20)), min_size=1), max_size=4),
)
def test_whatever_is_copied_the_sums_agree(size: int, rounds: list[list[tuple[int, int]]]) -> None:
    made = DiskMap(size, 0.0)
    total = 0
    for number, places in enumerate(rounds):
        end, extents = 0, []
        for offset, length in sorted(places):
            offset = max(end, offset % size)
            if offset < size:
                extents.append(Extent(offset, min(length, size - offset)))
                end = extents[-1].end + 1
        if extents:
            made.dirty(extents, number * 7.0)
            total += sum(extent.length for extent in extents)
    assert sum(made.sent) * KIB == pytest.approx(total)
    assert sum(made.picture) * KIB == pytest.approx(total)
    assert max(made.passes) <= len(rounds)


async def test_a_watched_mover_does_what_it_did_and_is_noted() -> None:
    kept: dict[str, Cells] = {}
    maps = Maps(kept.__setitem__, now=lambda: 5.0)
    maps.begin({"vda": MIB, "vdb": MIB}, {})
    mover = maps.watched(Mover())
    report = await mover.copy("vda", [Extent(0, MIB)], CopyKind.BULK)
    assert (report.copied, report.zeroed) == (MIB // 2, MIB // 2)
    await mover.copy("vda", [Extent(0, 64 * KIB)], CopyKind.DIRTY)
    await mover.flush("vda")
    await mover.set_bandwidth(None)
    maps.keep()
    drawn = DiskMap.of(MIB, kept["vda"])
    assert drawn is not None
    assert list(drawn.passes) == [2] + [1] * 15
    assert sum(drawn.sent) == 512 + 64
    untouched = DiskMap.of(MIB, kept["vdb"])
    assert untouched is not None and not any(untouched.passes)


async def test_a_copy_that_fails_fails_as_before() -> None:
    maps = Maps(lambda _disk, _cells: None)
    maps.begin({"broken": MIB}, {})
    for kind in CopyKind:
        with pytest.raises(OSError):
            await maps.watched(Mover()).copy("broken", [Extent(0, MIB)], kind)


async def test_a_resumed_job_goes_on_with_its_map_and_the_rest_in_between_takes_no_room() -> None:
    kept: dict[str, Cells] = {}
    now = 1000.0
    maps = Maps(kept.__setitem__, now=lambda: now)
    maps.begin({"vda": MIB}, {})
    await maps.watched(Mover()).copy("vda", [Extent(0, MIB)], CopyKind.DIRTY)
    maps.keep()
    now += 86400
    again = Maps(kept.__setitem__, now=lambda: now)
    again.begin({"vda": MIB}, kept)
    await again.watched(Mover()).copy("vda", [Extent(0, MIB)], CopyKind.BULK)
    again.keep()
    drawn = DiskMap.of(MIB, kept["vda"])
    assert drawn is not None
    assert drawn.slot == 0.125 and drawn.used == 2
    assert set(drawn.passes) == {2}


@pytest.mark.parametrize("field", ["passes", "sent", "picture"])
@pytest.mark.parametrize("damage", [b"", b"no zlib"], ids=["empty", "garbage"])
def test_a_damaged_map_is_none(field: str, damage: bytes) -> None:
    whole = DiskMap(MIB, 0.0).kept()
    assert DiskMap.of(MIB, whole) is not None
    assert DiskMap.of(MIB, msgspec.structs.replace(whole, **{field: damage})) is None
    assert DiskMap.of(1 << 40, whole) is None, "another disk's"
