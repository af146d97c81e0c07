"""A recording that is shown while it records loses nothing, and goes the long way where it cannot be shown."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import ConnectionLost, TopologyChanged
from qemu_blkmig.qmp.features import probe
from qemu_blkmig.qmp.watch import Watch
from tests.qmp.conftest import GRANULARITY
from tests.qmp.test_dirtylog import PREFIX, Rig, rig

__all__ = ["rig"]


@pytest.fixture
async def ready(rig: Rig) -> Rig:
    """Recording, and shown."""
    if not (await probe(rig.qemu.monitor)).watch:
        pytest.skip("this QEMU does not show a bitmap that records")
    await rig.log.start()
    await rig.log.stand_ready()
    return rig


def count(exports: Sequence[str]) -> int:
    return len([export for export in exports if export.startswith(f"{PREFIX}-w")])


async def test_what_is_written_after_it_was_shown_is_in_the_round(ready: Rig) -> None:
    await ready.qemu.io("a", "write 1M 128k")
    await ready.qemu.io("b", "write 983040 17408")
    exports = await ready.qemu.exports()
    harvested = await ready.log.harvest()
    assert harvested.dirty == {"a": 2 * GRANULARITY, "b": GRANULARITY}
    assert await ready.dirty(harvested, "a") == [Extent(1 << 20, 131072)]
    assert await ready.dirty(harvested, "b") == [Extent(983040, 17408)]
    assert await ready.qemu.exports() == exports


async def test_what_is_written_after_the_harvest_is_recorded_anew(ready: Rig) -> None:
    await ready.qemu.io("a", "write 0 64k")
    first = await ready.log.harvest()
    await ready.qemu.io("a", "write 0 64k")
    await ready.qemu.io("a", "write 1M 64k")
    assert Extent(0, 65536) in await ready.dirty(first, "a")
    await first.retire()
    assert await ready.log.verify_topology() == {"a": 2 * GRANULARITY, "b": 0}
    second = await ready.log.harvest()
    assert await ready.dirty(second, "a") == [Extent(0, 65536), Extent(1 << 20, 65536)]
    assert {name for _node, name in await ready.qemu.bitmaps()} == {f"{PREFIX}-b2", f"{PREFIX}-b3"}
    assert count(await ready.qemu.exports()) == 0


async def test_a_shown_round_that_is_restored_is_harvested_again_with_later_writes(ready: Rig) -> None:
    await ready.qemu.io("a", "write 0 64k")
    first = await ready.log.harvest()
    await ready.qemu.io("a", "write 1M 64k")
    await first.restore()
    assert await ready.log.pending() == {"a": 2 * GRANULARITY, "b": 0}
    await ready.log.stand_ready()
    assert await ready.dirty(await ready.log.harvest(), "a") == [Extent(0, 65536), Extent(1 << 20, 65536)]


async def test_a_kept_round_that_still_records_is_ended_by_the_next_harvest(ready: Rig) -> None:
    await ready.qemu.io("a", "write 0 64k")
    kept = await ready.log.harvest()
    await ready.log.stand_ready()
    second = await ready.log.harvest()
    await ready.qemu.io("a", "write 1M 64k")
    await ready.log.stand_ready()
    third = await ready.log.harvest()
    assert third.dirty["a"] == GRANULARITY
    nodes = await ready.qemu.user.execute("query-named-block-nodes", {"flat": True})
    recording = {b["name"] for node in nodes for b in node.get("dirty-bitmaps", []) if b["recording"]}
    assert recording == {f"{PREFIX}-b3", f"{PREFIX}-b4"}
    for each in (second, third, kept):
        await each.restore()
    assert (await ready.log.pending())["a"] == 2 * GRANULARITY


@pytest.mark.parametrize("broken", ["export", "connection"])
async def test_a_round_whose_export_is_gone_is_read_over_another(ready: Rig, broken: str) -> None:
    await ready.qemu.io("a", "write 0 64k")
    if broken == "export":
        for export in await ready.qemu.exports():
            await ready.qemu.user.execute("block-export-del", {"id": export, "mode": "hard"})
    else:
        watch = ready.log._watch
        assert watch is not None
        watch._seen["a"][0].drop()
    harvested = await ready.log.harvest()
    assert await ready.dirty(harvested, "a") == [Extent(0, 65536)]
    await harvested.retire()
    await ready.log.stand_ready()
    await ready.qemu.io("a", "write 1M 64k")
    assert await ready.dirty(await ready.log.harvest(), "a") == [Extent(1 << 20, 65536)]


async def test_where_it_cannot_be_shown_all_goes_without(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object) -> Watch:
        raise ConnectionLost("nobody there")

    monkeypatch.setattr(Watch, "begin", refuse)
    await rig.log.start()
    await rig.log.stand_ready()
    await rig.qemu.io("a", "write 0 64k")
    assert await rig.dirty(await rig.log.harvest(), "a") == [Extent(0, 65536)]


async def test_a_harvest_that_is_cancelled_at_any_moment_takes_nothing_for_good(ready: Rig) -> None:
    await ready.qemu.io("a", "write 0 64k")
    for yields in range(0, 30, 2):
        await ready.log.stand_ready()
        harvest = asyncio.create_task(ready.log.harvest())
        for _ in range(yields):
            await asyncio.sleep(0.0002)
        harvest.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await harvest).restore()
        assert (await ready.log.pending())["a"] == GRANULARITY, f"cancelled after {yields} turns"


async def test_standing_ready_that_is_cancelled_leaves_no_export_that_is_not_ended(ready: Rig) -> None:
    for yields in range(0, 30, 2):
        await (await ready.log.harvest()).retire()
        standing = asyncio.create_task(ready.log.stand_ready())
        for _ in range(yields):
            await asyncio.sleep(0.0002)
        standing.cancel()
        await asyncio.gather(standing, return_exceptions=True)
        await ready.log.stand_ready()
        assert count(await ready.qemu.exports()) == 2


async def test_a_snapshot_is_found_by_a_harvest_of_what_is_shown_and_nothing_is_taken(
    ready: Rig, tmp_path: object
) -> None:
    await ready.qemu.io("a", "write 0 64k")
    await ready.qemu.user.execute("blockdev-snapshot-sync", {"device": "a", "snapshot-file": f"{tmp_path}/s.qcow2"})
    with pytest.raises(TopologyChanged, match="snapshot"):
        await ready.log.harvest()
    assert (await ready.log.pending())["a"] == GRANULARITY


async def test_who_comes_after_a_dead_one_merges_back_what_was_shown(ready: Rig) -> None:
    await ready.qemu.io("a", "write 0 64k")
    await ready.log.harvest()
    await ready.qemu.io("a", "write 1M 64k")
    for export in await ready.qemu.exports():
        await ready.qemu.user.execute("block-export-del", {"id": export, "mode": "hard"})
    ready.log.__init__(  # type: ignore[misc]
        ready.log._monitor,
        list(ready.log._disks.values()),
        prefix=PREFIX,
        granularity=GRANULARITY,
        exports=ready.exports,
        topology=ready.log._topology,
    )
    await ready.log.reattach()
    assert await ready.log.pending() == {"a": 2 * GRANULARITY, "b": 0}
    assert {name for _node, name in await ready.qemu.bitmaps()} == {f"{PREFIX}-b2"}


async def test_disks_that_were_inactive_are_read_as_shown_once_they_are_active_again(ready: Rig) -> None:
    if not (await probe(ready.qemu.monitor)).set_active:
        pytest.skip("this QEMU cannot be told to inactivate disks")
    await ready.qemu.io("a", "write 0 64k")
    await ready.qemu.user.execute("stop")
    await ready.qemu.user.execute("blockdev-set-active", {"active": False})
    await ready.qemu.user.execute("blockdev-set-active", {"active": True})
    harvested = await ready.log.harvest()
    exports = await ready.qemu.exports()
    assert await ready.dirty(harvested, "a") == [Extent(0, 65536)]
    assert await ready.qemu.exports() == exports


async def test_nothing_is_shown_where_bitmaps_are_to_be_carried_along(ready: Rig) -> None:
    await ready.log.stand_down()
    await ready.log.stand_ready()
    nodes = await ready.qemu.user.execute("query-named-block-nodes", {"flat": True})
    assert not [bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", []) if bitmap["busy"]]
    await ready.qemu.io("a", "write 0 64k")
    assert await ready.dirty(await ready.log.harvest(), "a") == [Extent(0, 65536)]
