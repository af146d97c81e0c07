"""What a report is made of: how the job stands, and all that its journal tells."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import msgspec

from qemu_blkmig.errors import Refused
from qemu_blkmig.job import others
from qemu_blkmig.job.chronicle import Sample, Story
from qemu_blkmig.job.diskmap import DiskMap
from qemu_blkmig.job.result import Result
from qemu_blkmig.job.status import RUNNING, Status
from qemu_blkmig.observe.report.axis import TimeAxis

_T = TypeVar("_T")
MOMENT = 0.5
"""Seconds in which a job's journal is begun, or gets to where those of the past are."""
FIRST = "prepare"
"""The phase that a job begins with, each time that it is begun."""
BULK = "bulk"
SMALL = 0.3
"""Part of a job's time that is worth being looked at closer."""


@dataclass(frozen=True)
class Stretch:
    """A phase from `began` to `ended` (seconds since 1970)."""

    name: str
    began: float
    ended: float

    @property
    def style(self) -> str:
        """How it is drawn; whoever could write to the journal must not write the page."""
        return f"phase-{self.name}" if self.name.isalpha() else "phase-other"

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.ended - self.began


@dataclass(frozen=True)
class Material:
    """A job as it stood at `now` (seconds since 1970)."""

    status: Status
    story: Story
    now: float

    @cached_property
    def ended(self) -> float:
        """When the job ended; of one that is under way: now; of one that rests: when something was noted last."""
        if self.status.state == RUNNING:
            return self.now
        return max(
            [*self._noted, *([self.story.last.outcome.time] if self.story.last.outcome else [])], default=self.now
        )

    @cached_property
    def axis(self) -> TimeAxis:
        """The time that the job was at work."""
        began = self.story.phases[0].time if self.story.phases else self.ended
        return TimeAxis(began, self.ended, self._rests)

    @cached_property
    def end_axis(self) -> TimeAxis | None:
        """The time from the first round on, where the passes before took most of it."""
        bulk = [stretch.ended for stretch in self.stretches if stretch.name == BULK]
        if not bulk or not any(sample.round for sample in self.story.samples):
            return None
        end = self.axis.since(bulk[-1])
        return end if 0.1 < end.length < SMALL * self.axis.length else None

    @cached_property
    def stretches(self) -> list[Stretch]:
        """The phases that took any time, in order."""
        phases = self.story.phases
        ends = [*(phase.time for phase in phases), self.ended][1:]
        rests = {end: start for start, end in self._rests}
        each = (Stretch(one.name, one.time, rests.get(end, end)) for one, end in zip(phases, ends, strict=True))
        return [stretch for stretch in each if stretch.seconds > 0]

    @cached_property
    def result(self) -> Result | None:
        """What a job that went well had to show for itself."""
        return self._decoded("result", Result)

    @cached_property
    def environment(self) -> dict[str, str]:
        """Where it ran."""
        return self._decoded("environment", dict[str, str]) or {}

    @cached_property
    def plan(self) -> dict[str, str]:
        """What was asked for."""
        return self._decoded("plan", dict[str, str]) or {}

    @cached_property
    def disks_share(self) -> float | None:
        """The part of the downtime that the last round is to fit, from 0 to 1."""
        return self._decoded("disks' share", float)

    @cached_property
    def maps(self) -> dict[str, DiskMap]:
        """What was copied where and when, by disk."""
        drawn = {}
        for disk in self.story.agreed:
            cells = self.story.maps.get(disk.name)
            made = DiskMap.of(disk.size, cells) if cells is not None else None
            if made is not None and any(made.passes):
                drawn[disk.name] = made
        return drawn

    @cached_property
    def throughput(self) -> list[tuple[float, float, float]]:
        """From, to, bytes a second of payload on average: between two moments at which the journal knew more."""
        return list(self._throughput())

    def _throughput(self) -> Iterator[tuple[float, float, float]]:
        axis, before = self.axis, None
        for sample in self.story.samples:
            if sample.copied is None:
                continue
            if before is None or sample.copied < before[1]:
                before = (sample.time, sample.copied)
            elif sample.copied > before[1]:
                seconds = axis.seconds(sample.time) - axis.seconds(before[0])
                if seconds > 0.01:
                    yield before[0], sample.time, (sample.copied - before[1]) / seconds
                    before = (sample.time, sample.copied)
        if before is not None and self.ended > before[0] and self.status.state != RUNNING:
            yield before[0], self.ended, 0.0

    @property
    def latest(self) -> Sample | None:
        """The last figures."""
        return self.story.last.sample

    @cached_property
    def _rests(self) -> list[tuple[float, float]]:
        """From when to when the job was suspended."""
        rests = []
        for phase in self.story.phases[1:]:
            before = [moment for moment in self._noted if moment < phase.time]
            # Nothing is, where the clock was set back meanwhile.
            if phase.name == FIRST and before:
                rests.append((before[-1], phase.time))
        return rests

    @cached_property
    def _noted(self) -> list[float]:
        story = self.story
        return sorted(each.time for some in (story.phases, story.samples, story.rounds, story.notes) for each in some)

    def _decoded(self, name: str, kind: type[_T]) -> _T | None:
        try:
            return msgspec.json.decode(self.story.facts[name], type=kind)
        except (KeyError, msgspec.MsgspecError):
            return None


async def gather(job: str) -> Material:
    """All that is known of a job. Raises `Refused` if there is none here, or its journal cannot be read."""
    status = await others.stand(job)
    try:
        story = others.chronicle(job).story()
    except Refused:
        # It has hardly begun, or ends in this moment.
        await asyncio.sleep(MOMENT)
        status = await others.stand(job)
        story = others.chronicle(job).story()
    return Material(status, story, time.time())
