"""How long a guest's requests to its disks take, as QEMU counts it (query-blockstats; QEMU's block-core.json)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from qemu_blkmig.qmp.monitor import Monitor

_KINDS = ("rd", "wr", "flush")


@dataclass(frozen=True, slots=True)
class Served:
    """Requests that were answered since the guest began, and the seconds that they took together."""

    requests: int
    seconds: float


async def served(monitor: Monitor, devices: Collection[str]) -> Served:
    """What the disks of these devices have answered: reads, writes and flushes together."""
    found = [
        entry["stats"] for entry in await monitor.execute("query-blockstats") if entry.get("qdev") in devices
    ]  # fmt: skip
    return Served(
        sum(each[f"{kind}_operations"] for each in found for kind in _KINDS),
        sum(each[f"{kind}_total_time_ns"] for each in found for kind in _KINDS) / 1e9,
    )
