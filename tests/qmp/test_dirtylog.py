"""Rounds lose nothing, restore restores, and nothing of ours is left."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import Refused, RequestError, TopologyChanged
from qemu_blkmig.nbd.binding import libnbd
from qemu_blkmig.nbd.dirty import dirty_extents
from qemu_blkmig.qmp.dirtylog import BitmapLog, BitmapRound
from qemu_blkmig.qmp.disks import inventory, select
from qemu_blkmig.qmp.exports import ExportServer
from qemu_blkmig.qmp.features import probe
from qemu_blkmig.qmp.topology import Topology
from tests.qmp.conftest import GRANULARITY, MakeImage, Qemu, StartQemu

PREFIX = "blkmig-test"
SIZE = 8 << 20


class Rig:
    """A QEMU with two disks, qcow2 `a` and raw `b` of an odd size, and a log of their writes."""

    def __init__(self, qemu: Qemu, log: BitmapLog, exports: ExportServer) -> None:
        self.qemu = qemu
        self.log = log
        self.exports = exports

    async def dirty(self, harvested: BitmapRound, disk: str) -> list[Extent]:
        return [extent async for batch in harvested.extents(disk) for extent in batch]


@pytest.fixture
async def rig(start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path) -> AsyncIterator[Rig]:
    a, b = make_image("a.qcow2", SIZE), make_image("b.img", 1_000_448, "raw")
    qemu = await start_qemu(
        *("-drive", f"if=none,id=a,file={a},format=qcow2", "-device", "virtio-blk,drive=a,id=va"),
        *("-drive", f"if=none,id=b,file={b},format=raw", "-device", "virtio-blk,drive=b,id=vb"),
    )
    disks = select(await inventory(qemu.monitor), None)
    exports = ExportServer(qemu.monitor, tmp_path / "x.nbd")
    await exports.start()
    topology = await Topology.snapshot(qemu.monitor, disks, ours=PREFIX)
    log = BitmapLog(qemu.monitor, disks, prefix=PREFIX, granularity=GRANULARITY, exports=exports, topology=topology)
    yield Rig(qemu, log, exports)
    if not qemu.monitor.lost:
        await log.stop()
        await exports.stop()
        assert await qemu.bitmaps() == []
        assert await qemu.exports() == []
        assert not await qemu.server_runs()


async def test_a_round_holds_exactly_what_was_written_on_each_disk(rig: Rig) -> None:
    await rig.log.start()
    await rig.qemu.io("a", "write -P 1 100k 8k")
    await rig.qemu.io("a", "write -P 1 1M 128k")
    await rig.qemu.io("b", "write -P 1 983040 17408")
    assert await rig.log.pending() == {"a": 3 * GRANULARITY, "b": GRANULARITY}
    harvested = await rig.log.harvest()
    assert await rig.log.pending() == {"a": 0, "b": 0}
    assert await rig.dirty(harvested, "a") == [Extent(65536, 65536), Extent(1 << 20, 131072)]
    assert await rig.dirty(harvested, "b") == [Extent(983040, 17408)]


async def test_a_round_can_be_read_again_until_it_is_retired(rig: Rig) -> None:
    await rig.log.start()
    await rig.qemu.io("a", "write 0 64k")
    harvested = await rig.log.harvest()
    async with contextlib.aclosing(harvested.extents("a")) as batches:
        await anext(batches)
    assert await rig.dirty(harvested, "a") == [Extent(0, 65536)]
    await harvested.retire()
    with pytest.raises(RequestError, match="over"):
        await rig.dirty(harvested, "a")
    assert await rig.log.pending() == {"a": 0, "b": 0}
    assert (await rig.log.harvest()).dirty == {"a": 0, "b": 0}
    assert {name for _node, name in await rig.qemu.bitmaps()} == {f"{PREFIX}-b2", f"{PREFIX}-b3"}


async def test_inactive_disks_keep_their_recording_and_are_read_once_they_are_active_again(rig: Rig) -> None:
    if not (await probe(rig.qemu.monitor)).set_active:
        pytest.skip("this QEMU cannot be told to inactivate disks")
    await rig.log.start()
    await rig.qemu.io("a", "write 0 64k")
    first = await rig.log.harvest()
    await rig.qemu.user.execute("stop")
    node = next(disk.node for disk in select(await inventory(rig.qemu.user), None) if disk.name == "a")
    await rig.exports.add("shown", node, bitmaps=[f"{PREFIX}-b1"])
    await rig.qemu.user.execute("blockdev-set-active", {"active": False})
    with pytest.raises(RequestError, match="no dirty block status"):
        await asyncio.to_thread(list, dirty_extents(rig.exports.address, "shown", f"{PREFIX}-b1", SIZE))
    await rig.exports.remove("shown")
    await first.restore()
    assert await rig.log.pending() == {"a": GRANULARITY, "b": 0}
    again = await rig.log.harvest()
    await rig.qemu.user.execute("blockdev-set-active", {"active": True})
    assert await rig.dirty(again, "a") == [Extent(0, 65536)]


async def test_what_is_restored_is_harvested_again_together_with_later_writes(rig: Rig) -> None:
    await rig.log.start()
    await rig.qemu.io("a", "write 0 64k")
    first = await rig.log.harvest()
    await rig.qemu.io("a", "write 1M 64k")
    second = await rig.log.harvest()
    await rig.qemu.io("a", "write 2M 64k")
    await first.restore()
    await second.restore()
    assert await rig.log.pending() == {"a": 3 * GRANULARITY, "b": 0}
    harvested = await rig.log.harvest()
    offsets = [extent.offset for extent in await rig.dirty(harvested, "a")]
    assert offsets == [0, 1 << 20, 2 << 20]
    assert len(await rig.qemu.bitmaps()) == 4


async def test_a_harvest_that_is_cancelled_at_any_moment_takes_nothing_for_good(rig: Rig) -> None:
    await rig.log.start()
    await rig.qemu.io("a", "write 0 64k")
    for yields in range(0, 60, 2):
        harvest = asyncio.create_task(rig.log.harvest())
        for _ in range(yields):
            await asyncio.sleep(0.0002)
        harvest.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await harvest).restore()
        assert (await rig.log.pending())["a"] == GRANULARITY, f"cancelled after {yields} turns"


async def test_reading_a_round_that_is_cancelled_leaves_no_export(rig: Rig) -> None:
    await rig.log.start()
    await rig.qemu.io("a", "write 0 64k")
    harvested = await rig.log.harvest()
    for yields in range(0, 30, 2):
        reading = asyncio.create_task(rig.dirty(harvested, "a"))
        for _ in range(yields):
            await asyncio.sleep(0.0002)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert await rig.qemu.exports() == []
    assert await rig.dirty(harvested, "a") == [Extent(0, 65536)]


async def test_rounds_under_a_hostile_writer_lose_nothing(rig: Rig, tmp_path: Path) -> None:
    await rig.log.start()
    await rig.exports.add(f"{PREFIX}-data", (await _top_node(rig.qemu, "a")))
    copy = bytearray(SIZE)
    handle = libnbd().NBD()
    handle.set_export_name(f"{PREFIX}-data")
    await asyncio.to_thread(handle.connect_unix, str(rig.exports.address))
    ended = asyncio.Event()
    writer = asyncio.create_task(_write_everywhere(rig.qemu, ended))
    rounds = 0
    while rounds < 12:
        rounds += 1
        if rounds == 11:
            ended.set()
            await writer
        harvested = await rig.log.harvest()
        for number, extent in enumerate(await rig.dirty(harvested, "a")):
            if rounds < 8 and number == 1 and rounds % 3 == 0:
                break
            data = await asyncio.to_thread(handle.pread, extent.length, extent.offset)
            copy[extent.offset : extent.end] = data
        else:
            await harvested.retire()
            continue
        await harvested.restore()
    assert (await rig.log.pending())["a"] == 0
    await asyncio.to_thread(handle.shutdown)
    await rig.log.stop()
    await rig.exports.stop()
    await rig.qemu.user.execute("quit")
    await rig.qemu.monitor.wait_lost()
    (tmp_path / "copy.img").write_bytes(copy)
    assert await asyncio.to_thread(same_contents, tmp_path / "copy.img", tmp_path / "a.qcow2")


def same_contents(raw: Path, qcow2: Path) -> bool:
    return subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, qcow2], check=False).returncode == 0


async def _write_everywhere(qemu: Qemu, ended: asyncio.Event) -> None:
    choice = random.Random(7)
    while not ended.is_set():
        offset, length = choice.randrange(0, SIZE // 512 - 256) * 512, choice.randrange(1, 256) * 512
        verb = choice.choice(["write -P 17", "write -P 200", "write -z", "discard"])
        await qemu.io("a", f"{verb} {offset} {length}")


async def _top_node(qemu: Qemu, device: str) -> str:
    drives = await qemu.user.execute("query-block")
    return next(str(drive["inserted"]["node-name"]) for drive in drives if drive["device"] == device)


async def test_a_snapshot_is_found_at_the_next_harvest_and_nothing_is_taken(rig: Rig, tmp_path: Path) -> None:
    await rig.log.start()
    await rig.qemu.io("a", "write 0 64k")
    arguments = {"device": "a", "snapshot-file": str(tmp_path / "snap.qcow2"), "format": "qcow2"}
    await rig.qemu.user.execute("blockdev-snapshot-sync", arguments)
    with pytest.raises(TopologyChanged, match=r"disk a: a snapshot was taken.*snap\.qcow2"):
        await rig.log.harvest()
    assert [name for _node, name in await rig.qemu.bitmaps()] == [f"{PREFIX}-b1"] * 2


async def test_a_bitmap_that_somebody_disabled_is_found(rig: Rig) -> None:
    await rig.log.start()
    node = await _top_node(rig.qemu, "b")
    await rig.qemu.user.execute("block-dirty-bitmap-disable", {"node": node, "name": f"{PREFIX}-b1"})
    with pytest.raises(TopologyChanged, match="disk b: the bitmap blkmig-test-b1 does not record"):
        await rig.log.harvest()


async def test_a_transaction_that_is_refused_takes_nothing(rig: Rig) -> None:
    await rig.log.start()
    await rig.qemu.io("a", "write 0 64k")
    node = await _top_node(rig.qemu, "b")
    await rig.qemu.user.execute("block-dirty-bitmap-add", {"node": node, "name": f"{PREFIX}-b2", "disabled": True})
    with pytest.raises(RequestError, match="b2"):
        await rig.log.harvest()
    assert (await rig.log.pending())["a"] == GRANULARITY
    assert await rig.dirty(await rig.log.harvest(), "a") == [Extent(0, 65536)]


async def test_stop_twice_and_stop_after_qemu_is_gone_are_quiet(rig: Rig) -> None:
    await rig.log.start()
    await rig.log.harvest()
    await rig.log.stop()
    await rig.log.stop()
    rig.qemu.process.kill()
    await rig.qemu.monitor.wait_lost()
    await rig.log.stop()


def another(rig: Rig) -> BitmapLog:
    """The log of a coordinator that comes after one that died."""
    old = rig.log
    rig.log = BitmapLog(
        rig.qemu.monitor,
        list(old._disks.values()),
        prefix=PREFIX,
        granularity=GRANULARITY,
        exports=rig.exports,
        topology=old._topology,
    )
    return rig.log


async def test_who_comes_after_a_dead_one_goes_on_recording_with_its_rounds_merged_back(rig: Rig) -> None:
    await rig.log.start()
    await rig.qemu.io("a", "write 0 64k")
    await rig.log.harvest()
    await rig.qemu.io("a", "write 1M 64k")
    await rig.log.harvest()
    await rig.qemu.io("a", "write 2M 64k")
    log = another(rig)
    await rig.qemu.io("b", "write 0 64k")
    await log.reattach()
    assert await log.pending() == {"a": 3 * GRANULARITY, "b": GRANULARITY}
    assert len(await rig.qemu.bitmaps()) == 2
    harvested = await log.harvest()
    assert [extent.offset for extent in await rig.dirty(harvested, "a")] == [0, 1 << 20, 2 << 20]
    await harvested.retire()
    assert await log.pending() == {"a": 0, "b": 0}


async def test_a_recording_that_is_not_there_is_not_taken_up(rig: Rig) -> None:
    with pytest.raises(Refused, match="disk a: no bitmap records its writes"):
        await rig.log.reattach()
    await rig.log.start()
    node = await _top_node(rig.qemu, "b")
    await rig.qemu.user.execute("block-dirty-bitmap-remove", {"node": node, "name": f"{PREFIX}-b1"})
    log = another(rig)
    with pytest.raises(Refused, match="disk b: no bitmap records its writes"):
        await log.reattach()
    assert len(await rig.qemu.bitmaps()) == 1, "what is left is for whoever cleans up"


async def test_a_recording_whose_disk_has_a_snapshot_since_is_not_taken_up(rig: Rig, tmp_path: Path) -> None:
    await rig.log.start()
    arguments = {"device": "a", "snapshot-file": str(tmp_path / "snap.qcow2"), "format": "qcow2"}
    await rig.qemu.user.execute("blockdev-snapshot-sync", arguments)
    with pytest.raises(TopologyChanged, match="a snapshot was taken"):
        await another(rig).reattach()
