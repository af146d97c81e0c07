"""What a job has to show for itself: plain data, the same for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from qemu_blkmig.units import show_seconds


class DiskResult(msgspec.Struct, frozen=True):
    """One disk; sizes in bytes. `copied`, `zeroed`, `skipped`: all passes together; `rounds`: dirty rounds.

    `copied_dirty`: the part of `copied` that the rounds had. `resumed`: what had been brought over, by the first pass,
    before the job was resumed.
    """

    name: str
    source: str
    destination: str
    format: str
    virtual_size: int
    allocated: int
    copied: int
    zeroed: int
    skipped: int
    rounds: int
    copied_dirty: int = 0
    resumed: int = 0


class Downtime(msgspec.Struct, frozen=True):
    """Seconds that the guest stood still.

    `disk`: for the last round, flush and close; `verify`: for reading back or comparing; `ram`: for RAM and device
    state, all the rest. `steps`: the same in more detail, in order, as the coordinator saw it.
    """

    total: float
    disk: float
    verify: float
    ram: float
    steps: dict[str, float] = {}


class Slowed(msgspec.Struct, frozen=True):
    """A disk whose guest was slowed (`--on-stall throttle`): bytes a second that it `wrote` before, and might write in
    the end (`limit`), and for how many `seconds`."""

    disk: str
    wrote: float
    limit: float
    seconds: float


def remarks(downtime: Downtime | None, wanted: float) -> Iterator[str]:
    """What is to be said of a pause of the guest that was to last `wanted` seconds."""
    if downtime is not None and downtime.total > wanted:
        yield (
            f"the guest stood still for {show_seconds(downtime.total)}, longer than --downtime "
            f"({show_seconds(wanted)}): disks {show_seconds(downtime.disk)}, verification "
            f"{show_seconds(downtime.verify)}, RAM and devices {show_seconds(downtime.ram)}"
        )


class Result(msgspec.Struct, frozen=True):
    """What was done. `guest`: who runs the guest now, in words. `phases`: seconds by phase, in order.

    `verified`: "none", "written" (what was read at the source is what lies at the destination) or "full" (and nothing
    was missed). `read_back`, `mended`: bytes that the destination read back, and of them those that were not as they
    had been written and were copied again.
    """

    job: str
    outcome: str
    guest: str
    disks: list[DiskResult]
    total_copied: int
    phases: dict[str, float]
    downtime: Downtime | None
    verified: str
    warnings: list[str]
    consistency: str | None = None
    slowed: list[Slowed] = []
    read_back: int = 0
    mended: int = 0
    serving: int | None = None
    """Process id of the QEMU that has the guest now, where it is known."""
