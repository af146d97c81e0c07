"""What a report's figures show: made of a job's journal, each with its words and its table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qemu_blkmig.job.diskmap import BANDS, UNIT, DiskMap
from qemu_blkmig.observe.report import drawing
from qemu_blkmig.observe.report.axis import Mark, clock, thinned
from qemu_blkmig.observe.report.drawing import HIGH, WIDE, TimedFigure
from qemu_blkmig.observe.report.figure import Figure, Key, Table
from qemu_blkmig.observe.report.material import Material
from qemu_blkmig.units import show_bytes, show_seconds

HEIGHT = 190
"""Pixels of a figure."""
SHADES = 6
"""Shades of what was sent at a time and place."""
HOT = 4
"""Times that a place is copied without being hot."""
PARTS = 16
"""Parts of a disk in a table."""
PLACES = 8
"""Hot places that are named."""


def pause(material: Material) -> Figure | None:
    """What the guest stood still for."""
    downtime = material.result.downtime if material.result else None
    if downtime is None:
        return None
    steps = downtime.steps or {"disks": downtime.disk, "verification": downtime.verify, "RAM and devices": downtime.ram}
    rest = downtime.total - sum(steps.values())
    named = [("before it was noticed", rest)] if rest > 0.0005 else []
    parts = [(STEPS.get(name, "step-other"), name, seconds) for name, seconds in (*named, *steps.items())]
    limit = material.latest.downtime if material.latest else None
    held = "" if limit is None else f", {'within' if downtime.total <= limit else 'beyond'} the limit of {_ms(limit)}"
    longest = max(parts, key=lambda part: part[2])
    words = f"The guest stood still for {_ms(downtime.total)}{held}. The longest part: {longest[1]}, {_ms(longest[2])}."
    svg = drawing.bar(parts, limit, "The guest's pause, part by part", "pause-words")
    rows = [[name, _ms(seconds), f"{seconds / downtime.total:.0%}"] for _, name, seconds in parts]
    rows.append(["together", _ms(downtime.total), "100%"])
    legend = [Key(style, f"{name} {_ms(seconds)}") for style, name, seconds in parts]
    return Figure("pause", "The guest's pause", words, svg, legend, Table(("part", "time", "share"), rows))


@dataclass(frozen=True)
class Mapped:
    """A disk's map, and what was sent of it when."""

    cells: Figure
    times: Figure
    hottest: Table | None = field(default=None)


def disk(material: Material, number: int, name: str, drawn: DiskMap) -> Mapped:
    """The figures of one disk, the `number`th."""
    return Mapped(_cells(number, name, drawn), _times(material, number, name, drawn), _hottest(drawn))


def _cells(number: int, name: str, drawn: DiskMap) -> Figure:
    styles = [_style(passes, sent) for passes, sent in zip(drawn.passes, drawn.sent, strict=True)]
    known = [style for style in LEVELS if style in styles]
    legend = [Key(style, f"{LEVELS[style]} ({_share(styles.count(style) / len(styles))})") for style in known]
    most = max(drawn.passes)
    words = f"From the disk's beginning, row by row; each cell is {show_bytes(drawn.cell)}."
    words += f" The hottest were copied {most} times." if most > 1 else " None was copied more than once."
    svg = drawing.grid(styles, f"How often each part of {name} was copied", f"cells-{number}-words")
    return Figure(f"cells-{number}", "How often each part was copied", words, svg, legend)


def _times(material: Material, number: int, name: str, drawn: DiskMap) -> Figure:
    marks = [Mark(1 - part, show_bytes(drawn.size * part).replace(".0", "") if part else "0") for part in (0, 0.5, 1)]
    figure = TimedFigure(material.axis, material.stretches, HEIGHT, marks)
    axis = material.axis
    # What the job rested is in neither; so slots are counted back from where both are the same.
    end = axis.seconds(drawn.began + drawn.used * drawn.slot)
    paths: dict[int, list[str]] = {}
    highest = max(drawn.picture) or 1.0
    lowest = min((sent for sent in drawn.picture if sent > 0), default=1.0)
    height = HIGH / BANDS
    for slot in range(drawn.used):
        began = max(0.0, end - (drawn.used - slot) * drawn.slot)
        left = min(began / axis.length, 1.0) * WIDE
        width = min(max(1.0, drawn.slot / axis.length * WIDE), WIDE - left)
        for first, last, shade in _runs(drawn.picture[slot * BANDS : (slot + 1) * BANDS], lowest, highest):
            paths.setdefault(shade, []).append(
                f"M{left:.1f} {first * height:.2f}h{width:.1f}v{(last - first) * height:.2f}h-{width:.1f}z"
            )
    for shade, path in sorted(paths.items()):
        figure.shapes(f"heat heat-{shade}", "".join(path))
    words = (
        f"Down: the disk from its beginning to its end. The first pass is the slanting line; what comes back again and "
        f"again at one height is hot. The stronger its colour, the more was sent in {show_seconds(drawn.slot)}."
    )
    svg = figure.svg(f"When each part of {name} was copied", f"times-{number}-words")
    return Figure(f"times-{number}", "When each part was copied", words, svg, table=_parts(drawn, end))


