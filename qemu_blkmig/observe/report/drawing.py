"""Figures as SVG, drawn with drawsvg: as wide as there is room, their text never stretched, coloured by the page.

Places are told in percent of a figure's box, beside which its marks stand; curves lie in a drawing within, which is
stretched. Whatever a user or a guest has named stands in titles only, which drawsvg escapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import drawsvg as draw
from markupsafe import Markup

from qemu_blkmig.observe.report.axis import Mark, Scale, TimeAxis, spell
from qemu_blkmig.observe.report.material import Stretch

WIDE, HIGH = 1000, 100
"""Units of the stretched drawing."""
COLUMNS = 64
"""Cells in a row of a disk's map at most."""
CELL = 18
"""Pixels of a cell at most, its gap included."""

Point = tuple[float, float]
"""Seconds since 1970, and a value."""


class Viewport(draw.DrawingParentElement):  # type: ignore[misc]
    """An `svg` in an `svg`."""

    TAG_NAME = "svg"


class Line(draw.DrawingBasicElement):  # type: ignore[misc]
    """A straight line; drawsvg's own is a path, in which nothing is told in percent."""

    TAG_NAME = "line"


@dataclass(frozen=True)
class Curve:
    """Points in the style `name`; `filled`: with what is below them. None: the curve breaks off."""

    name: str
    points: Sequence[Point | None]
    filled: bool = False


class TimedFigure:
    """A figure over the time of a job, `height` pixels high, the phases behind it."""

    def __init__(self, axis: TimeAxis, stretches: Sequence[Stretch], height: int, scale: Sequence[Mark]) -> None:
        """`scale`: the marks at its left."""
        self._axis = axis
        self._svg = _blank(height, _timed(axis))
        self._inner = Viewport(
            x=0, y=0, width="100%", height="100%", viewBox=f"0 0 {WIDE} {HIGH}", preserveAspectRatio="none"
        )
        for stretch, left, right in _placed(axis, stretches):
            self._svg.append(
                draw.Rectangle(percent(left), 0, percent(right - left), "100%", class_=f"behind {stretch.style}")
            )
        for mark in scale:
            down = percent(1 - mark.part)
            self._svg.append(Line(x1=0, y1=down, x2="100%", y2=down, class_="grid"))
            self._svg.append(draw.Text(mark.text, 11, -6, down, class_="left"))

    def curve(self, curve: Curve, scale: Scale) -> None:
        """A curve, its values by `scale`."""
        for points in _unbroken(curve.points):
            shown = [(part, value) for when, value in points if (part := self._axis.part(when)) >= 0]
            if not shown:
                continue
            places = [f"{part * WIDE:.1f},{(1 - scale.part(value)) * HIGH:.2f}" for part, value in shown]
            if curve.filled:
                first, last = places[0].split(",")[0], places[-1].split(",")[0]
                below = f"M{first},{HIGH}L{'L'.join(places)}L{last},{HIGH}Z"
                self._inner.append(draw.Path(below, class_=f"area {curve.name}"))
            self._inner.append(draw.Path(f"M{'L'.join(places)}", class_=f"curve {curve.name}"))

    def shapes(self, name: str, path: str) -> None:
        """A shape in units of the stretched drawing."""
        self._inner.append(draw.Path(path, class_=name))

    def svg(self, title: str, described_by: str) -> Markup:
        """All of it; `described_by`: the id of what tells in words what there is to see."""
        self._svg.append(self._inner)
        for mark in self._axis.marks():
            kind = "below" if 0.02 < mark.part < 0.96 else "below first" if mark.part < 0.5 else "below last"
            self._svg.append(draw.Text(mark.text, 11, percent(mark.part), "100%", class_=kind, dy="15"))
        self._svg.append(Line(x1=0, y1=0, x2=0, y2="100%", class_="cursor"))
        return _finished(self._svg, title, described_by)


