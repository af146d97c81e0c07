"""The latest that is known of a running job, and what is told of it in a line."""

from __future__ import annotations

import time
from collections.abc import Callable

from qemu_blkmig.engine.average import Average
from qemu_blkmig.engine.migration import DiskFigures, Figures
from qemu_blkmig.units import show_bytes, show_rate, show_seconds

LEAST_BAR, MOST_BAR = 8, 42
"""Columns of the bar, its brackets included in the first."""


class Summary:
    """The latest that is known of a job, told in one line."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.job: str | None = None
        self.stage = "prepare"
        self.figures: Figures | None = None
        self.downtime: float | None = None
        self.rate: int | None = None
        self.now = now
        self.begun = self.entered = now()
        self._average: Average | None = None
        self._moving: dict[str, int] = {}

    def begin(self, job: str) -> None:
        """A job of this name begins, or is gone on with: nothing is known of it yet."""
        self.job, self.figures, self._average, self._moving = job, None, None, {}

    def enter(self, stage: str) -> None:
        """A phase begins."""
        self.stage, self.entered = stage, self.now()

    def limits(self, downtime: float, rate: int | None) -> None:
        """The limits in force."""
        self.downtime, self.rate = downtime, rate

    def update(self, figures: Figures) -> None:
        """New figures of the engine: what was under way is part of them now."""
        self.figures = figures
        self._moving = {}
        if self._average is None:
            self._average = Average(self.now(), self._settled)

    def moving(self, disk: str, settled: int) -> None:
        """Bytes settled in the copy under way."""
        self._moving[disk] = settled

    @property
    def percent(self) -> float | None:
        """Percent of the bulk pass, the copy under way included; None before it, and after it."""
        if self.stage != "bulk" or self.figures is None or not self.figures.total:
            return None
        return min(100.0, 100.0 * self._settled / self.figures.total)

    def first_pass(self, disk: DiskFigures) -> int:
        """Bytes of a disk that the first pass has settled, the copy under way included."""
        return min(disk.size, disk.bulk_done + (self._moving.get(disk.name, 0) if self.stage == "bulk" else 0))

    @property
    def pending(self) -> int | None:
        """Bytes that still have to be brought over, as far as it is known; RAM's are not among them."""
        if self.figures is None:
            return None
        return max(0, self.figures.pending - (sum(self._moving.values()) if self.stage == "bulk" else 0))

    @property
    def speed(self) -> float | None:
        """Bytes a second: as the engine measured it, before that what the bulk pass has settled on average."""
        if self.figures is None or self._average is None:
            return None
        if self.figures.speed is not None:
            return self.figures.speed
        return self._average.until(self.now(), self._settled)

    @property
    def _settled(self) -> int:
        bulk = sum(disk.bulk_done for disk in self.figures.disks) if self.figures else 0
        return bulk + sum(self._moving.values())

    def details(self) -> list[str]:
        """What is known beside stage and percent, the more important first; prediction and round from the rounds on."""
        figures, parts = self.figures, []
        if figures is None or self.stage == "prepare":
            return []
        if self.speed is not None:
            parts.append(show_rate(self.speed))
        if self.stage != "bulk" and figures.predicted is not None:
            parts.append(f"predicted downtime {show_seconds(figures.predicted)}{show_outlook(figures)}")
        if figures.dirty_rate is not None:
            parts.append(f"dirtied at {show_rate(figures.dirty_rate)}")
        if self.pending:
            parts.append(f"{show_bytes(self.pending)} pending")
        if self.stage != "bulk" and figures.round:
            parts.append(f"round {figures.round}")
        return parts

    def line(self) -> str:
        """All of it in one line."""
        percent = "" if self.percent is None else f" {self.percent:.0f} %"
        return ", ".join([f"{self.stage}{percent}", *self.details()])

    def bar(self, width: int) -> str:
        """All of it that fits in `width` columns: stage, bar, percent, then the details in the order of their weight.

        The bar shows the bulk pass: it is empty before that, and full after it.
        """
        done = self.percent if self.percent is not None else (0.0 if self.figures is None else 100.0)
        head, tail = f"{self.stage:<10} ", f" {done:3.0f} %"
        room = width - len(head) - len(tail) - LEAST_BAR
        for part in self.details():
            if len(part) + 2 > room:
                break
            tail += f"  {part}"
            room -= len(part) + 2
        columns = min(MOST_BAR, max(0, width - len(head) - len(tail)) - 2)
        if columns < 1:
            return (head + tail.strip())[:width]
        filled = int(columns * done / 100)
        return f"{head}[{'=' * filled}{' ' * (columns - filled)}]{tail}"


def show_outlook(figures: Figures) -> str:
    """When the last round will fit, if not yet, and what is known of the worth of that."""
    if not figures.converges_in:
        return ""
    sure = "" if figures.confidence is None else f", confidence {figures.confidence:.0%}"
    return f" (fits in about {show_seconds(figures.converges_in)}{sure})"
