"""Figures of an engine, as the tests need them."""

from __future__ import annotations

from qemu_blkmig.engine.migration import DiskFigures, Figures, Phase

MIB = 1 << 20


def disk(name: str = "vda", size: int = 100 * MIB, **more: int) -> DiskFigures:
    known = dict.fromkeys(("copied", "zeroed", "skipped", "rounds", "bulk_done", "dirty", "copied_dirty"), 0)
    return DiskFigures(name, size, **(known | more))


def figures(*disks: DiskFigures, pending: int = 100 * MIB, round: int = 0, **more: float | None) -> Figures:
    measured: dict[str, float | None] = {"speed": None, "dirty_rate": None, "predicted": None}
    disks = disks or (disk(),)
    total = sum(each.size for each in disks)
    return Figures(Phase.BULK, 0, total, pending, disks, round=round, **(measured | more))