def phases(axis: TimeAxis, stretches: Sequence[Stretch], title: str, described_by: str) -> Markup:
    """The phases as a strip, their names in those that have room for it."""
    svg = _blank(34, f"{_timed(axis)} strip")
    for stretch, left, right in _placed(axis, stretches):
        box = Viewport(x=percent(left), y=0, width=percent(right - left), height="100%")
        shape = draw.Rectangle(0, 0, "100%", "100%", class_=f"{stretch.style}")
        shape.append_title(f"{stretch.name}, {spell(stretch.seconds)}")
        box.append(shape)
        if right - left > 0.08:
            kind = "inside" if right - left > 0.24 else "inside slim"
            box.append(draw.Text(stretch.name, 12, 6, "50%", class_=kind))
        svg.append(box)
    for mark in axis.marks():
        kind = "below" if 0.02 < mark.part < 0.96 else "below first" if mark.part < 0.5 else "below last"
        svg.append(draw.Text(mark.text, 11, percent(mark.part), "100%", class_=kind, dy="15"))
    svg.append(Line(x1=0, y1=0, x2=0, y2="100%", class_="cursor"))
    return _finished(svg, title, described_by)


def bar(parts: Sequence[tuple[str, str, float]], limit: float | None, title: str, described_by: str) -> Markup:
    """Parts of a whole side by side (style, name, seconds), and where the limit is."""
    total = sum(seconds for _, _, seconds in parts)
    whole = max(total, limit or 0.0) * 1.04 or 1.0
    svg = _blank(44, "figure strip")
    at = 0.0
    for style, name, seconds in parts:
        shape = draw.Rectangle(percent(at / whole), 0, percent(seconds / whole), "100%", class_=style)
        shape.append_title(f"{name}: {seconds * 1000:.1f} ms")
        svg.append(shape)
        at += seconds
    if limit is not None:
        place = percent(limit / whole)
        svg.append(Line(x1=place, y1=-6, x2=place, y2="100%", class_="level limit"))
        side = "below last" if limit / whole > 0.5 else "below first"
        svg.append(draw.Text(f"limit {limit * 1000:.0f} ms", 11, place, "100%", class_=side, dy="15"))
    svg.append(draw.Text("0", 11, 0, "100%", class_="below first", dy="15"))
    return _finished(svg, title, described_by)


def grid(styles: Sequence[str], title: str, described_by: str) -> Markup:
    """The cells of a disk in rows, each in its style."""
    columns = min(COLUMNS, math.ceil(math.sqrt(4 * len(styles))))
    rows = math.ceil(len(styles) / columns)
    svg = draw.Drawing(columns, rows, class_="figure cells", role="img").set_pixel_scale(CELL)
    for style in dict.fromkeys(styles):
        cells = (number for number, each in enumerate(styles) if each == style)
        path = "".join(f"M{number % columns} {number // columns}h.88v.88h-.88z" for number in cells)
        svg.append(draw.Path(path, class_=style))
    return _titled(svg, title, described_by)


def percent(part: float) -> str:
    """As SVG wants it."""
    return f"{part * 100:.3f}%"


def _timed(axis: TimeAxis) -> str:
    return "figure timed close" if axis.first else "figure timed"


def _placed(axis: TimeAxis, stretches: Sequence[Stretch]) -> Iterator[tuple[Stretch, float, float]]:
    """The stretches that reach into the axis: from where to where."""
    for stretch in stretches:
        left, right = max(0.0, axis.part(stretch.began)), axis.part(stretch.ended)
        if right > left:
            yield stretch, left, right


def _blank(height: int, style: str) -> draw.Drawing:
    """A drawing as wide as there is room."""
    return draw.Drawing(WIDE, height, class_=style, role="img").set_render_size("100%", height)


def _finished(svg: draw.Drawing, title: str, described_by: str) -> Markup:
    """Without the viewBox that drawsvg gives every drawing: with it all would be stretched, text and all."""
    return Markup(re.sub(r' viewBox="[^"]*"', "", _titled(svg, title, described_by), count=1))


def _titled(svg: draw.Drawing, title: str, described_by: str) -> Markup:
    svg.svg_args["aria-describedby"] = described_by
    svg.elements.insert(0, draw.Title(title))
    return Markup(svg.as_svg(header=""))


def _unbroken(points: Iterable[Point | None]) -> Iterator[list[Point]]:
    run: list[Point] = []
    for point in points:
        if point is not None:
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run
