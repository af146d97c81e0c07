"""Slowing a guest's writes by QEMU's throttle, and giving back what it had."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from qemu_blkmig.qmp.disks import inventory
from qemu_blkmig.qmp.features import Schema
from qemu_blkmig.qmp.throttle import Throttled, check_can_throttle, limits, restore, slow_writes, slowed, written
from tests.qmp.conftest import MakeImage, Qemu, StartQemu

OWN = "throttling.bps-write=1000000,throttling.bps-write-max=5000000,throttling.bps-write-max-length=3"
OWN += ",throttling.iops-size=4096,throttling.iops-total=77,throttling.group=shared"


async def told(qemu: Qemu) -> dict[str, dict[str, Any]]:
    """What QEMU itself tells of each drive's throttle."""
    return {
        drive["inserted"]["file"].rpartition("/")[2]: {
            key: value for key, value in drive["inserted"].items() if key.startswith(("bps", "iops", "group")) and value
        }
        for drive in await qemu.user.execute("query-block")
    }


async def slow_all(qemu: Qemu) -> list[Throttled]:
    """Slow the writes to all disks; what they had, and how far they are slowed."""
    had = await limits(qemu.monitor, (await inventory(qemu.monitor)).disks)
    for disk in had:
        await slow_writes(qemu.monitor, disk, 123456, "ours")
    return [disk.slower(123456) for disk in had]


@pytest.fixture
async def throttled(start_qemu: StartQemu, make_image: MakeImage) -> Qemu:
    """Three disks: one without limits, two that share a group that has some."""
    images = [make_image(name, format="raw") for name in ("free", "first", "second")]
    arguments = ["-blockdev", f"raw,node-name=n0,file.driver=file,file.filename={images[0]}"]
    arguments += ["-device", "virtio-blk-pci,drive=n0,id=d0"]
    for number in (1, 2):
        arguments += ["-drive", f"if=none,id=dr{number},file={images[number]},format=raw,{OWN}"]
        arguments += ["-device", f"virtio-blk-pci,drive=dr{number}" + (",id=d2" if number == 2 else "")]
    return await start_qemu(*arguments)


async def test_writes_are_slowed_and_nothing_else_and_then_all_is_as_it_was(throttled: Qemu) -> None:
    before = await told(throttled)
    had = await slow_all(throttled)
    slow = await told(throttled)
    assert slow["free"] == {"bps_wr": 123456, "group": "ours"}
    assert slow["first"] == slow["second"] == {"bps_wr": 123456, "iops": 77, "iops_size": 4096, "group": "shared"}
    for disks in (had, had, [replace(disk, rates=()) for disk in had]):
        assert await restore(throttled.monitor, disks) == []
        assert await told(throttled) == before


async def test_limits_that_somebody_else_has_set_meanwhile_stay(throttled: Qemu) -> None:
    before = await told(throttled)
    had = await slow_all(throttled)
    (free,) = (disk for disk in had if disk.group is None)
    theirs = {**dict.fromkeys(("bps", "bps_rd", "iops", "iops_rd", "iops_wr"), 0), "bps_wr": 654321}
    await throttled.user.execute("block_set_io_throttle", {**theirs, "id": free.qdev})
    assert await restore(throttled.monitor, had) == [free.name]
    after = await told(throttled)
    assert after.pop("free")["bps_wr"] == 654321
    assert after == {name: before[name] for name in after}


async def test_a_disk_that_was_unplugged_meanwhile_needs_nothing_back(throttled: Qemu) -> None:
    before = await told(throttled)
    had = await slow_all(throttled)
    gone = [disk if disk.group else replace(disk, qdev="/machine/peripheral/gone") for disk in had]
    await restore(throttled.monitor, gone)
    assert (await told(throttled))["second"] == before["second"]


async def test_what_was_written_is_told_by_device(throttled: Qemu) -> None:
    disks = (await inventory(throttled.monitor)).disks
    assert {disk.qdev for disk in disks} <= set(await written(throttled.monitor))
    await check_can_throttle(throttled.monitor)
    assert not Schema(await throttled.monitor.execute("query-qmp-schema")).has("block_set_io_throttle", "nothing")


@pytest.mark.parametrize(
    ("had", "now"),
    [
        ({}, {"bps": 0, "bps_rd": 0, "bps_wr": 100}),
        ({"bps": 1000, "bps_max": 5000, "iops": 3}, {"bps": 0, "bps_rd": 900, "bps_wr": 100, "iops": 3}),
        ({"bps_wr": 50, "bps_wr_max": 70}, {"bps": 0, "bps_rd": 0, "bps_wr": 50}),
        ({"bps_rd": 50, "bps_rd_max": 70, "bps_wr": 0}, {"bps": 0, "bps_rd": 50, "bps_rd_max": 70, "bps_wr": 100}),
    ],
)
def test_a_guest_never_gets_more_than_it_had(had: dict[str, int | str], now: dict[str, int | str]) -> None:
    assert slowed(had, 100) == now
