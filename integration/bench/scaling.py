"""Disks of 1 to 64 TiB over 1 to 100 Gbit/s, simulated: writes the table and the picture of docs/scaling.md.

Run as `python -m integration.bench.scaling [--output docs] [--quick]`. The engine is the real one; link, destination,
guest and clock are simulated (`tests/engine/simulated.py`), each case in a process of its own, whose memory is told.
The guest writes anywhere in its working set, so nothing is hot: the worst case for putting off.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qemu_blkmig.engine.convergence import Policy, Verdict
from tests.engine.simulated import Simulation, uniform

TIB = 1 << 40
GRANULE = 64 << 10
WORKING_SET = 1 << 40
"""Bytes that the guest writes to, anywhere in them; the whole disk where that is smaller."""
SIZES = (1, 4, 16, 64)
LINKS = (1, 10, 25, 100)
SHARES = (0.0, 0.1, 0.5, 0.9, 1.5)
POLICY = Policy(downtime=0.09, max_rounds=30)
"""What `--downtime 300` leaves to the last round of the disks, by default."""


RAM = 5.0
"""Seconds that RAM takes, while rounds go on."""
SLOWED = 0.5
"""Of the link's speed, what a guest may dirty that has to be slowed (`--on-stall throttle`)."""


@dataclass(frozen=True)
class Case:
    """`size`: TiB; `link`: Gbit/s; `share`: of the link's speed that the guest dirties."""

    size: int
    link: int
    share: float


@dataclass(frozen=True)
class Outcome:
    """Seconds, bytes. `rounds`: what dirty rounds have sent. `throttled`: how long the guest was slowed. `cpu` and
    `memory` (at most): of the engine's process, with what simulates the rest."""

    case: Case
    verdict: str
    time: float
    sent: int
    rounds: int
    downtime: float
    throttled: float
    memory: int
    cpu: float


def play(case: Case) -> Outcome:
    """Simulate one migration."""
    size, speed = case.size * TIB, case.link * 1e9 / 8
    writer = uniform(min(size, WORKING_SET) // GRANULE, case.share * speed)
    simulation = Simulation(size, speed, writer, granule=GRANULE, counts_unique=False)
    verdict = asyncio.run(simulation.migrate(POLICY, ram=RAM, throttled_to=SLOWED * speed))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Outcome(
        case=case,
        verdict=verdict.value,
        time=simulation.time,
        sent=simulation.sent,
        rounds=simulation.sent_dirty,
        downtime=simulation.downtime,
        throttled=0.0 if verdict is Verdict.FITS else simulation.time - simulation.stalled_at,
        memory=usage.ru_maxrss * 1024,
        cpu=time.process_time(),
    )


def cases(*, quick: bool) -> list[Case]:
    """All of them; the quick ones are done in seconds."""
    sizes = SIZES[:2] if quick else SIZES
    return [Case(size, link, share) for size in sizes for link in LINKS for share in SHARES]


def table(outcomes: Iterable[Outcome]) -> str:
    """A table in Markdown."""
    heads = ("disk", "link", "dirtied", "time", "of it throttled", "sent / disk", "last round", "memory", "CPU")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for each in outcomes:
        case = each.case
        cells = (
            f"{case.size} TiB",
            f"{case.link} Gbit/s",
            f"{case.share:.0%}",
            duration(each.time),
            duration(each.throttled) if each.throttled else "-",
            f"{each.sent / (case.size * TIB):.2f}",
            f"{each.downtime * 1000:.0f} ms",
            f"{each.memory >> 20} MiB",
            f"{each.cpu:.0f} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


COLOURS = ("#7f8c8d", "#1b6ca8", "#3a9d5d", "#d98e04", "#c0392b")
LEFT, TOP, WIDTH, HEIGHT, GAP = 70, 40, 260, 220, 20
TICKS = ((60, "1 min"), (600, "10 min"), (3600, "1 h"), (36000, "10 h"), (7 * 86400, "1 week"))


class Picture:
    """Time over size, a panel for each link, a line for each share of it that is dirtied, both axes in powers: SVG."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self._outcomes = outcomes
        self._times = min(each.time for each in outcomes), max(each.time for each in outcomes)
        self._links = sorted({each.case.link for each in outcomes})
        self._sizes = sorted({each.case.size for each in outcomes})
        self._width = LEFT + len(self._links) * (WIDTH + GAP)
        self._parts: list[str] = []

    def draw(self) -> str:
        """All of it."""
        height = TOP + HEIGHT + 70
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self._width}" height="{height}" font-family="sans-serif" '
            f'font-size="12"><rect width="{self._width}" height="{height}" fill="white"/>'
        ]
        for seconds, name in TICKS:
            if self._times[0] <= seconds <= self._times[1]:
                at = self._down(seconds)
                self._parts.append(f'<line x1="{LEFT}" x2="{self._width - GAP}" y1="{at}" y2="{at}" stroke="#ddd"/>')
                self._text(LEFT - 8, at + 4, name, "end")
        for number, link in enumerate(self._links):
            self._panel(LEFT + number * (WIDTH + GAP), link)
        for number, (colour, share) in enumerate(zip(COLOURS, SHARES, strict=True)):
            at = LEFT + number * 190
            self._parts.append(f'<rect x="{at}" y="{TOP + HEIGHT + 36}" width="12" height="12" fill="{colour}"/>')
            self._text(at + 18, TOP + HEIGHT + 47, f"dirtied at {share:.0%} of the link", "start")
        return "\n".join([*self._parts, "</svg>\n"])

    def _panel(self, left: int, link: int) -> None:
        self._parts.append(f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>')
        self._text(left + WIDTH / 2, TOP - 10, f"{link} Gbit/s", "middle")
        for size in self._sizes:
            self._text(self._along(left, size), TOP + HEIGHT + 16, f"{size} TiB", "middle")
        for colour, share in zip(COLOURS, SHARES, strict=True):
            line = [each for each in self._outcomes if (each.case.link, each.case.share) == (link, share)]
            places = [(self._along(left, each.case.size), self._down(each.time)) for each in line]
            points = " ".join(f"{x},{y}" for x, y in places)
            self._parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for (x, y), each in zip(places, line, strict=True):
                fill = "white" if each.throttled else colour
                self._parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{fill}" stroke="{colour}"/>')

    def _text(self, x: float, y: float, text: str, anchor: str) -> None:
        self._parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>')

    def _along(self, left: int, size: int) -> float:
        return round(left + 20 + (WIDTH - 40) * _part(size, self._sizes[0], self._sizes[-1]), 1)

    def _down(self, seconds: float) -> float:
        return round(TOP + 10 + (HEIGHT - 20) * (1 - _part(seconds, *self._times)), 1)


def _part(value: float, low: float, high: float) -> float:
    """Where `value` lies between `low` and `high`, by powers, from 0 to 1."""
    return math.log(value / low) / math.log(high / low) if high > low else 0.5


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder for scaling.svg and scaling.json")
    parser.add_argument("--quick", action="store_true", help="1 and 4 TiB only")
    arguments = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        outcomes = []
        for outcome in pool.imap(play, cases(quick=arguments.quick)):
            outcomes.append(outcome)
            print(table([outcome]).splitlines()[-1], file=sys.stderr, flush=True)
    arguments.output.mkdir(exist_ok=True)
    (arguments.output / "scaling.svg").write_text(Picture(outcomes).draw())
    (arguments.output / "scaling.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
    print(table(outcomes))


if __name__ == "__main__":
    main()
