"""When a migration switches over: at once, when it is told to, or at a time of day."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from qemu_blkmig.errors import UsageError

FORMS = "auto, manual or at=TIME"
LOOK = 1.0
"""Seconds between two looks at the clock: it may be set, and the host may sleep, meanwhile."""


@dataclass(frozen=True)
class Moment:
    """`waits`: the disks are kept in step until somebody says so, or until `at` (seconds since 1970)."""

    waits: bool = False
    at: float | None = None

    def __str__(self) -> str:
        if self.at is None:
            return "manual" if self.waits else "auto"
        return datetime.datetime.fromtimestamp(self.at).astimezone().isoformat(timespec="seconds")


AT_ONCE = Moment()


def parse_moment(text: str, now: Callable[[], float] = time.time) -> Moment:
    """`auto`, `manual`, or `at=` with HH:MM (the next one, local time) or an ISO time, local unless it has a zone.

    Raises `UsageError`, also for a time that is over.
    """
    if text in ("auto", "manual"):
        return Moment(waits=text == "manual")
    kind, _, when = text.partition("=")
    if kind != "at":
        raise UsageError(f"not a time to switch over: {text!r}", advice=f"write {FORMS}")
    at = _next(when, now()) if re.fullmatch(r"\d{1,2}:\d{2}", when) else _absolute(when)
    if at <= now():
        raise UsageError(f"{when} is over: it is {datetime.datetime.fromtimestamp(now()):%Y-%m-%d %H:%M}")
    return Moment(waits=True, at=at)


async def reached(at: float, sleep: Callable[[float], Awaitable[None]], now: Callable[[], float] = time.time) -> None:
    """Return when the wall clock shows `at`, however it is set meanwhile."""
    while (left := at - now()) > 0:
        await sleep(min(LOOK, left))


def _next(text: str, now: float) -> float:
    hour, minute = map(int, text.split(":"))
    today = datetime.datetime.fromtimestamp(now)
    try:
        moment = today.replace(hour=hour, minute=minute, second=0, microsecond=0)
    except ValueError as error:
        raise UsageError(f"not a time of day: {text!r}", advice="write HH:MM, such as 02:30") from error
    # A day on by the calendar, not by seconds: it may have 23 or 25 hours.
    return (moment if moment.timestamp() > now else moment + datetime.timedelta(days=1)).timestamp()


def _absolute(text: str) -> float:
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise UsageError(
            f"not a time: {text!r}", advice="write HH:MM, or 2030-01-31T02:30, or 2030-01-31T02:30+01:00"
        ) from error
