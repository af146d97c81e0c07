"""QEMU's own throttle of a disk (block_set_io_throttle; QEMU's block-core.json): what it is, and slowing writes by it.

It sits between the guest's device and the block layer, so it is nobody's but the device's: limits of a `throttle`
filter among the nodes stay what they are. Disks of one throttle group share its limits; whoever changes those of one
disk changes the group's. None of it is part of a migration: the destination's command line decides there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from qemu_blkmig.errors import Refused
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.qmp.features import schema_of
from qemu_blkmig.qmp.monitor import Monitor

LEAST = 64 << 10
"""Bytes a second that a guest may always write."""

_RATES = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
_MEMBERS = (*_RATES, *(f"{rate}_{part}" for rate in _RATES for part in ("max", "max_length")), "iops_size", "group")


class Throttled(msgspec.Struct, frozen=True):
    """A disk and the limits that it has but for us, as block_set_io_throttle takes them. `qdev`: its device.

    `rates`: bytes a second that we have made its writes keep to, or are about to.
    """

    name: str
    qdev: str
    limits: dict[str, int | str]
    rates: tuple[int, ...] = ()

    @property
    def group(self) -> str | None:
        """The throttle group that it is in."""
        group = self.limits.get("group")
        return None if group is None else str(group)

    def slower(self, rate: int) -> Throttled:
        """The same disk, about to be slowed to `rate`."""
        return msgspec.structs.replace(self, rates=(*self.rates, rate))

    def explains(self, now: Throttled) -> bool:
        """Whether what it has `now` is its own, or our doing; else somebody else has changed it meanwhile."""
        return now.limits == self.limits or self.is_slowed(now)

    def is_slowed(self, now: Throttled) -> bool:
        """Whether what its writes keep to `now` is our doing: then it must not stay.

        It may be where the job's record, an older one, does not tell.
        """
        ours = [slowed(self.limits, rate)["bps_wr"] for rate in self.rates]
        return not ours or now.limits.get("bps_wr") in ours


async def check_can_throttle(monitor: Monitor) -> None:
    """Raise `Refused` where this QEMU cannot throttle a disk that is named by its device."""
    if not (await schema_of(monitor)).has("block_set_io_throttle", "id"):
        raise Refused("--on-stall throttle: this QEMU cannot throttle a disk (block_set_io_throttle)")


async def limits(monitor: Monitor, disks: Sequence[Disk]) -> list[Throttled]:
    """The limits that the disks have now."""
    drives = {drive.get("qdev"): drive for drive in await monitor.execute("query-block")}
    return [_throttled(disk.name, disk.qdev, drives.get(disk.qdev, {}).get("inserted", {})) for disk in disks]


def _throttled(name: str, qdev: str, inserted: Mapping[str, Any]) -> Throttled:
    return Throttled(name, qdev, {key: inserted[key] for key in _MEMBERS if key in inserted})


@dataclass(frozen=True, slots=True)
class Written:
    """What a guest has written to a disk: bytes, in so many requests."""

    length: int
    requests: int


async def written(monitor: Monitor) -> dict[str, Written]:
    """What the guest has written since it began, by its device."""
    statistics = await monitor.execute("query-blockstats")
    return {
        entry["qdev"]: Written(entry["stats"]["wr_bytes"], entry["stats"]["wr_operations"])
        for entry in statistics
        if "qdev" in entry
    }


async def slow_writes(monitor: Monitor, disk: Throttled, rate: int, group: str) -> None:
    """Have the guest write at most `rate` bytes a second to the disk, and otherwise what it may anyway.

    `group`: a name for the disk's throttle group, if it is in none. Raises what `Monitor.execute` raises.
    """
    own = {} if disk.group is not None else {"group": group}
    await _set(monitor, disk.qdev, {**slowed(disk.limits, rate), **own})


async def restore(monitor: Monitor, disks: Sequence[Throttled]) -> list[str]:
    """Give the disks those limits again; one that the guest has no more needs none. Raises what `execute` raises.

    Returns the names of those that somebody else has given others meanwhile, which stay.
    """
    drives = {
        drive.get("qdev"): drive["inserted"] for drive in await monitor.execute("query-block") if "inserted" in drive
    }
    left = []
    for disk in disks:
        if disk.qdev not in drives:
            continue
        now = _throttled(disk.name, disk.qdev, drives[disk.qdev])
        if disk.is_slowed(now):
            await _set(monitor, disk.qdev, disk.limits)
        elif not disk.explains(now):
            left.append(disk.name)
    return left


def slowed(limits: Mapping[str, int | str], rate: int) -> dict[str, int | str]:
    """`limits`, but for writes at most `rate` bytes a second, without bursts.

    QEMU takes a limit of both directions together or one for each: then reads get what writes leave of it.
    """
    changed = {key: value for key, value in limits.items() if key != "group" and not key.startswith("bps")}
    total, reads, writes = (int(limits.get(key, 0)) for key in ("bps", "bps_rd", "bps_wr"))
    rate = min(limit for limit in (rate, total, writes) if limit)
    if total:
        reads = max(1, total - rate)
    else:
        changed |= {key: value for key, value in limits.items() if key.startswith("bps_rd_")}
    return {**changed, "bps": 0, "bps_rd": reads, "bps_wr": rate}


async def _set(monitor: Monitor, qdev: str, limits: Mapping[str, Any]) -> None:
    await monitor.execute("block_set_io_throttle", {**dict.fromkeys(_RATES, 0), **limits, "id": qdev})