def _parts(drawn: DiskMap, end: float) -> Table:
    """When parts of the disk were copied first and last, and how much was sent of them; the last slot ends at `end`."""
    rows = []
    for bands in thinned(BANDS, PARTS):
        sent = [sum(drawn.picture[slot * BANDS + band] for band in bands) for slot in range(drawn.used)]
        slots = [slot for slot, amount in enumerate(sent) if amount]
        when = [clock(round(max(0.0, end - (drawn.used - slot) * drawn.slot), 1)) for slot in slots]
        rows.append(
            [
                show_bytes(drawn.size * bands[0] / BANDS),
                when[0] if when else "-",
                when[-1] if when else "-",
                show_bytes(sum(sent) * UNIT),
            ]
        )
    return Table(("from", "first sent at", "last sent at", "sent in all"), rows)


def _hottest(drawn: DiskMap) -> Table | None:
    """Neighbouring cells that were copied most often."""
    most = max(drawn.passes)
    if most <= HOT:
        return None
    places, begin = [], None
    for cell, passes in enumerate([*drawn.passes, 0]):
        if passes > max(HOT, most // 2):
            begin = cell if begin is None else begin
        elif begin is not None:
            places.append((max(drawn.passes[begin:cell]), sum(drawn.sent[begin:cell]) * UNIT, begin, cell))
            begin = None
    places.sort(key=lambda place: place[:2], reverse=True)
    rows = [
        [
            show_bytes(first * drawn.cell),
            show_bytes(min(drawn.size, end * drawn.cell) - first * drawn.cell),
            str(passes),
            show_bytes(sent),
        ]
        for passes, sent, first, end in places[:PLACES]
    ]
    return Table(("from", "length", "times copied", "sent in all"), rows)


STEPS = {
    "pausing": "step-pausing",
    "before it was noticed": "step-pausing",
    "round under way": "step-dirty",
    "disks activated": "step-dirty",
    "what is dirty counted": "step-count",
    "last round": "step-last",
    "disks": "step-last",
    "both sides compared": "step-verify",
    "read back": "step-verify",
    "verification": "step-verify",
    "images closed": "step-close",
    "exports ended": "step-exports",
    "record synced": "step-record",
    "RAM and devices": "step-ram",
    "RAM, devices, start": "step-ram",
    "guest started": "step-start",
    "resuming": "step-start",
}
"""The styles of the parts of a pause."""

LEVELS = {
    "level-none": "not copied yet",
    "level-empty": "nothing to send: zero, or in the base",
    "level-1": "once",
    "level-2": "twice",
    "level-3": "3 to 4 times",
    "level-4": "5 to 8 times",
    "level-5": "9 to 16 times",
    "level-6": "17 times or more",
}


def _style(passes: int, sent: float) -> str:
    if not passes:
        return "level-none"
    if not sent:
        return "level-empty"
    return f"level-{min(6, 1 + math.ceil(math.log2(passes)))}"


def _runs(column: Sequence[float], lowest: float, highest: float) -> Iterator[tuple[int, int, int]]:
    """Neighbouring bands of one shade: first, one after the last, shade; what has none is left out."""
    span = math.log(highest / lowest) or 1.0
    shades = [1 + min(SHADES - 1, int(math.log(sent / lowest) / span * SHADES)) if sent else 0 for sent in column]
    begin = 0
    for band in range(1, len(shades) + 1):
        if band == len(shades) or shades[band] != shades[begin]:
            if shades[begin]:
                yield begin, band, shades[begin]
            begin = band


def _share(part: float) -> str:
    return f"{part:.0%}" if part >= 0.01 else "< 1%"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:,.0f} ms"
