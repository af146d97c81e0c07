"""A job's figures as Prometheus' metrics: what is counted, and what the families are called."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from qemu_blkmig import __version__
from qemu_blkmig.errors import BlkmigError, Undecided, kind_of

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from qemu_blkmig.engine.migration import DiskFigures, Figures
    from qemu_blkmig.job.result import Downtime

PREFIX = "qemu_blkmig_"
STATES = ("running", "succeeded", "failed", "suspended", "undecided")
LAST_SUCCESS, LAST_FAILURE = "last_success_timestamp_seconds", "last_failure_timestamp_seconds"


class Metrics(Collector):
    """Implements `Reporter`. Told by the job's thread, collected by any: neither ever waits for the other.

    `source` stands on every series, as it is the same from one job of a guest's to the next. `last_success`,
    `last_failure`: of an earlier job, in seconds since 1970.
    """

    def __init__(
        self,
        command: str,
        source: str,
        destination: str,
        *,
        last_success: float | None = None,
        last_failure: float | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._command = command
        self._source = source
        self._destination = destination
        self._last_success = last_success
        self._last_failure = last_failure
        self._now = now
        self._started = now()
        self._state = "running"
        self._name = ""
        self._phase: str | None = None
        self._since = self._started
        self._spent: dict[str, float] = {}
        self._figures: Figures | None = None
        self._counted: dict[str, DiskFigures] = {}
        self._round = 0
        self._bytes: dict[tuple[str, str, str], int] = {}
        self._rounds = 0
        self._disk_rounds: dict[str, int] = {}
        self._moving: dict[str, int] = {}
        self._limit: float | None = None
        self._rate: int | None = None
        self._errors: dict[str, int] = {}
        self._failure: BlkmigError | None = None
        self._paused: Downtime | None = None

    def job(self, name: str) -> None:
        """A job begins, or goes on: its figures begin anew, what was counted stays."""
        self._name = name
        self._counted, self._round = {}, 0

    def limits(self, downtime: float, rate: int | None) -> None:
        """Limits that are in force now."""
        self._limit, self._rate = downtime, rate

    def stage(self, name: str) -> None:
        """A phase begins."""
        self._end_phase()
        self._phase = name

    def figures(self, figures: Figures) -> None:
        """What has come since the last figures belongs to the phase that is under way."""
        for disk in figures.disks:
            before = self._counted.get(disk.name)
            for kind, count, had in (
                ("data", disk.copied, before.copied if before else 0),
                ("zero", disk.zeroed, before.zeroed if before else 0),
                ("skipped", disk.skipped, before.skipped if before else 0),
            ):
                key = (disk.name, self._phase or "prepare", kind)
                self._bytes[key] = self._bytes.get(key, 0) + max(0, count - had)
            rounds = disk.rounds - (before.rounds if before else 0)
            self._disk_rounds[disk.name] = self._disk_rounds.get(disk.name, 0) + max(0, rounds)
            self._counted[disk.name] = disk
        self._rounds += max(0, figures.round - self._round)
        self._round = figures.round
        self._figures = figures
        self._moving = {}

    def moving(self, disk: str, settled: int) -> None:
        """Bytes settled in the copy under way."""
        self._moving[disk] = settled

    def note(self, text: str) -> None:
        """Not counted."""

    def failed(self, error: BlkmigError) -> None:
        """An attempt has failed; the same error told again is the same failure."""
        if error is not self._failure:
            kind = kind_of(type(error))
            self._errors[kind] = self._errors.get(kind, 0) + 1
            self._failure = error

    def paused(self, downtime: Downtime | None) -> None:
        """How long the guest stood still, as it was measured."""
        self._paused = downtime

    def ended(self, error: BlkmigError | None) -> None:
        """It is over: by `error`, or well."""
        self._end_phase()
        if error is None:
            self._state, self._last_success = "succeeded", self._now()
            return
        self.failed(error)
        self._last_failure = self._now()
        if isinstance(error, Undecided):
            self._state = "undecided"
        else:
            self._state = "suspended" if error.suspended else "failed"

    def _end_phase(self) -> None:
        now = self._now()
        if self._phase is not None and self._state == "running":
            self._spent[self._phase] = self._spent.get(self._phase, 0.0) + max(0.0, now - self._since)
        self._since = now

    def describe(self) -> Iterator[Metric]:
        """Nothing is known beforehand: see `collect`."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The families as they stand."""
        yield from self._of_the_job()
        yield from self._of_the_disks()
        yield from self._of_convergence()

    def _of_the_job(self) -> Iterator[Metric]:
        yield self._gauges(
            "job_info",
            "The job whose metrics these are.",
            [((self._name, self._command, self._destination, __version__), 1.0)],
            ("job_id", "command", "destination", "version"),
        )
        yield self._gauges(
            "state",
            "How the job stands, by state: 1 for the one that it is in.",
            [((state,), float(state == self._state)) for state in STATES],
            ("state",),
        )
        phase, running = self._phase, self._state == "running"
        spent = dict(self._spent)
        if phase is not None and running:
            spent[phase] = spent.get(phase, 0.0) + max(0.0, self._now() - self._since)
        yield self._gauges(
            "phase",
            "By phase so far: 1 for the one under way.",
            [((name,), float(running and name == phase)) for name in spent],
            ("phase",),
        )
        yield self._counters(
            "phase_seconds", "Time spent, by phase.", [((name,), value) for name, value in spent.items()], ("phase",)
        )
        yield self._counters(
            "errors",
            "Attempts that failed, by the kind that --output json tells.",
            [((kind,), float(count)) for kind, count in list(self._errors.items())],
            ("kind",),
        )
        for name, text, value in (
            ("start_timestamp_seconds", "When the command was started.", self._started),
            ("update_timestamp_seconds", "When these metrics were told.", self._now()),
            (LAST_SUCCESS, "When a job of this source last went well.", self._last_success),
            (LAST_FAILURE, "When a job of this source last failed.", self._last_failure),
        ):
            yield self._gauge(name, text, value)

    def _of_the_disks(self) -> Iterator[Metric]:
        figures, moving = self._figures, self._moving
        disks = figures.disks if figures is not None else ()
        yield self._counters(
            "disk_bytes",
            "What was settled of the disk, by phase and kind: data copied, zero written, or skipped.",
            [(key, float(count)) for key, count in list(self._bytes.items())],
            ("disk", "phase", "kind"),
        )
        yield self._counters(
            "disk_rounds",
            "Dirty rounds in which something of the disk was brought over.",
            [((disk,), float(count)) for disk, count in list(self._disk_rounds.items())],
            ("disk",),
        )
        for name, text, value in (
            ("disk_size_bytes", "The virtual size of the disk.", lambda disk: disk.size),
            (
                "disk_first_pass_bytes",
                "What the first pass has settled of the disk, the copy under way included.",
                lambda disk: _settled(disk, moving),
            ),
            (
                "disk_dirty_bytes",
                "What the guest has written and is still to be brought over.",
                lambda disk: disk.dirty,
            ),
            (
                "disk_put_off_bytes",
                "The part of it that is copied last because it is written all the time.",
                lambda disk: disk.put_off,
            ),
        ):
            yield self._gauges(name, text, [((disk.name,), float(value(disk))) for disk in disks], ("disk",))

    def _of_convergence(self) -> Iterator[Metric]:
        figures = self._figures
        yield self._counters("rounds", "Dirty rounds begun.", [((), float(self._rounds))])
        for name, text, attribute in (
            ("pending_bytes", "What is still to be brought over; RAM is not among it.", "pending"),
            ("speed_bytes_per_second", "Payload, as the engine measures it.", "speed"),
            ("dirty_rate_bytes_per_second", "How fast the guest dirties its disks.", "dirty_rate"),
            ("predicted_downtime_seconds", "What the last round would take now.", "predicted"),
            ("predicted_convergence_seconds", "Until that fits the limit.", "converges_in"),
            ("prediction_confidence_ratio", "What such predictions were worth.", "confidence"),
        ):
            # Once it is over, they say nothing of now.
            yield self._gauge(name, text, getattr(figures, attribute, None) if self._state == "running" else None)
        yield self._gauge("downtime_limit_seconds", "How long the guest may stand still (--downtime).", self._limit)
        yield self._gauge(
            "bandwidth_limit_bytes_per_second", "What may be sent in a second, where there is a limit.", self._rate
        )
        paused = self._paused
        yield self._gauge("downtime_seconds", "How long the guest stood still.", paused.total if paused else None)
        yield self._gauges(
            "downtime_part_seconds",
            "What it stood still for, by part: the disks' last round (disk), verify, RAM and devices (ram).",
            [((part,), getattr(paused, part)) for part in ("disk", "verify", "ram")] if paused else [],
            ("part",),
        )

    def _gauge(self, name: str, text: str, value: float | None) -> Metric:
        return self._gauges(name, text, [] if value is None else [((), float(value))])

    def _gauges(
        self, name: str, text: str, values: list[tuple[tuple[str, ...], float]], labels: tuple[str, ...] = ()
    ) -> Metric:
        family = GaugeMetricFamily(f"{PREFIX}{name}", text, labels=["source", *labels])
        for own, value in values:
            family.add_metric([self._source, *own], value)
        return family

    def _counters(
        self, name: str, text: str, values: list[tuple[tuple[str, ...], float]], labels: tuple[str, ...] = ()
    ) -> Metric:
        family = CounterMetricFamily(f"{PREFIX}{name}", text, labels=["source", *labels])
        for own, value in values:
            family.add_metric([self._source, *own], value)
        return family


def _settled(disk: DiskFigures, moving: dict[str, int]) -> int:
    return min(disk.size, disk.bulk_done + moving.get(disk.name, 0))
