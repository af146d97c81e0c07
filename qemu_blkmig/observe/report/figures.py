"""What a report's figures show: made of a job's journal, each with its words and its table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from qemu_blkmig.job.chronicle import Sample
from qemu_blkmig.job.diskmap import BANDS, UNIT, DiskMap
from qemu_blkmig.observe.report import drawing
from qemu_blkmig.observe.report.axis import Mark, clock, durations, rates, sizes, thinned
from qemu_blkmig.observe.report.drawing import HIGH, WIDE, Curve, TimedFigure
from qemu_blkmig.observe.report.material import Material
from qemu_blkmig.units import show_bytes, show_rate, show_seconds

POINTS = 480
"""Points of a curve at most."""
ROWS = 40
"""Rows of a table at most."""
HEIGHT = 190
"""Pixels of a figure."""
SHADES = 6
"""Shades of what was sent at a time and place."""
NOTHING = "-"
"""Where nothing is known."""
HOT = 4
"""Times that a place is copied without being hot."""
PLACES = 8
"""Hot places that are named."""


@dataclass(frozen=True)
class Key:
    """A line of a figure's legend: its style and its name."""

    style: str
    name: str


@dataclass(frozen=True)
class Table:
    """What a figure shows, in words and numbers."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """`name`: its id on the page. `words`: what there is to see."""

    name: str
    title: str
    words: str
    svg: Markup
    legend: Sequence[Key] = ()
    table: Table | None = None


def phases(material: Material) -> Figure:
    """The line of phases."""
    spent: dict[str, float] = {}
    for stretch in material.stretches:
        spent[stretch.name] = spent.get(stretch.name, 0.0) + stretch.seconds
    rows = [[name, MEANINGS.get(name, ""), show_seconds(seconds)] for name, seconds in spent.items()]
    words = f"What was done when, {clock(material.axis.length)} in all."
    svg = drawing.phases(material.axis, material.stretches, "Line of the job's phases", "phases-words")
    styles = {stretch.name: stretch.style for stretch in material.stretches}
    legend = [Key(styles[name], f"{name} {show_seconds(seconds)}") for name, seconds in spent.items()]
    return Figure("phases", "Phases", words, svg, legend, Table(("phase", "what is done", "time"), rows))


def rate(material: Material) -> Figure | None:
    """Throughput and dirty rate."""
    carried, samples = material.throughput, _thinned(material.story.samples)
    dirtied = [sample.dirty_rate for sample in samples if sample.dirty_rate is not None]
    if not carried and not dirtied:
        return None
    limit = material.latest.bandwidth if material.latest else None
    highest = max([*(speed for _, _, speed in carried), *dirtied, 1 << 20])
    scale = rates(highest)
    figure = TimedFigure(material.axis, material.stretches, HEIGHT, scale.marks)
    figure.curve(Curve("throughput", list(_steps(carried)), filled=True), scale)
    figure.curve(Curve("dirtied", [_point(each, each.dirty_rate) for each in samples]), scale)
    legend = [Key("throughput", "sent"), Key("dirtied", "dirtied by the guest")]
    if limit is not None and limit <= scale.high:
        figure.level("limit", scale.part(limit), "bandwidth limit")
        legend.append(Key("limit", "bandwidth limit"))
    words = f"MiB a second. Sent at {show_rate(highest if not carried else max(each[2] for each in carried))} at most"
    words += f"; the guest dirtied {show_rate(max(dirtied))} at most." if dirtied else "."
    return Figure(
        "rate", "Throughput and dirty rate", words, figure.svg("Throughput and dirty rate", "rate-words"), legend
    )


def pending(material: Material) -> Figure | None:
    """What still has to be copied."""
    samples = _thinned(_counted(material))
    if not samples:
        return None
    scale = sizes(max(sample.pending for sample in samples))
    figure = TimedFigure(material.axis, material.stretches, HEIGHT, scale.marks)
    figure.curve(Curve("pending", [_point(each, each.pending) for each in samples], filled=True), scale)
    legend = [Key("pending", "still to be copied")]
    if any(sample.put_off for sample in samples):
        figure.curve(Curve("put-off", [_point(each, each.put_off or None) for each in samples]), scale)
        legend.append(Key("put-off", "of it put off: written all the time"))
    words = f"By powers of two. From {show_bytes(samples[0].pending)} to {show_bytes(samples[-1].pending)}."
    return Figure("pending", "Still to be copied", words, figure.svg("Still to be copied", "pending-words"), legend)


def predicted(material: Material) -> Figure | None:
    """What the last round was predicted to take, and what it might."""
    samples = _thinned(_counted(material))
    values = [sample.predicted for sample in samples if sample.predicted]
    limits = [sample.downtime for sample in samples if sample.downtime]
    if not values or not limits:
        return None
    limit, share = limits[-1], material.disks_share
    scale = durations(min(*values, limit * (share or 1.0)), max(*values, limit))
    figure = TimedFigure(material.axis, material.stretches, HEIGHT, scale.marks)
    figure.curve(Curve("predicted", [_point(each, each.predicted or None) for each in samples]), scale)
    figure.curve(Curve("limit", [_point(each, each.downtime) for each in samples]), scale)
    legend = [
        Key("predicted", "predicted last round of the disks"),
        Key("limit", f"downtime limit, {show_seconds(limit)}"),
    ]
    words = f"By powers of ten. From {show_seconds(max(values))} at most to {show_seconds(values[-1])} in the end"
    words += f"; the limit of the pause is {show_seconds(limit)}"
    if share is not None and share < 1:
        figure.curve(Curve("share", [_point(each, (each.downtime or 0) * share) for each in samples]), scale)
        legend.append(Key("share", f"the disks' part of it, {show_seconds(limit * share)}"))
        words += f", of which {show_seconds(limit * share)} are the disks'"
    title = "Predicted downtime of the disks"
    return Figure("predicted", title, f"{words}.", figure.svg(title, "predicted-words"), legend)


def figures_table(material: Material) -> Table:
    """The figures of the last three at some moments."""
    rows = []
    samples = material.story.samples
    for group in thinned(len(samples), ROWS):
        sample = samples[group[-1]]
        rows.append(moment(material, sample))
    return Table(("time", "phase", "sent", "dirtied", "still to be copied", "predicted", "round"), rows)


def moments(material: Material) -> list[tuple[float, list[str]]]:
    """Where moments lie, and what the journal knew then, as `figures_table` has it."""
    samples = _thinned(material.story.samples)
    return [(round(material.axis.part(sample.time), 5), moment(material, sample)) for sample in samples]


def moment(material: Material, sample: Sample) -> list[str]:
    """What is known of one moment."""
    phase = next((each.name for each in reversed(material.stretches) if each.began <= sample.time), "")
    sent = next((speed for began, ended, speed in material.throughput if began < sample.time <= ended), None)
    return [
        clock(round(material.axis.seconds(sample.time), 1)),
        phase,
        show_rate(sent) if sent is not None else NOTHING,
        show_rate(sample.dirty_rate) if sample.dirty_rate is not None else NOTHING,
        show_bytes(sample.pending),
        show_seconds(sample.predicted) if sample.predicted is not None else NOTHING,
        str(sample.round or NOTHING),
    ]


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
    legend = [Key(style, f"{LEVELS[style]} ({styles.count(style) / len(styles):.0%})") for style in known]
    words = (
        f"From the disk's beginning, row by row; each cell is {show_bytes(drawn.cell)}. The hottest were copied "
        f"{max(drawn.passes)} times."
    )
    svg = drawing.grid(styles, f"How often each part of {name} was copied", f"cells-{number}-words")
    return Figure(f"cells-{number}", "How often each part was copied", words, svg, legend)


def _times(material: Material, number: int, name: str, drawn: DiskMap) -> Figure:
    marks = [Mark(1 - part, show_bytes(drawn.size * part).replace(".0", "") if part else "0") for part in (0, 0.5, 1)]
    figure = TimedFigure(material.axis, material.stretches, HEIGHT, marks)
    axis = material.axis
    # What the job rested is in neither; so slots are counted back from where both are the same.
    end = axis.seconds(min(drawn.began + drawn.used * drawn.slot, material.ended))
    paths: dict[int, list[str]] = {}
    highest = max(drawn.picture) or 1.0
    lowest = min((sent for sent in drawn.picture if sent > 0), default=1.0)
    height = HIGH / BANDS
    for slot in range(drawn.used):
        began = max(0.0, end - (drawn.used - slot) * drawn.slot)
        left, width = began / axis.length * WIDE, max(1.0, drawn.slot / axis.length * WIDE)
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
    return Figure(f"times-{number}", "When each part was copied", words, svg)


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


MEANINGS = {
    "prepare": "checks; images, locks and exports are made",
    "waiting": "waits for a slot",
    "bulk": "the first pass over every disk",
    "standby": "disks are kept in step until the word is given",
    "dirty": "rounds: what the guest has written meanwhile is copied",
    "readback": "what was written is read back",
    "ram": "RAM moves; rounds go on",
    "switchover": "the guest is paused; the last round",
    "verify": "the rest is read back, or both sides are compared",
    "handover": "images are closed; the guest starts at the destination",
}

STEPS = {
    "pausing": "step-pausing",
    "before it was noticed": "step-pausing",
    "round under way": "step-dirty",
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


LAST = ("switchover", "verify", "handover")
"""Phases in which nothing more is dirtied."""


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


def _counted(material: Material) -> list[Sample]:
    """The figures at moments at which it was known what is dirty: right after a pass or a round it is not."""
    samples = material.story.samples
    if not any(sample.round for sample in samples):
        return samples
    last = next((each.began for each in material.stretches if each.name in LAST), material.ended)
    return [sample for sample in samples if sample.pending or sample.time >= last]


def _thinned(samples: Sequence[Sample]) -> list[Sample]:
    """Some of them: of neighbours, the one that was predicted to take longest."""
    return [
        max((samples[number] for number in group), key=lambda sample: sample.predicted or 0.0)
        for group in thinned(len(samples), POINTS)
    ]


def _point(sample: Sample, value: float | None) -> drawing.Point | None:
    return None if value is None else (sample.time, value)


def _steps(carried: Sequence[tuple[float, float, float]]) -> Iterator[drawing.Point | None]:
    """Averages as steps; of many neighbours the average."""
    for group in thinned(len(carried), POINTS):
        some = [carried[number] for number in group]
        began, ended = some[0][0], some[-1][1]
        speed = sum(speed * (end - begin) for begin, end, speed in some) / (ended - began)
        yield began, speed
        yield ended, speed


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:,.0f} ms"
