"""What a running job tells, to the display and to its journal alike; and the latest of it, for whoever asks."""

from __future__ import annotations

import time

from qemu_blkmig.engine.average import Average
from qemu_blkmig.engine.migration import Figures
from qemu_blkmig.job.diskmap import Maps
from qemu_blkmig.job.journal import Journal
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.steering import Steering

SAMPLE = (0.2, 1.0)
"""Least seconds between two samples in the journal: at first, and when a job has lasted for minutes."""
SHORT = 240
"""Samples that a job of any length begins with, before they become seldom."""
MAPS = 5.0
"""Least seconds between two maps in the journal."""
STILL = ("switchover", "verify", "handover")
"""Phases in which a guest may stand still: no more is noted in them than their beginning."""


class Telling:
    """Implements `Reporter`: passes everything on, and keeps the journal. `phase`, `since` (seconds since 1970),
    `latest` and `moved` (bytes settled in the copy under way, by disk) are what `status` shows. `maps`: of what is
    copied."""

    def __init__(self, reporter: Reporter, journal: Journal, steering: Steering) -> None:
        self._reporter = reporter
        self._journal = journal
        self._steering = steering
        self._sampled = self._mapped = 0.0
        self.maps = Maps(journal.map)
        self._round = 0
        self._copied_dirty = 0
        self.phase = "prepare"
        self.since = time.time()
        self.latest: Figures | None = None
        self.moved: dict[str, int] = {}
        self._average: Average | None = None
        self.last_note: str | None = None

    def job(self, name: str) -> None:
        """The job's name."""
        self._reporter.job(name)

    def limits(self, downtime: float, rate: int | None) -> None:
        """The limits in force."""
        self._reporter.limits(downtime, rate)

    def stage(self, name: str) -> None:
        """A phase begins."""
        self.phase, self.since = name, time.time()
        self._journal.phase(name)
        self.sample()
        self._reporter.stage(name)

    def figures(self, figures: Figures) -> None:
        """The engine's figures changed."""
        self.latest = figures
        self.moved.clear()
        if self._average is None:
            self._average = Average(time.monotonic(), self._bulk)
        if figures.round != self._round:
            self._end_round(figures)
        if self.phase not in STILL:
            self._sample_sometimes(self._average.began)
        self._reporter.figures(figures)

    def moving(self, disk: str, settled: int) -> None:
        """Within the copy under way, `settled` bytes of `disk` are done."""
        self.moved[disk] = settled
        self._reporter.moving(disk, settled)

    def note(self, text: str) -> None:
        """Something the user should know."""
        self.last_note = text
        self._journal.note(text)
        self._reporter.note(text)

    @property
    def speed(self) -> float | None:
        """Bytes a second: as the engine measured it, before that what the bulk pass has settled on average."""
        if self.latest is None or self._average is None or self.latest.speed is not None:
            return self.latest.speed if self.latest else None
        return self._average.until(time.monotonic(), self._bulk)

    @property
    def _bulk(self) -> int:
        """Bytes that the bulk pass has settled, what an earlier attempt had brought included."""
        return sum(disk.bulk_done for disk in self.latest.disks) + sum(self.moved.values()) if self.latest else 0

    @property
    def settled(self) -> int:
        """Bytes that are done, of all disks and rounds, the copy under way included."""
        done = sum(disk.copied + disk.zeroed + disk.skipped for disk in self.latest.disks) if self.latest else 0
        return done + sum(self.moved.values())

    def sample(self) -> None:
        """Put the latest figures into the journal now."""
        if self.latest is not None:
            self._sampled = time.monotonic()
            self._journal.sample(self.latest, self._steering.downtime, self._steering.rate)

    def close(self) -> None:
        """The job ends or rests: put the latest of everything into the journal."""
        self.sample()
        self.maps.keep()

    def _sample_sometimes(self, began: float) -> None:
        now = time.monotonic()
        least, most = SAMPLE
        if now - self._sampled >= max(least, min(most, (now - began) / SHORT)):
            self.sample()
        if now - self._mapped >= MAPS:
            self._mapped = now
            self.maps.keep()

    def _end_round(self, figures: Figures) -> None:
        """Another round has begun: what the one before has copied is known."""
        copied = sum(disk.copied_dirty for disk in figures.disks)
        if self._round:
            self._journal.round(self._round, copied - self._copied_dirty)
        self._round, self._copied_dirty = figures.round, copied
