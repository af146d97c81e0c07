"""What a terminal shows of a job: its phase, its disks, how fast the guest writes, and whether it can move yet."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from qemu_blkmig.engine.migration import DiskFigures, Figures
from qemu_blkmig.job.reporting import STANDBY
from qemu_blkmig.observe.summary import Summary
from qemu_blkmig.units import show_bytes, show_rate, show_seconds

LEAST_WIDTH, LEAST_HEIGHT = 48, 8
"""Columns and lines of a terminal that gets more than one line."""
MOST_WIDTH = 110
"""Columns that are used at most: on wider terminals it would be far from one end of a bar to the other."""
TICK = 1.0
"""Seconds that a column of the sparkline stands for, at least."""
LABEL = 10
"""Columns before a bar or a sparkline."""
NAME = 16
"""Columns of a disk's name, at most."""
PHASES = {
    "prepare": "preparing: both sides are looked at",
    "waiting": "waiting for a slot",
    "bulk": "copying the disks",
    STANDBY: "keeping the disks in step",
    "dirty": "copying what the guest has written",
    "readback": "reading back what was written",
    "ram": "moving RAM",
    "switchover": "the guest stands still: last round",
    "verify": "verifying",
    "handover": "handing the guest over",
}

SPARKS = " ▁▂▃▄▅▆▇█"
ASCII_SPARKS = " .:-=+*%#"


