"""What a running job tells whoever watches: implemented by the progress displays in `observe`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from qemu_blkmig.engine.migration import Figures
from qemu_blkmig.engine.ports import Clock

STANDBY = "standby"
"""The phase in which the disks are kept in step until somebody says that the guest may move."""


class Reporter(Protocol):
    """Called from the job's event loop; must not block."""

    def job(self, name: str) -> None:
        """A job begins, or is gone on with, by this name; what the engine counts begins anew."""

    def limits(self, downtime: float, rate: int | None) -> None:
        """In force from now on: seconds that the guest may stand still, bytes a second (None: no limit)."""

    def stage(self, name: str) -> None:
        """A phase begins: prepare, waiting (for a slot), bulk, standby, dirty, ram, switchover, verify, handover."""

    def figures(self, figures: Figures) -> None:
        """The engine's figures changed."""

    def moving(self, disk: str, settled: int) -> None:
        """Within the copy under way, `settled` bytes of `disk` are done."""

    def note(self, text: str) -> None:
        """Something the user should know."""


class Stopwatch:
    """Seconds by phase, told by `clock`; phases follow each other, one that comes again is added up.

    `steps`: seconds by what a guest stands still for, in the last pause.
    """

    def __init__(self, clock: Clock, reporter: Reporter) -> None:
        self.clock = clock
        self._reporter = reporter
        self.phases: dict[str, float] = {}
        self.steps: dict[str, float] = {}
        self._stepped = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done inside, and tell the reporter that it begins."""
        self._reporter.stage(name)
        began = self.clock.now()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + self.clock.now() - began

    def paused(self, since: float) -> None:
        """The guest stands still since then; `step` tells what for."""
        self.steps = {}
        self._stepped = since

    def step(self, name: str) -> None:
        """The time since the last step went into this."""
        now = self.clock.now()
        self.steps[name] = self.steps.get(name, 0.0) + now - self._stepped
        self._stepped = now
