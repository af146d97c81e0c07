"""Drives of all kinds are found and told apart, and what stands in the way is told in words."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from qemu_blkmig.errors import Refused, TopologyChanged
from qemu_blkmig.job.imagefile import describe
from qemu_blkmig.qmp.disks import Backing, Disk, Inventory, device_id, inventory, obstacles, select
from qemu_blkmig.qmp.features import Schema, probe
from qemu_blkmig.qmp.topology import Topology
from tests.qmp.conftest import MakeImage, Qemu, StartQemu

SECRET = ("-object", "secret,id=s,data=abc")


async def disks_of(qemu: Qemu) -> dict[str, Disk]:
    return {disk.name: disk for disk in (await inventory(qemu.monitor)).disks}


async def test_drives_that_do_not_take_part_are_skipped_with_the_reason(
    start_qemu: StartQemu, make_image: MakeImage
) -> None:
    raw = [
        make_image(f"{name}.img", size, "raw") for name, size in (("ro", "1M"), ("cd", "1M"), ("zero", 0), ("w", "1M"))
    ]
    qemu = await start_qemu(
        *("-drive", f"if=none,id=ro,file={raw[0]},format=raw,readonly=on", "-device", "virtio-blk,drive=ro"),
        *("-drive", f"if=ide,media=cdrom,id=cd,file={raw[1]},format=raw"),
        *("-device", "ide-cd,id=empty"),
        *("-device", "floppy,id=fd"),
        *("-drive", f"if=none,id=zero,file={raw[2]},format=raw"),
        *("-device", "virtio-scsi,id=bus", "-device", "scsi-hd,drive=zero"),
        *("-drive", f"if=none,id=loose,file={raw[3]},format=raw"),
    )
    found = await inventory(qemu.monitor)
    assert found.disks == ()
    assert {drive.name: drive.reason for drive in found.skipped} == {
        "ro": "it is read-only",
        "cd": "it is a CD-ROM",
        "empty": "it is an empty CD-ROM drive",
        "fd": "the drive is empty",
        "zero": "its size is 0",
        "loose": "no device of the guest uses it",
    }
    with pytest.raises(Refused, match=r"no disk to migrate.*ro: it is read-only"):
        select(found, None)
    with pytest.raises(Refused, match="disk ro: cannot be migrated: it is read-only"):
        select(found, ["ro"])


async def test_drive_and_blockdev_guests_show_names_nodes_and_chains(
    start_qemu: StartQemu, make_image: MakeImage
) -> None:
    base = make_image("base.qcow2")
    overlay = make_image("overlay.qcow2", backing=base)
    odd = make_image("odd.img", 1_000_448, "raw")
    qcow2, throttled, flash = make_image("n.qcow2"), make_image("t.qcow2"), make_image("f.img", "4M", "raw")
    qemu = await start_qemu(
        *("-drive", f"if=none,id=d0,file={overlay},format=qcow2", "-device", "virtio-blk,drive=d0,id=vb0"),
        *("-drive", f"if=virtio,file={odd},format=raw"),
        *("-drive", f"if=pflash,file={flash},format=raw"),
        *("-blockdev", f"driver=qcow2,node-name=top,file.driver=file,file.filename={qcow2}"),
        *("-device", "virtio-blk,drive=top"),
        *("-object", "throttle-group,id=tg"),
        *("-blockdev", f"driver=qcow2,node-name=under,file.driver=file,file.filename={throttled}"),
        *("-blockdev", "driver=throttle,node-name=over,throttle-group=tg,file=under"),
        *("-device", "virtio-blk,drive=over,id=slow"),
    )
    disks = await disks_of(qemu)
    assert set(disks) == {"d0", "virtio0", "pflash0", "top", "slow"}
    assert [layer.filename for layer in disks["d0"].layers] == [str(overlay), str(base)]
    assert disks["d0"].backing == Backing(str(base), str(base), "qcow2")
    assert disks["d0"].qdev == "/machine/peripheral/vb0/virtio-backend"
    assert (disks["virtio0"].size, disks["virtio0"].format, disks["virtio0"].backing) == (1_000_448, "raw", None)
    assert (disks["top"].node, disks["top"].device, disks["top"].cluster_size) == ("top", "", 65536)
    assert (disks["slow"].node, disks["slow"].format, disks["slow"].filename) == ("over", "qcow2", str(throttled))
    assert [(layer.node, layer.filter) for layer in disks["slow"].layers] == [("over", True), ("under", False)]
    assert not any(disk.encrypted for disk in disks.values())
    assert [disk.name for disk in select(await inventory(qemu.monitor), ["top", "d0"])] == ["d0", "top"]
    with pytest.raises(Refused, match="no disk 'x'; its disks are: d0, pflash0"):
        select(await inventory(qemu.monitor), ["x"])


async def test_a_disk_on_usb_is_known_by_the_id_of_its_device(start_qemu: StartQemu, make_image: MakeImage) -> None:
    """Its disk is a device of its own within the one that bears the id."""
    drive = f"if=none,id=d0,format=raw,file={make_image('usb.img', format='raw')}"
    qemu = await start_qemu("-drive", drive, "-device", "qemu-xhci", "-device", "usb-storage,drive=d0,id=stick")
    (disk,) = (await disks_of(qemu)).values()
    assert disk.qdev != "stick" and device_id(disk.qdev) == "stick"


async def test_encryption_within_qcow2_is_seen_and_in_which_layer(start_qemu: StartQemu, tmp_path: Path) -> None:
    create = f"cd {tmp_path} && qemu-img create -q --object secret,id=s,data=abc"
    qcow2 = f"{create} -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 e.qcow2 1M"
    # qemu-img gives up where a thread's CPU time stands still for a moment ("Unable to get accurate CPU usage").
    patiently = f"for n in 1 2 3 4 5 6 7 8; do ({qcow2}) && exit; done; exit 1"
    overlay = f"qemu-img create -q -f qcow2 -u -b e.qcow2 -F qcow2 {tmp_path}/top.qcow2 1M"
    await asyncio.to_thread(subprocess.run, f"({patiently}) && {overlay}", shell=True, check=True)
    at_rest = await describe(f"{tmp_path}/top.qcow2", "qcow2")
    assert [layer.encrypted for layer in at_rest.layers] == [False, True]
    qemu = await start_qemu(
        *SECRET,
        *(
            "-blockdev",
            "driver=qcow2,node-name=e,read-only=on,encrypt.format=luks,encrypt.key-secret=s,file.driver=file,"
            f"file.filename={tmp_path}/e.qcow2",
        ),
        *("-blockdev", f"driver=qcow2,node-name=top,backing=e,file.driver=file,file.filename={tmp_path}/top.qcow2"),
        *("-device", "virtio-blk,drive=top,id=e"),
    )
    (disk,) = (await disks_of(qemu)).values()
    assert (disk.format, disk.encrypted, [layer.encrypted for layer in disk.layers]) == ("qcow2", True, [False, True])


async def test_a_guest_without_drives_has_nothing_to_migrate() -> None:
    with pytest.raises(Refused, match="the guest has no drives"):
        select(Inventory((), ()), None)


@pytest.fixture
async def pair(start_qemu: StartQemu, make_image: MakeImage) -> Qemu:
    a, b = make_image("a.qcow2"), make_image("b.img", "8M", "raw")
    return await start_qemu(
        *("-device", "virtio-scsi,id=bus"),
        *("-drive", f"if=none,id=a,file={a},format=qcow2", "-device", "virtio-blk,drive=a,id=va"),
        *("-blockdev", f"driver=raw,node-name=b,file.driver=file,file.filename={b}"),
        *("-device", "scsi-hd,drive=b,id=sb"),
    )


async def backup(qemu: Qemu, target: Path) -> None:
    node = (await disks_of(qemu))["a"].node
    job = {"job-id": "job0", "device": node, "target": str(target), "sync": "full", "speed": 1, "format": "raw"}
    await qemu.io("a", "write 0 8M")
    await qemu.user.execute("drive-backup", job)


async def export(qemu: Qemu, name: str, node: str) -> None:
    address = {"type": "unix", "data": {"path": str(qemu.directory / "other.nbd")}}
    await qemu.user.execute("nbd-server-start", {"addr": address})
    await qemu.user.execute("block-export-add", {"type": "nbd", "id": name, "name": name, "node-name": node})


async def test_obstacles_are_told_in_words(pair: Qemu, tmp_path: Path) -> None:
    disks = (await inventory(pair.monitor)).disks
    assert await obstacles(pair.monitor, disks, ours="blkmig-mine") == []
    await export(pair, "other", "b")
    for name in ("blkmig-mine-b1", "blkmig-old-b7", "users-own"):
        await pair.user.execute("block-dirty-bitmap-add", {"node": "b", "name": name})
    await backup(pair, tmp_path / "backup.img")
    assert await obstacles(pair.monitor, disks, ours="blkmig-mine") == [
        "the block job job0 (backup) is running: let it end",
        "disk sb: somebody exports it (nbd export other)",
        "disk sb: job old of qemu-blkmig works on it, or was left behind (blkmig-old-b7); "
        "if it runs no more: qemu-blkmig cleanup old",
    ]


async def test_a_foreign_block_job_is_a_change(pair: Qemu, tmp_path: Path) -> None:
    topology = await Topology.snapshot(pair.monitor, (await inventory(pair.monitor)).disks)
    await topology.check()
    await backup(pair, tmp_path / "backup.img")
    with pytest.raises(TopologyChanged, match=r"block job job0 \(backup\)"):
        await topology.check()


async def test_a_foreign_export_is_a_change(pair: Qemu) -> None:
    topology = await Topology.snapshot(pair.monitor, (await inventory(pair.monitor)).disks)
    await export(pair, "other", "b")
    with pytest.raises(TopologyChanged, match=r"disk sb: somebody exports it \(nbd export other\)"):
        await topology.check()


async def test_a_resize_is_a_change(pair: Qemu) -> None:
    topology = await Topology.snapshot(pair.monitor, (await inventory(pair.monitor)).disks)
    await pair.user.execute("block_resize", {"device": "a", "size": 16 << 20})
    with pytest.raises(TopologyChanged, match="disk a: it was resized from 8388608 to 16777216 bytes"):
        await topology.check()


async def test_a_hot_plugged_disk_is_a_change(pair: Qemu, make_image: MakeImage) -> None:
    topology = await Topology.snapshot(pair.monitor, (await inventory(pair.monitor)).disks)
    file = {"driver": "file", "filename": str(make_image("new.img", "1M", "raw"))}
    await pair.user.execute("blockdev-add", {"driver": "raw", "node-name": "new", "file": file})
    await topology.check()
    await pair.user.execute("device_add", {"driver": "scsi-hd", "drive": "new", "id": "newdev", "bus": "bus.0"})
    with pytest.raises(TopologyChanged, match="disk new: it was hot-plugged"):
        await topology.check()


async def test_a_filter_put_above_the_disk_is_a_change(pair: Qemu) -> None:
    topology = await Topology.snapshot(pair.monitor, (await inventory(pair.monitor)).disks)
    await pair.user.execute("blockdev-add", {"driver": "copy-on-read", "node-name": "cor", "file": "b"})
    await topology.check()
    await pair.user.execute("qom-set", {"path": "sb", "property": "drive", "value": "cor"})
    with pytest.raises(TopologyChanged, match=r"disk sb: .*node cor"):
        await topology.check()


async def test_an_unplugged_disk_is_a_change(pair: Qemu) -> None:
    topology = await Topology.snapshot(pair.monitor, (await inventory(pair.monitor)).disks)
    with pair.user.events("DEVICE_DELETED") as events:
        await pair.user.execute("device_del", {"id": "sb"})
        while (await events.get(10)).data.get("device") != "sb":
            pass
    with pytest.raises(TopologyChanged, match="disk sb: it was unplugged"):
        await topology.check()


async def test_a_disk_that_was_left_out_may_change(pair: Qemu) -> None:
    topology = await Topology.snapshot(pair.monitor, select(await inventory(pair.monitor), ["sb"]))
    await pair.user.execute("block_resize", {"device": "a", "size": 16 << 20})
    await topology.check()


@pytest.mark.parametrize(
    "device",
    [
        ("-device", "virtio-blk,drive=a,id=x,iothread=io"),
        ("-device", "virtio-scsi,id=bus,iothread=io", "-device", "scsi-hd,drive=a,id=x,bus=bus.0"),
    ],
    ids=["virtio-blk", "virtio-scsi"],
)
async def test_a_disk_on_an_iothread_is_an_obstacle_where_exports_of_it_crash_qemu(
    start_qemu: StartQemu, make_image: MakeImage, device: tuple[str, ...]
) -> None:
    a, b = make_image("a.qcow2"), make_image("b.qcow2")
    drives = ("-drive", f"if=none,id=a,file={a},format=qcow2", "-drive", f"if=none,id=b,file={b},format=qcow2")
    qemu = await start_qemu("-object", "iothread,id=io", *drives, *device, "-device", "virtio-blk,drive=b")
    found = await obstacles(qemu.monitor, (await inventory(qemu.monitor)).disks, ours="blkmig-mine")
    safe = (await probe(qemu.monitor)).iothread_exports
    assert [text.split(",")[0] for text in found] == ([] if safe else ["disk a is on an iothread"])


async def test_a_real_qemu_lacks_nothing(start_qemu: StartQemu) -> None:
    qemu = await start_qemu()
    assert (await probe(qemu.monitor)).missing == ()


async def test_what_the_schema_does_not_hold_is_seen(start_qemu: StartQemu) -> None:
    qemu = await start_qemu()
    schema = Schema(await qemu.monitor.execute("query-qmp-schema"))
    assert schema.has("block-export-add", "nbd", "bitmaps")
    assert not schema.has("block-export-add", "nbd", "no-such-member")
    assert not schema.has("block-export-add", "no-such-branch", "bitmaps")
    assert not schema.has("transaction", "actions", "no-such-action")
    assert not schema.has("no-such-command")
