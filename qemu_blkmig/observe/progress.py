"""The progress of a running job on stderr: a bar on a terminal, plain lines elsewhere, JSON objects for programs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import msgspec

from qemu_blkmig.engine.migration import DiskFigures, Figures
from qemu_blkmig.job.reporting import STANDBY, Reporter
from qemu_blkmig.observe.events import (
    DiskEvent,
    Event,
    FiguresEvent,
    JobEvent,
    LimitsEvent,
    NoteEvent,
    StageEvent,
)
from qemu_blkmig.units import show_bytes, show_rate, show_seconds

INTERVAL = 0.2
"""Least seconds between two objects of figures in JSON."""
LEAST_MEASURED = 0.5
"""Seconds of copying that an average speed is told after."""
LEAST_BAR, MOST_BAR = 8, 42
"""Columns of the bar, its brackets included in the first."""
MINUTE = 60.0
"""Seconds between two plain lines while the switchover waits."""
ERASE = "\r\x1b[K"
"""To the line's beginning, and what stands there away."""


class Summary:
    """The latest that is known of a job, told in one line."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.stage = "prepare"
        self.figures: Figures | None = None
        self.downtime: float | None = None
        self.rate: int | None = None
        self._now = now
        self._began: float | None = None
        self._moving: dict[str, int] = {}

    def limits(self, downtime: float, rate: int | None) -> None:
        """The limits in force."""
        self.downtime, self.rate = downtime, rate

    def update(self, figures: Figures) -> None:
        """New figures of the engine: what was under way is part of them now."""
        self.figures = figures
        self._moving.clear()
        if self._began is None:
            self._began = self._now()

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
        if self.figures is None or self._began is None:
            return None
        if self.figures.speed is not None:
            return self.figures.speed
        elapsed = self._now() - self._began
        return self._settled / elapsed if elapsed >= LEAST_MEASURED and self._settled else None

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


class Bar:
    """A bar on a terminal: its last line, drawn anew in place.

    It leaves the cursor visible and the terminal as it is, so that nothing has to be restored, whatever ends us.
    """

    def __init__(self, stream: TextIO, width: Callable[[], int] | None = None) -> None:
        self.summary = Summary()
        self._stream = stream
        self._width = width or (lambda: shutil.get_terminal_size().columns)
        self._drawn = 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._draw()
        self._write("\n")

    def job(self, name: str) -> None:
        """Not shown."""

    def limits(self, downtime: float, rate: int | None) -> None:
        """The limits in force."""
        self.summary.limits(downtime, rate)

    def stage(self, name: str) -> None:
        """A phase begins."""
        self.summary.stage = name
        self._draw()

    def figures(self, figures: Figures) -> None:
        """The engine's figures changed."""
        self.summary.update(figures)
        self._draw_sometimes()

    def moving(self, disk: str, settled: int) -> None:
        """Bytes settled in the copy under way."""
        self.summary.moving(disk, settled)
        self._draw_sometimes()

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._write(f"{ERASE}{text}\n")
        self._draw()

    def _draw_sometimes(self) -> None:
        if time.monotonic() - self._drawn >= INTERVAL / 2:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        # The last column stays free: some terminals wrap when it is written.
        self._write(f"{ERASE}{self.summary.bar(self._width() - 1)}")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


class Lines:
    """Plain lines: a phase's beginning, and notes; while the switchover waits, a line a minute."""

    def __init__(self, stream: TextIO) -> None:
        self.summary = Summary()
        self._stream = stream
        self._told = 0.0

    def job(self, name: str) -> None:
        """Not shown."""

    def limits(self, downtime: float, rate: int | None) -> None:
        """The limits in force."""
        self.summary.limits(downtime, rate)

    def stage(self, name: str) -> None:
        """A phase begins."""
        self.summary.stage = name
        self._told = time.monotonic()
        self.note(self.summary.line())

    def figures(self, figures: Figures) -> None:
        """Kept for the next line."""
        self.summary.update(figures)
        if self.summary.stage == STANDBY and time.monotonic() - self._told >= MINUTE:
            self._told = time.monotonic()
            self.note(self.summary.line())

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
    """One JSON object a line: `observe.events`."""

    def __init__(self, stream: TextIO) -> None:
        self.summary = Summary()
        self._stream = stream
        self._last = 0.0

    def job(self, name: str) -> None:
        """The job's name, which other commands take."""
        self._write(JobEvent(time=time.time(), job=name))

    def limits(self, downtime: float, rate: int | None) -> None:
        """The limits in force."""
        self.summary.limits(downtime, rate)
        self._write(LimitsEvent(time=time.time(), downtime=downtime, bandwidth=rate))

    def stage(self, name: str) -> None:
        """A phase begins."""
        self.summary.stage = name
        self._write(StageEvent(time=time.time(), stage=name))

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
        self._write(NoteEvent(time=time.time(), text=text))

    def _show(self) -> None:
        now, figures, percent = time.monotonic(), self.summary.figures, self.summary.percent
        if figures is None or now - self._last < INTERVAL:
            return
        self._last = now
        self._write(
            FiguresEvent(
                time=time.time(),
                stage=self.summary.stage,
                percent=round(100.0 if percent is None else percent, 1),
                total=figures.total,
                pending=self.summary.pending,
                round=figures.round,
                speed=self.summary.speed,
                dirty_rate=figures.dirty_rate,
                predicted_downtime=figures.predicted,
                converges_in=figures.converges_in,
                confidence=figures.confidence,
                put_off=sum(disk.put_off for disk in figures.disks),
                disks=[
                    DiskEvent(
                        name=disk.name,
                        size=disk.size,
                        first_pass=self.summary.first_pass(disk),
                        copied=disk.copied,
                        zeroed=disk.zeroed,
                        skipped=disk.skipped,
                        dirty=disk.dirty,
                        rounds=disk.rounds,
                    )
                    for disk in figures.disks
                ],
            )
        )

    def _write(self, event: Event) -> None:
        with contextlib.suppress(OSError):
            print(msgspec.json.encode(event).decode(), file=self._stream, flush=True)


@contextlib.contextmanager
def progress(kind: str, stream: TextIO | None = None) -> Iterator[Reporter]:
    """The display of `kind` (auto, bar, json, none) on `stream` (stderr); SIGUSR1 prints the status at any time."""
    stream = stream or sys.stderr
    display: Bar | Lines | JsonLines
    if kind == "bar" or (kind == "auto" and stream.isatty() and os.environ.get("TERM") != "dumb"):
        display = Bar(stream)
    elif kind == "json":
        display = JsonLines(stream)
    else:
        display = Quiet(stream) if kind == "none" else Lines(stream)

    def tell_status(*_: object) -> None:
        # RuntimeError: it came within a write to the same stream.
        with contextlib.suppress(OSError, RuntimeError):
            if isinstance(display, Bar):
                display.note(display.summary.line())
            else:
                print(display.summary.line(), file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGUSR1, tell_status)
    try:
        with display if isinstance(display, Bar) else contextlib.nullcontext():
            yield display
    finally:
        signal.signal(signal.SIGUSR1, before)
