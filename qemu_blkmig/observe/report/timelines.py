"""Figures over a job's time: phases, rates, what is pending, what the last round was predicted to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qemu_blkmig.job.chronicle import Sample
from qemu_blkmig.observe.report import drawing
from qemu_blkmig.observe.report.axis import Mark, TimeAxis, clock, durations, rates, sizes, spell, thinned
from qemu_blkmig.observe.report.drawing import Curve, TimedFigure
from qemu_blkmig.observe.report.figure import Figure, Key, Table
from qemu_blkmig.observe.report.material import Material
from qemu_blkmig.units import show_bytes, show_rate, show_seconds

POINTS = 480
"""Points of a curve at most."""
ROWS = 40
"""Rows of a table at most."""
HEIGHT = 190
"""Pixels of a figure."""
NOTHING = "-"
"""Where nothing is known."""
LAST = ("switchover", "verify", "handover")
"""Phases in which nothing more is dirtied."""


@dataclass(frozen=True)
class View:
    """A job along an axis: all of its time, or its end, closer."""

    material: Material
    axis: TimeAxis

    @classmethod
    def whole(cls, material: Material) -> View:
        """All of it."""
        return cls(material, material.axis)

    @classmethod
    def end(cls, material: Material) -> View | None:
        """From the first round on, where that is but a small part of the whole."""
        axis = material.end_axis
        return cls(material, axis) if axis is not None else None

    def name(self, name: str) -> str:
        """A figure's id."""
        return f"{name}-end" if self.axis.first else name

    def samples(self, *, counted: bool = False) -> list[Sample]:
        """Figures along the axis; `counted`: only where it was known what is dirty."""
        samples = _counted(self.material) if counted else self.material.story.samples
        return _thinned([sample for sample in samples if self.axis.part(sample.time) >= 0])

    def figure(self, marks: Sequence[Mark]) -> TimedFigure:
        """An empty one."""
        return TimedFigure(self.axis, self.material.stretches, HEIGHT, marks)


def phases(view: View) -> Figure:
    """The line of phases."""
    material, name_ = view.material, view.name("phases")
    spent: dict[str, float] = {}
    for stretch in material.stretches:
        spent[stretch.name] = spent.get(stretch.name, 0.0) + stretch.seconds
    rows = [[name, MEANINGS.get(name, ""), spell(seconds)] for name, seconds in spent.items()]
    words = f"What was done when, {clock(material.axis.length)} in all."
    svg = drawing.phases(view.axis, material.stretches, "Line of the job's phases", f"{name_}-words")
    styles = {stretch.name: stretch.style for stretch in material.stretches}
    legend = [Key(styles[name], f"{name} {spell(seconds)}") for name, seconds in spent.items()]
    if view.axis.first:
        return Figure(name_, "Phases", "What was done when, from the first round on.", svg)
    return Figure(name_, "Phases", words, svg, legend, Table(("phase", "what is done", "time"), rows))


def rate(view: View) -> Figure | None:
    """Throughput and dirty rate."""
    samples = view.samples()
    carried = [each for each in view.material.throughput if view.axis.part(each[1]) > 0]
    dirtied = [sample.dirty_rate for sample in samples if sample.dirty_rate is not None]
    if not carried and not dirtied:
        return None
    limits = [sample.bandwidth for sample in samples if sample.bandwidth]
    highest = max([*(speed for _, _, speed in carried), *dirtied, 1 << 20])
    # A limit far beyond what was reached would leave the rest no room.
    limits = [limit for limit in limits if limit <= 2 * highest]
    scale = rates(max([highest, *limits]))
    figure = view.figure(scale.marks)
    figure.curve(Curve("throughput", list(_steps(carried, view.axis.start)), filled=True), scale)
    legend = [Key("throughput", "sent")]
    if dirtied:
        figure.curve(Curve("dirtied", [_point(each, each.dirty_rate) for each in samples]), scale)
        legend.append(Key("dirtied", "dirtied by the guest"))
    if limits:
        points = [_point(each, each.bandwidth if each.bandwidth in limits else None) for each in samples]
        figure.curve(Curve("limit", points), scale)
        legend.append(Key("limit", f"bandwidth limit, {show_rate(limits[-1])}"))
    words = f"MiB a second. Sent at {show_rate(highest if not carried else max(each[2] for each in carried))} at most"
    words += f"; the guest dirtied {show_rate(max(dirtied))} at most." if dirtied else "."
    return _finished(view, figure, "rate", "Throughput and dirty rate", words, legend)


def pending(view: View) -> Figure | None:
    """What still has to be copied."""
    samples = view.samples(counted=True)
    if not samples:
        return None
    scale = sizes(max(sample.pending for sample in samples))
    figure = view.figure(scale.marks)
    figure.curve(Curve("pending", [_point(each, each.pending) for each in samples], filled=True), scale)
    legend = [Key("pending", "still to be copied")]
    if any(sample.put_off for sample in samples):
        figure.curve(Curve("put-off", [_point(each, each.put_off or None) for each in samples]), scale)
        legend.append(Key("put-off", "of it put off: written all the time"))
    words = f"By powers of two. From {show_bytes(samples[0].pending)} to {show_bytes(samples[-1].pending)}."
    return _finished(view, figure, "pending", "Still to be copied", words, legend)


def predicted(view: View) -> Figure | None:
    """What the last round was predicted to take, and what it might."""
    samples = view.samples(counted=True)
    values = [sample.predicted for sample in samples if sample.predicted]
    limits = [sample.downtime for sample in samples if sample.downtime]
    if not values or not limits:
        return None
    limit, share = limits[-1], view.material.disks_share
    scale = durations(min(*values, limit * (share or 1.0)), max(*values, limit))
    figure = view.figure(scale.marks)
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
    return _finished(view, figure, "predicted", "Predicted downtime of the disks", f"{words}.", legend)


def figures_table(material: Material) -> Table:
    """The figures of the last three at some moments."""
    rows = []
    samples = material.story.samples
    for group in thinned(len(samples), ROWS):
        sample = samples[group[-1]]
        rows.append(moment(material, sample))
    return Table(("time", "phase", "sent", "dirtied", "still to be copied", "predicted", "round"), rows)


def moments(material: Material) -> list[tuple[float, float | None, list[str]]]:
    """Where moments lie on the whole axis and, if there is one, on the end's; and what the journal knew then."""
    end = material.end_axis
    return [
        (
            round(material.axis.part(sample.time), 5),
            round(end.part(sample.time), 5) if end is not None else None,
            moment(material, sample),
        )
        for sample in _moments(material)
    ]


def _moments(material: Material) -> list[Sample]:
    """As many of the end, where that is looked at closer, as of the rest."""
    samples, end = material.story.samples, material.end_axis
    split = next((at for at, each in enumerate(samples) if end is not None and end.part(each.time) >= 0), len(samples))
    return [*_thinned(samples[:split]), *_thinned(samples[split:])]


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


def _finished(view: View, figure: TimedFigure, name: str, title: str, words: str, legend: Sequence[Key]) -> Figure:
    name = view.name(name)
    return Figure(name, title, words, figure.svg(title, f"{name}-words"), legend)


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


def _steps(carried: Sequence[tuple[float, float, float]], start: float) -> Iterator[drawing.Point | None]:
    """Averages as steps, the first one cut off where the axis starts; of many neighbours the average."""
    for group in thinned(len(carried), POINTS):
        some = [carried[number] for number in group]
        began, ended = some[0][0], some[-1][1]
        speed = sum(speed * (end - begin) for begin, end, speed in some) / (ended - began)
        yield max(began, start), speed
        yield ended, speed
