"""What was measured, as a table of ratios, as JSON and as a picture."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from integration.bench.measuring import Usage

GIB = 1 << 30
BAR, GAP, LEFT, WIDTH = 16, 34, 200, 620
OURS, OTHERS = "#1b6ca8", "#a5b1b8"


@dataclass(frozen=True)
class Measured:
    """One copy: which case, by whom (a row of the table), in which round; `data`: bytes that had to be written.

    `intact`: whether what arrived is what was there. What a copy took that is not says nothing.
    """

    case: str
    row: str
    round: int
    data: int
    usage: Usage
    intact: bool = True


@dataclass(frozen=True)
class Spread:
    """Of one figure over all rounds."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:7.2f} ({self.least:.2f} to {self.most:.2f})"


def spread(values: Iterable[float]) -> Spread:
    """Median, minimum and maximum."""
    found = list(values)
    return Spread(statistics.median(found), min(found), max(found))


def ratios(measured: Sequence[Measured], case: str, row: str, baseline: str) -> Spread:
    """How many times as fast as `baseline` it was, compared within each round."""
    base = {each.round: each.usage.seconds for each in measured if (each.case, each.row) == (case, baseline)}
    return spread(base[each.round] / each.usage.seconds for each in _counted(measured, case, row))


def _counted(measured: Sequence[Measured], case: str, row: str) -> list[Measured]:
    """The copies of a row that say something."""
    return [each for each in measured if (each.case, each.row) == (case, row) and each.intact]


def rows(measured: Sequence[Measured], case: str) -> list[str]:
    """The rows of a case that have anything to tell, ours first, by name."""
    told = {each.row for each in measured if each.case == case and each.intact}
    return sorted(told, key=lambda row: ("blkmig" not in row, row))


def losses(measured: Sequence[Measured], case: str) -> list[str]:
    """Which rows of a case had copies that were not what was to be copied, in how many rounds."""
    of_case = [each for each in measured if each.case == case]
    lost = Counter(each.row for each in of_case if not each.intact)
    return [f"{row}: not what was there, {count} of {sum(each.row == row for each in of_case)} times"
            for row, count in sorted(lost.items())]  # fmt: skip


def table(measured: Sequence[Measured], baselines: Mapping[str, str]) -> str:
    """For people; a case after the other. `baselines`: the row whose speed is 1, by case."""
    lines = []
    for case in dict.fromkeys(each.case for each in measured):
        baseline = baselines[case]
        lines.append(
            f"\n{case}\n  {'':26}{f'speed by {baseline}':>29}{'seconds':>10}"
            f"{'CPU-s/GiB here':>16}{'there':>7}{'MiB here':>10}{'there':>7}{'begun':>7}"
        )
        for row in rows(measured, case):
            own = _counted(measured, case, row)
            gib = own[0].data / GIB
            used = [each.usage for each in own]
            lines.append(
                f"  {row:26}{ratios(measured, case, row, baseline)!s:>29}"
                f"{statistics.median(each.seconds for each in used):10.2f}"
                f"{statistics.median(each.source_cpu for each in used) / gib:16.2f}"
                f"{statistics.median(each.destination_cpu for each in used) / gib:7.2f}"
                f"{max(each.source_memory for each in used) >> 20:10}"
                f"{max(each.destination_memory for each in used) >> 20:7}"
                f"{max(each.begun_memory for each in used) >> 20:7}"
            )
        lines += [f"  {loss}" for loss in losses(measured, case)]
    return "\n".join(lines)


def as_json(measured: Sequence[Measured]) -> str:
    """All figures of all rounds."""
    return json.dumps([asdict(each) for each in measured], indent=1) + "\n"


def picture(measured: Sequence[Measured], baselines: Mapping[str, str]) -> str:
    """Bars of the medians, a panel for each case, lines from minimum to maximum: SVG. `baselines`: see `table`."""
    parts: list[str] = []
    top = 30
    for case in dict.fromkeys(each.case for each in measured):
        baseline = baselines[case]
        found = [(row, ratios(measured, case, row, baseline)) for row in rows(measured, case)]
        scale = WIDTH / max(each.most for _, each in found)
        parts.append(_text(10, top, f"{case}: speed, {baseline} = 1", "start", 'font-weight="bold"'))
        for number, (row, each) in enumerate(found):
            at = top + 10 + number * (BAR + 6)
            colour = OURS if "blkmig" in row else OTHERS
            parts.append(_text(LEFT - 8, at + BAR - 4, row, "end"))
            parts.append(
                f'<rect x="{LEFT}" y="{at}" width="{each.median * scale:.1f}" height="{BAR}" fill="{colour}"/>'
            )
            middle = at + BAR / 2
            parts.append(
                f'<line x1="{LEFT + each.least * scale:.1f}" x2="{LEFT + each.most * scale:.1f}" y1="{middle}" '
                f'y2="{middle}" stroke="#333"/>'
            )
            parts.append(_text(LEFT + each.most * scale + 6, at + BAR - 4, f"{each.median:.2f}", "start"))
        top += 10 + len(found) * (BAR + 6) + GAP
    width = LEFT + WIDTH + 60
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" font-family="sans-serif" '
        'font-size="12">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{top}" fill="white"/>', *parts, "</svg>\n"])


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{text}</text>'
