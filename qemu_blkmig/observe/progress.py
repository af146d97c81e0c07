"""The progress of a running job on stderr: a bar on a terminal, plain lines elsewhere, JSON objects for programs."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from qemu_blkmig.engine.migration import Figures
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.units import show_bytes, show_rate, show_seconds

INTERVAL = 0.2
"""Least seconds between two objects of figures in JSON."""


class Summary:
    """The latest that is known of a job, told in one line."""

    def __init__(self) -> None:
        self.stage = "prepare"
        self.figures: Figures | None = None
        self._moving: dict[str, int] = {}

    def update(self, figures: Figures) -> None:
        """New figures of the engine: what was under way is part of them now."""
        self.figures = figures
        self._moving.clear()

    def moving(self, disk: str, settled: int) -> None:
        """Bytes settled in the copy under way."""
        self._moving[disk] = settled

    @property
    def percent(self) -> float:
        """Percent of the bulk pass, the copy under way included."""
        if self.figures is None or not self.figures.total:
            return 0.0
        if self.stage != "bulk":
            return float(self.figures.percent)
        settled = sum(disk.bulk_done for disk in self.figures.disks) + sum(self._moving.values())
        return min(100.0, 100.0 * settled / self.figures.total)

    def details(self) -> str:
        """Speed, dirty rate and prediction, as far as they are known."""
        if self.figures is None:
            return ""
        parts = []
        if self.figures.speed is not None:
            parts.append(show_rate(self.figures.speed))
        if self.figures.dirty_rate is not None:
            parts.append(f"dirtied at {show_rate(self.figures.dirty_rate)}")
        if self.figures.predicted is not None:
            parts.append(f"predicted downtime {show_seconds(self.figures.predicted)}")
        if self.figures.round:
            parts.append(f"round {self.figures.round}")
        return ", ".join(parts)

    def line(self) -> str:
        """All of it in one line."""
        pending = f"{show_bytes(self.figures.pending)} pending" if self.figures else ""
        return ", ".join(part for part in (f"{self.stage} {self.percent:.0f} %", pending, self.details()) if part)


class Bar:
    """A bar on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.summary = Summary()
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[details]}"),
            console=Console(file=stream, stderr=True),
            expand=True,
        )
        self._task = self._progress.add_task("prepare", total=100, details="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str) -> None:
        """A phase begins."""
        self.summary.stage = name
        self._draw()

    def figures(self, figures: Figures) -> None:
        """The engine's figures changed."""
        self.summary.update(figures)
        self._draw()

    def moving(self, disk: str, settled: int) -> None:
        """Bytes settled in the copy under way."""
        self.summary.moving(disk, settled)
        self._draw()

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)

    def _draw(self) -> None:
        summary = self.summary
        self._progress.update(
            self._task, description=summary.stage, completed=summary.percent, details=summary.details()
        )


class Lines:
    """Plain lines: a phase's beginning, and notes."""

    def __init__(self, stream: TextIO) -> None:
        self.summary = Summary()
        self._stream = stream

    def stage(self, name: str) -> None:
        """A phase begins."""
        self.summary.stage = name
        self.note(self.summary.line())

    def figures(self, figures: Figures) -> None:
        """Kept for the next line."""
        self.summary.update(figures)

    def moving(self, disk: str, settled: int) -> None:
        """Kept for the next line."""
        self.summary.moving(disk, settled)

    def note(self, text: str) -> None:
        """One line; a reader that went away is no reason to fail."""
        with contextlib.suppress(OSError):
            print(text, file=self._stream, flush=True)


class Quiet(Lines):
    """Nothing but what was asked for (SIGUSR1)."""

    def stage(self, name: str) -> None:
        """Kept."""
        self.summary.stage = name

    def note(self, text: str) -> None:
        """Not shown."""


class JsonLines:
    """One JSON object a line: stage, figures (some five a second), note."""

    def __init__(self, stream: TextIO) -> None:
        self.summary = Summary()
        self._stream = stream
        self._last = 0.0

    def stage(self, name: str) -> None:
        """A phase begins."""
        self.summary.stage = name
        self._write(event="stage", stage=name)

    def figures(self, figures: Figures) -> None:
        """The engine's figures changed."""
        self.summary.update(figures)
        self._show()

    def moving(self, disk: str, settled: int) -> None:
        """Bytes settled in the copy under way."""
        self.summary.moving(disk, settled)
        self._show()

    def note(self, text: str) -> None:
        """Something the user should know."""
        self._write(event="note", text=text)

    def _show(self) -> None:
        now, figures = time.monotonic(), self.summary.figures
        if figures is None or now - self._last < INTERVAL:
            return
        self._last = now
        self._write(
            event="figures",
            stage=self.summary.stage,
            percent=round(self.summary.percent, 1),
            total=figures.total,
            pending=figures.pending,
            round=figures.round,
            speed=figures.speed,
            dirty_rate=figures.dirty_rate,
            predicted_downtime=figures.predicted,
        )

    def _write(self, **fields: object) -> None:
        with contextlib.suppress(OSError):
            print(json.dumps({"time": time.time(), **fields}), file=self._stream, flush=True)


@contextlib.contextmanager
def progress(kind: str, stream: TextIO | None = None) -> Iterator[Reporter]:
    """The display of `kind` (auto, bar, json, none) on `stream` (stderr); SIGUSR1 prints the status at any time."""
    stream = stream or sys.stderr
    display: Bar | Lines | JsonLines
    if kind == "bar" or (kind == "auto" and stream.isatty()):
        display = Bar(stream)
    elif kind == "json":
        display = JsonLines(stream)
    else:
        display = Quiet(stream) if kind == "none" else Lines(stream)

    def tell_status(*_: object) -> None:
        print(display.summary.line(), file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGUSR1, tell_status)
    try:
        with display if isinstance(display, Bar) else contextlib.nullcontext():
            yield display
    finally:
        signal.signal(signal.SIGUSR1, before)
