"""What the engine holds does not grow with the disk, nor with what is dirty (DESIGN.md, invariant 6)."""

from __future__ import annotations

from qemu_blkmig.engine.migration import Tuning
from tests.engine.link import GRANULE, Link

MANY = 100_000


async def test_a_16_tib_disk_with_many_dirty_extents_is_streamed() -> None:
    link = Link(size=16 << 40, speed=float(10 << 30), writer=0)
    migration = link.migration(Tuning(range_size=4 << 30, stride=4.0))
    await migration.setup()
    await migration.bulk()
    link.recorded = MANY * GRANULE
    assert await migration.round() == MANY * GRANULE
    assert link.bulk_bytes == 16 << 40
    assert link.dirty_bytes == MANY * GRANULE
    assert link.most_extents == Tuning().batch
    assert link.most_groups <= 2


async def test_ranges_of_the_bulk_pass_take_about_as_long_as_they_are_meant_to() -> None:
    link = Link(size=64 << 30, speed=float(100 << 20), writer=0)
    migration = link.migration(Tuning(stride=4.0))
    await migration.setup()
    await migration.bulk()
    assert link.bulk_bytes == 64 << 30
    assert 160 <= link.requests <= 175, "4 s at 100 MiB/s, but for the first ones"


async def test_a_huge_disk_without_content_is_asked_for_in_long_ranges() -> None:
    link = Link(size=16 << 40, speed=float(64 << 40), writer=0)
    migration = link.migration(Tuning(stride=4.0))
    await migration.setup()
    await migration.bulk()
    assert link.bulk_bytes == 16 << 40
    assert link.requests <= 1024 + 8, "16 GiB each, but for the first ones"


async def test_ranges_that_are_asked_for_ahead_are_a_128th_of_a_disk() -> None:
    link = Link(size=4 << 30, speed=float(1 << 30), writer=0)
    migration = link.migration(Tuning(stride=1.0, room=32 << 20))
    await migration.setup()
    await migration.bulk()
    assert link.bulk_bytes == 4 << 30
    assert 128 <= link.requests <= 136, "but for the first ones"


async def test_ranges_become_short_where_the_link_becomes_slow() -> None:
    link = Link(size=1 << 30, speed=float(1 << 30), writer=0)
    migration = link.migration(Tuning(stride=4.0))
    await migration.setup()
    link.speed = float(1 << 20)
    await migration.bulk()
    assert link.requests >= 200, "4 MiB each, but for the first ones"


async def test_no_request_is_larger_than_a_range_however_long_an_extent_is() -> None:
    link = Link(size=1 << 30, speed=float(1 << 30), writer=0)
    migration = link.migration(Tuning(range_size=1 << 20))
    await migration.setup()
    await migration.bulk()
    assert link.requests == 1 << 10
    link.recorded = 64 * GRANULE
    await migration.round()
    assert link.requests == (1 << 10) + 64 * GRANULE // (1 << 20)
