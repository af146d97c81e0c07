"""What a job has to show for itself: plain data, the same for people and for programs."""

from __future__ import annotations

import msgspec


class DiskResult(msgspec.Struct, frozen=True):
    """One disk; sizes in bytes. `copied`, `zeroed`, `skipped`: all passes together; `rounds`: dirty rounds."""

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


class Downtime(msgspec.Struct, frozen=True):
    """Seconds that the guest stood still.

    `disk`: for the last round, flush and close; `verify`: for comparing; `ram`: for RAM and device state, all the rest.
    """

    total: float
    disk: float
    verify: float
    ram: float


class Result(msgspec.Struct, frozen=True):
    """What was done. `guest`: who runs the guest now, in words. `phases`: seconds by phase, in order."""

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
    serving: int | None = None
    """Process id of the QEMU that has the guest now, where it is known."""
