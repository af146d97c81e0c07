"""Others' jobs on a disk whose writes are recorded: after which of them that still is all that was written."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qemu_blkmig.errors import DisksInUse, Refused, TopologyChanged
from qemu_blkmig.qmp.dirtylog import BitmapLog
from qemu_blkmig.qmp.disks import Disk, inventory, obstacles
from qemu_blkmig.qmp.exports import ExportServer
from qemu_blkmig.qmp.topology import Topology
from tests.qmp.conftest import GRANULARITY, MakeImage, Qemu, StartQemu

PREFIX = "blkmig-test"
MIB = 1 << 20


class Recorded:
    """A QEMU whose one disk, node `a` upon a base, is being recorded."""

    def __init__(self, qemu: Qemu, exports: ExportServer) -> None:
        self.qemu = qemu
        self.exports = exports

    async def disk(self) -> Disk:
        """As it is now."""
        (disk,) = (await inventory(self.qemu.monitor)).disks
        return disk

    async def begin(self) -> None:
        """The log of a coordinator that comes now."""
        disk = await self.disk()
        self.topology = await Topology.snapshot(self.qemu.monitor, [disk], ours=PREFIX)
        self.log = BitmapLog(
            self.qemu.monitor,
            [disk],
            prefix=PREFIX,
            granularity=GRANULARITY,
            exports=self.exports,
            topology=self.topology,
        )

    async def recorded(self, offset: int) -> bool:
        """Whether who comes after a suspension knows that something was written there."""
        await self.begin()
        await self.log.reattach()
        harvested = await self.log.harvest()
        extents = [extent async for batch in harvested.extents("va") for extent in batch]
        await harvested.restore()
        return any(extent.offset <= offset < extent.end for extent in extents)

    async def write(self, offset: int) -> None:
        """As the guest does."""
        told = await self.qemu.io("-d /machine/peripheral/va/virtio-backend", f"write -P 7 {offset} 64k")
        assert "rror" not in told, told

    async def do(self, command: str, arguments: dict[str, object]) -> None:
        await self.qemu.user.execute(command, arguments)

    async def add(self, node: str, path: Path, **more: object) -> None:
        file = {"driver": "file", "filename": str(path)}
        await self.do("blockdev-add", {"driver": "qcow2", "node-name": node, "file": file, **more})

    async def end(self, how: str, event: str) -> None:
        """End the job by the command `how`."""
        with self.qemu.user.events(event) as events:
            await self.do(how, {"id": "job"})
            await events.get(20)

    async def ready(self, command: str, **arguments: object) -> None:
        """Begin a job that is in step soon."""
        with self.qemu.user.events("BLOCK_JOB_READY") as events:
            await self.do(command, {"job-id": "job", **arguments})
            await events.get(20)

    async def pivot(self, source: str, target: str) -> None:
        """Move the guest from one node to another."""
        await self.ready("blockdev-mirror", device=source, target=target, sync="full")
        await self.end("job-complete", "BLOCK_JOB_COMPLETED")

    async def found(self) -> TopologyChanged:
        """What the next look at the disks raises."""
        with pytest.raises(TopologyChanged) as told:
            await self.topology.check()
        return told.value


@pytest.fixture
async def disk(start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path) -> AsyncIterator[Recorded]:
    base = make_image("base.qcow2")
    await asyncio.to_thread(subprocess.run, f"qemu-io -c 'write -P 1 0 4M' {base}", shell=True, check=True)
    a = make_image("a.qcow2", backing=base)
    qemu = await start_qemu(
        *("-blockdev", f"driver=qcow2,node-name=base,read-only=on,file.driver=file,file.filename={base}"),
        *("-blockdev", f"driver=qcow2,node-name=a,backing=base,file.driver=file,file.filename={a}"),
        *("-device", "virtio-blk,drive=a,id=va"),
    )
    exports = ExportServer(qemu.monitor, tmp_path / "x.nbd")
    await exports.start()
    made = Recorded(qemu, exports)
    await made.begin()
    await made.log.start()
    yield made


@pytest.mark.parametrize("kind", ["backup", "mirror"])
async def test_a_job_that_only_reads_the_disk_is_one_that_can_be_gone_on_after(
    disk: Recorded, make_image: MakeImage, kind: str
) -> None:
    await disk.add("other", make_image("other.qcow2"))
    job: dict[str, object] = {"job-id": "job", "device": "a", "target": "other", "sync": "full", "speed": 1}
    if kind == "mirror":
        # What it has in flight at once is not slowed down: all of this disk, and it would be ready.
        job["buf-size"] = 64 << 10
    await disk.do(f"blockdev-{kind}", job)
    told = await disk.found()
    assert isinstance(told, DisksInUse) and told.mendable and told.advice == "let it end"
    assert f"the block job job ({kind}) was started by somebody else" in told.what
    await disk.write(5 * MIB)
    (obstacle,) = await obstacles(disk.qemu.monitor, [await disk.disk()], ours=PREFIX)
    assert obstacle == f"the block job job ({kind}) is running: let it end"
    await disk.end("job-cancel", "BLOCK_JOB_CANCELLED")
    assert await disk.recorded(5 * MIB)


async def test_an_export_of_somebody_else_is_one_that_can_be_gone_on_after(disk: Recorded) -> None:
    await disk.do("block-export-add", {"type": "nbd", "id": "theirs", "name": "t", "node-name": "a", "writable": False})
    told = await disk.found()
    assert isinstance(told, DisksInUse) and told.disk == "va" and told.advice == "let that end"


async def test_fleecing_above_the_disk_leaves_its_recording_alone(disk: Recorded, make_image: MakeImage) -> None:
    """As libvirt's pull backup: what the guest overwrites is kept in an overlay upon the disk's own node."""
    await disk.add("fleece", make_image("fleece.qcow2"), backing="a")
    await disk.do("blockdev-backup", {"job-id": "job", "device": "a", "target": "fleece", "sync": "none"})
    await disk.do("block-export-add", {"type": "nbd", "id": "theirs", "name": "t", "node-name": "fleece"})
    assert isinstance(await disk.found(), DisksInUse)
    await disk.write(0)
    await disk.do("block-export-del", {"id": "theirs", "mode": "hard"})
    await disk.end("job-cancel", "BLOCK_JOB_CANCELLED")
    assert await disk.recorded(0)


@pytest.mark.parametrize("kind", ["stream", "commit"])
async def test_a_job_that_changes_the_chain_is_a_change(disk: Recorded, kind: str) -> None:
    await disk.write(0)
    await disk.do(f"block-{kind}", {"job-id": "job", "device": "a", "speed": 1})
    told = await disk.found()
    assert type(told) is TopologyChanged and not told.mendable and f"({kind})" in told.what
    await disk.end("job-cancel", "BLOCK_JOB_CANCELLED")


async def test_a_backup_of_a_disk_that_has_a_snapshot_since_is_a_change(disk: Recorded, make_image: MakeImage) -> None:
    await disk.add("top", make_image("top.qcow2"), backing=None)
    await disk.do("blockdev-snapshot", {"node": "a", "overlay": "top"})
    await disk.add("other", make_image("other.qcow2"))
    await disk.do("blockdev-backup", {"job-id": "job", "device": "top", "target": "other", "sync": "full", "speed": 1})
    assert type(await disk.found()) is TopologyChanged
    await disk.end("job-cancel", "BLOCK_JOB_CANCELLED")


async def test_a_pivot_is_not_gone_on_after_and_there_and_back_nothing_is_missing(
    disk: Recorded, make_image: MakeImage
) -> None:
    await disk.add("other", make_image("other.qcow2"))
    await disk.pivot("a", "other")
    await disk.write(5 * MIB)
    with pytest.raises(Refused, match="no bitmap records its writes"):
        await disk.recorded(5 * MIB)
    await disk.pivot("other", "a")
    assert await disk.recorded(5 * MIB)


async def test_a_snapshot_that_was_committed_back_is_recorded(disk: Recorded, make_image: MakeImage) -> None:
    before = (await disk.disk()).images
    await disk.add("top", make_image("top.qcow2"), backing=None)
    await disk.do("blockdev-snapshot", {"node": "a", "overlay": "top"})
    await disk.write(5 * MIB)
    with pytest.raises(Refused, match="no bitmap records its writes"):
        await disk.recorded(5 * MIB)
    await disk.ready("block-commit", **{"device": "top", "base-node": "a"})
    await disk.write(6 * MIB)
    await disk.end("job-complete", "BLOCK_JOB_COMPLETED")
    assert (await disk.disk()).images == before
    assert await disk.recorded(5 * MIB) and await disk.recorded(6 * MIB)


async def test_a_base_that_was_streamed_into_the_disk_makes_its_chain_another(disk: Recorded) -> None:
    before = (await disk.disk()).images
    with disk.qemu.user.events("BLOCK_JOB_COMPLETED") as events:
        await disk.do("block-stream", {"job-id": "job", "device": "a"})
        await events.get(20)
    after = (await disk.disk()).images
    assert [node for node, _ in before] == ["a", "base"] and [node for node, _ in after] == ["a"]
