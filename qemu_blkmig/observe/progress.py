"""The progress of a running job on stderr: figures on a terminal, plain lines elsewhere, JSON objects for programs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TextIO

import msgspec

from qemu_blkmig.engine.migration import Figures
from qemu_blkmig.job.reporting import STANDBY, Reporter
from qemu_blkmig.observe.events import (
    DiskEvent,
    Event,
    FiguresEvent,
    JobEvent,
    LimitsEvent,
    NoteEvent,
    StageEvent,
    utf8,
)
from qemu_blkmig.observe.summary import Summary
from qemu_blkmig.observe.terminal import Terminal
from qemu_blkmig.outlet import Outlet

INTERVAL = 0.2
"""Least seconds between two objects of figures in JSON."""
MINUTE = 60.0
"""Seconds between two plain lines while the switchover waits."""


class Lines:
    """Plain lines: a phase's beginning, and notes; while the switchover waits, a line a minute."""

    def __init__(self, outlet: Outlet) -> None:
        self.summary = Summary()
        self._outlet = outlet
        self._told = 0.0

    def job(self, name: str) -> None:
        """Not shown."""
        self.summary.begin(name)

    def limits(self, downtime: float, rate: int | None) -> None:
        """The limits in force."""
        self.summary.limits(downtime, rate)

    def stage(self, name: str) -> None:
        """A phase begins."""
        self.summary.enter(name)
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
        """One line."""
        self._outlet.tell(text)


class Quiet(Lines):
    """Nothing but what was asked for (SIGUSR1)."""

    def stage(self, name: str) -> None:
        """Kept."""
        self.summary.enter(name)

    def note(self, text: str) -> None:
        """Not shown."""


class JsonLines:
    """One JSON object a line: `observe.events`."""

    def __init__(self, outlet: Outlet) -> None:
        self.summary = Summary()
        self._outlet = outlet
        self._last = 0.0

    def job(self, name: str) -> None:
        """The job's name, which other commands take."""
        self.summary.begin(name)
        self._tell(JobEvent(time=time.time(), job=name))

    def limits(self, downtime: float, rate: int | None) -> None:
        """The limits in force."""
        self.summary.limits(downtime, rate)
        self._tell(LimitsEvent(time=time.time(), downtime=downtime, bandwidth=rate))

    def stage(self, name: str) -> None:
        """A phase begins."""
        self.summary.enter(name)
        self._tell(StageEvent(time=time.time(), stage=name))

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
        self._tell(NoteEvent(time=time.time(), text=utf8(text)))

    def _show(self) -> None:
        now, figures, percent = time.monotonic(), self.summary.figures, self.summary.percent
        if figures is None or now - self._last < INTERVAL:
            return
        self._last = now
        event = FiguresEvent(
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
        # Who reads slowly gets the latest of them.
        self._outlet.pass_by(msgspec.json.encode(event).decode())

    def _tell(self, event: Event) -> None:
        self._outlet.tell(msgspec.json.encode(event).decode())


@contextlib.contextmanager
def progress(kind: str, stream: TextIO | None = None) -> Iterator[Reporter]:
    """The display of `kind` (auto, bar, json, none) on `stream` (stderr); SIGUSR1 prints the status at any time.

    Nothing that is told to it waits for whoever reads, nor does what is logged meanwhile.
    """
    stream = stream or sys.stderr
    if kind == "bar" or (kind == "auto" and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"):
        with Terminal(stream) as display, _listening(display.outlet, display.summary):
            yield display
        return
    outlet = Outlet(stream)
    kinds: dict[str, type[Lines | JsonLines]] = {"json": JsonLines, "none": Quiet}
    lines = kinds.get(kind, Lines)(outlet)
    try:
        with _listening(outlet, lines.summary):
            yield lines
    finally:
        outlet.close()


@contextlib.contextmanager
def _listening(outlet: Outlet, summary: Summary) -> Iterator[None]:
    """Tell the status at SIGUSR1, and pass on what is logged."""
    streaming = (each for each in logging.getLogger().handlers if isinstance(each, logging.StreamHandler))
    handlers = [each for each in streaming if each.stream is sys.stderr]
    for handler in handlers:
        handler.setStream(outlet)
    before = signal.signal(signal.SIGUSR1, lambda *_: outlet.tell(summary.line()))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
        for handler in handlers:
            handler.setStream(sys.stderr)
