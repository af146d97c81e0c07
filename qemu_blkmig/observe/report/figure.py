"""What every figure of a report has: a drawing, words, a legend, and a table in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


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
