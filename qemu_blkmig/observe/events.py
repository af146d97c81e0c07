"""What --progress json tells: one object a line, `event` says which one."""

from __future__ import annotations

import msgspec


def utf8(text: str) -> str:
    """The text as JSON and labels of metrics can have it: it may name a file, whose name need not be UTF-8."""
    return text.encode(errors="backslashreplace").decode()


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """`time`: seconds since 1970."""

    time: float


class JobEvent(_Event, frozen=True, tag="job"):
    """The job begins, or is gone on with: its name, which `status`, `set`, `cancel` and others take."""

    job: str


class LimitsEvent(_Event, frozen=True, tag="limits"):
    """In force from now on: `downtime` in seconds, `bandwidth` in bytes a second (null: no limit)."""

    downtime: float
    bandwidth: int | None


class StageEvent(_Event, frozen=True, tag="stage"):
    """A phase begins."""

    stage: str


class DiskEvent(msgspec.Struct, frozen=True):
    """One disk, in bytes. `first_pass`: what the first pass has settled, the copy under way included."""

    name: str
    size: int
    first_pass: int
    copied: int
    zeroed: int
    skipped: int
    dirty: int
    rounds: int


class FiguresEvent(_Event, frozen=True, tag="figures"):
    """Some five a second: bytes, bytes a second, seconds; null: not known (yet).

    `percent`: of the first pass. `total`: of all disks. `pending`: what is still to be brought over; RAM is not among
    it. `round`: the dirty round, 0 before the first. `predicted_downtime`: of the last round, if it began now.
    `converges_in`: until that fits the limit; `confidence`: what such predictions were worth, from 0 to 1. `put_off`:
    the part of `pending` that is copied last because the guest writes it all the time.
    """

    stage: str
    percent: float
    total: int
    pending: int | None
    round: int
    speed: float | None
    dirty_rate: float | None
    predicted_downtime: float | None
    converges_in: float | None
    confidence: float | None
    put_off: int
    disks: list[DiskEvent]


class NoteEvent(_Event, frozen=True, tag="note"):
    """Something that the user should know."""

    text: str


Event = JobEvent | LimitsEvent | StageEvent | FiguresEvent | NoteEvent
