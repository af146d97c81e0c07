"""Where a moment or a value lies in a figure, from 0 to 1, and what is written beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qemu_blkmig.units import show_bytes, show_seconds

STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200)
"""Seconds between two marks on the axis of time; whole days beyond."""
DAY = 86400.0
MARKS = 7
"""Marks on an axis at most, about."""


@dataclass(frozen=True)
class Mark:
    """What stands beside an axis, and where."""

    part: float
    text: str


class TimeAxis:
    """The seconds that a job was at work, from `began` to `ended` (seconds since 1970); what it rested is left out."""

    def __init__(self, began: float, ended: float, rests: Sequence[tuple[float, float]] = (), first: float = 0) -> None:
        """`rests`: from and to, ascending and apart. `first`: seconds at work that lie before the axis."""
        self.began = began
        self.ended = ended
        self.rests = rests
        self.first = first
        self.start = began
        self.length = max(0.001, self.seconds(max(began, ended)) - first)

    def since(self, moment: float) -> TimeAxis:
        """The part of it from a moment on."""
        part = TimeAxis(self.began, self.ended, self.rests, self.seconds(moment))
        part.start = moment
        return part

    def seconds(self, moment: float) -> float:
        """At work until then; between the beginning of the job and its end."""
        rested = sum(min(moment, end) - start for start, end in self.rests if start < moment)
        return max(0.0, moment - self.began - rested)

    def part(self, moment: float) -> float:
        """Where a moment lies; below 0 if that is before the axis."""
        return min(1.0, (self.seconds(moment) - self.first) / self.length)

    def marks(self) -> list[Mark]:
        """Round numbers of seconds."""
        step = next((step for step in STEPS if self.length / step <= MARKS), DAY)
        while self.length / step > MARKS:
            step += DAY
        first, last = math.ceil(self.first / step), int((self.first + self.length) / step)
        times = (number * step for number in range(first, last + 1))
        return [Mark((seconds - self.first) / self.length, clock(seconds)) for seconds in times]


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high`, evenly or by powers."""

    low: float
    high: float
    powers: bool
    marks: tuple[Mark, ...]

    def part(self, value: float) -> float:
        """Where a value lies; one beyond the ends lies there."""
        return _part(value, self.low, self.high, powers=self.powers)


def rates(highest: float) -> Scale:
    """Bytes a second, from none."""
    unit = 1 << 20
    steps = [factor * 10**power for power in range(-2, 9) for factor in (1, 2, 5)]
    step = next((step for step in steps if highest / unit / step <= 4), steps[-1])
    high = max(step, math.ceil(highest / unit / step) * step)
    marks = (Mark(number * step / high, f"{number * step:g}") for number in range(round(high / step) + 1))
    return Scale(0.0, high * unit, powers=False, marks=tuple(marks))


def sizes(highest: float) -> Scale:
    """Bytes, by powers, from 64 KiB."""
    low = 64 << 10
    high = low * 16
    while high < highest:
        high *= 4
    powers = round(math.log2(high / low))
    step = max(4, math.ceil(powers / 5 / 2) * 2)
    marks = (
        Mark(power / powers, show_bytes(low << power).replace(".0", ""))
        for power in range(powers % step, powers + 1, step)
    )
    return Scale(low, high, powers=True, marks=tuple(marks))


def durations(lowest: float, highest: float) -> Scale:
    """Seconds, by powers of ten."""
    first = math.floor(math.log10(max(0.001, min(lowest, 0.1))))
    last = max(first + 2, math.ceil(math.log10(max(0.001, highest))))
    marks = (Mark((power - first) / (last - first), _power_of_ten(power)) for power in range(first, last + 1))
    return Scale(10.0**first, 10.0**last, powers=True, marks=tuple(marks))


def clock(seconds: float) -> str:
    """A time that has passed, short: `0.5 s`, `45 s`, `3:05`, `2 h`, `1 d 6 h`."""
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds else "0"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    parts = ((whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"))
    return " ".join(f"{count} {unit}" for count, unit in parts if count)


def spell(seconds: float) -> str:
    """How long something took, exact where that matters: `51 ms`, `3.1 s`, `12:05`, `4 h 40 min`."""
    return show_seconds(seconds) if seconds < 60 else clock(seconds)


def thinned(count: int, most: int) -> Iterator[range]:
    """`count` things in at most `most` groups that follow each other."""
    groups = min(count, most)
    for group in range(groups):
        yield range(group * count // groups, (group + 1) * count // groups)


def _power_of_ten(power: int) -> str:
    return show_seconds(10.0**power).replace(".0", "")


def _part(value: float, low: float, high: float, *, powers: bool) -> float:
    if powers:
        value, low, high = (math.log(max(each, low)) for each in (value, low, high))
    return min(1.0, max(0.0, (value - low) / (high - low)))