class Screen:
    """Draws a job for `console`, whose colours and encoding it keeps to; keeps the dirty rate's last minutes."""

    def __init__(self, summary: Summary, console: Console) -> None:
        self._summary = summary
        self._console = console
        self._plain = not console.encoding.lower().startswith("utf")
        self._rates: deque[float] = deque(maxlen=MOST_WIDTH)
        self._ticked = -math.inf

    def lines(self, width: int, height: int) -> list[str]:
        """At most `height` lines of at most `width` columns, as they are to be written."""
        self._tick()
        if width < LEAST_WIDTH or height < LEAST_HEIGHT:
            return [self._summary.bar(width)]
        width = min(width, MOST_WIDTH)
        figures = self._summary.figures
        shown = [self._headline(width)]
        if figures is not None:
            shown.append(self._bar_line("all disks" if len(figures.disks) > 1 else figures.disks[0].name, width))
            if len(figures.disks) > 1:
                shown += self._disks(figures.disks, width, height - 4)
            shown.append(self._dirty(figures, width))
            shown.append(self._outlook(figures))
        return [self._drawn(line, width) for line in shown]

    def _tick(self) -> None:
        now, figures = self._summary.now(), self._summary.figures
        if figures is not None and figures.dirty_rate is not None and now - self._ticked >= TICK:
            self._ticked = now
            self._rates.append(figures.dirty_rate)

    def _headline(self, width: int) -> Text:
        summary = self._summary
        line = Text(PHASES.get(summary.stage, summary.stage), style="bold")
        line.append(f"  {_clock(summary.now() - summary.entered)}", style="dim")
        right = _clock(summary.now() - summary.begun) + " in all"
        if summary.job is not None:
            right = f"job {summary.job}, {right}"
        gap = width - line.cell_len - len(right)
        return line.append(" " * gap + right, style="dim") if gap > 1 else line

    def _bar_line(self, name: str, width: int) -> Text:
        summary = self._summary
        done = summary.percent if summary.percent is not None else (0.0 if summary.figures is None else 100.0)
        parts = [f"{done:3.0f} %"]
        if summary.speed is not None:
            parts.append(show_rate(summary.speed))
        if summary.stage == "bulk" and summary.speed and summary.pending:
            parts.append(f"{_clock(summary.pending / summary.speed)} left")
        return self._bar(name, done, "  ".join(parts), width, "green")

    def _disks(self, disks: Sequence[DiskFigures], width: int, room: int) -> list[Text]:
        """A line each; where there is no room for all, those that are under way come first."""
        if len(disks) > max(1, room):
            wanted = sorted(disks, key=lambda disk: self._summary.first_pass(disk) >= disk.size)[: max(0, room - 1)]
            shown = [disk for disk in disks if disk in wanted]
        else:
            shown = list(disks)
        lines = [self._disk(disk, width) for disk in shown]
        if len(shown) < len(disks):
            lines.append(Text(f"  and {len(disks) - len(shown)} more", style="dim"))
        return lines

    def _disk(self, disk: DiskFigures, width: int) -> Text:
        done = 100.0 * self._summary.first_pass(disk) / disk.size
        parts = [f"{done:3.0f} %", f"of {show_bytes(disk.size)}"]
        if disk.dirty:
            parts.append(f"{show_bytes(disk.dirty)} dirty")
        return self._bar(f"  {disk.name}", done, "  ".join(parts), width, "cyan")

    def _bar(self, name: str, done: float, told: str, width: int, colour: str) -> Text:
        # All bars begin, and end, in the same columns.
        label = max(LABEL, min(NAME, self._longest))
        columns = max(6, min(48, width - label - 46))
        filled = min(columns, int(columns * done / 100))
        full, rest = ("=", "-") if self._plain else ("━", "━")
        line = Text(f"{set_cell_size(name, label - 1)} ")
        line.append(full * filled, style=colour)
        # Without colours both would look the same.
        line.append((rest if self._coloured else " ") * (columns - filled), style="bright_black")
        return line.append(f" {told}")

    @property
    def _longest(self) -> int:
        disks = self._summary.figures.disks if self._summary.figures is not None else ()
        return max((cell_len(disk.name) + (3 if len(disks) > 1 else 1) for disk in disks), default=0)

    @property
    def _coloured(self) -> bool:
        return self._console.color_system is not None and not self._console.no_color

    def _dirty(self, figures: Figures, width: int) -> Text:
        """The guest's writes over the last minutes, the latest to the right."""
        label = max(LABEL, min(NAME, self._longest))
        columns = max(6, min(48, width - label - 46))
        line = Text(f"{'dirtied':{label}}")
        if figures.dirty_rate is None:
            return line.append(f"{'':{columns}} not known yet", style="dim")
        line.append(spark(list(self._rates)[-columns:], columns, plain=self._plain), style="yellow")
        return line.append(f" {show_rate(figures.dirty_rate)}, most {show_rate(max(self._rates, default=0.0))}")

    def _outlook(self, figures: Figures) -> Text:
        """Whether the guest can move: the predicted pause against its limit."""
        summary = self._summary
        label = max(LABEL, min(NAME, self._longest))
        line = Text(f"{'pause':{label}}")
        limit = summary.downtime
        if summary.stage == "bulk" or figures.predicted is None:
            line.append("not known yet", style="dim")
        else:
            fits = limit is None or figures.predicted <= limit
            line.append(f"{show_seconds(figures.predicted)} predicted", style="bold green" if fits else "bold red")
            if not fits and figures.converges_in:
                line.append(f", fits in about {show_seconds(figures.converges_in)}")
        if limit is not None:
            line.append(f", limit {show_seconds(limit)}")
        if summary.pending:
            line.append(f", {show_bytes(summary.pending)} pending")
        if figures.round and summary.stage != "bulk":
            line.append(f", round {figures.round}")
        return line

    def _drawn(self, line: Text, width: int) -> str:
        line.truncate(width, overflow="crop")
        with self._console.capture() as drawn:
            self._console.print(
                line, end="", no_wrap=True, overflow="ignore", crop=False, highlight=False, markup=False
            )
        return drawn.get()


def spark(values: Sequence[float], columns: int, *, plain: bool) -> str:
    """The values as a line of blocks, the last one to the right; the highest is a full block."""
    marks = ASCII_SPARKS if plain else SPARKS
    most = max(values, default=0.0)
    steps = len(marks) - 1
    drawn = "".join(marks[max(1, math.ceil(steps * value / most))] if most > 0 else marks[1] for value in values)
    return drawn.rjust(columns)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
