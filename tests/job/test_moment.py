"""When to switch over: how it is written, and that the clock may be set meanwhile."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator

import pytest

from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.moment import LOOK, Moment, parse_moment, reached


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place whose clocks are changed twice a year."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def stamp(text: str) -> float:
    """Seconds since 1970."""
    return datetime.datetime.fromisoformat(text).timestamp()


@pytest.mark.parametrize(
    ("written", "now", "meant"),
    [
        ("at=02:30", "2026-01-10T01:00+01:00", "2026-01-10T02:30+01:00"),
        ("at=02:30", "2026-01-10T02:30+01:00", "2026-01-11T02:30+01:00"),
        ("at=12:00", "2026-03-28T13:00+01:00", "2026-03-29T12:00+02:00"),
        ("at=2026-07-01T02:30", "2026-01-10T01:00+01:00", "2026-07-01T02:30+02:00"),
        ("at=2026-07-01T02:30Z", "2026-01-10T01:00+01:00", "2026-07-01T02:30+00:00"),
    ],
)
def test_a_time_is_local_and_ahead_unless_it_has_a_zone(written: str, now: str, meant: str) -> None:
    assert parse_moment(written, lambda: stamp(now)) == Moment(waits=True, at=stamp(meant))


@pytest.mark.parametrize("text", ["", "now", "at=", "at=25:00", "at=soon", "at=2001-01-01T00:00", "manual=1"])
def test_what_is_no_time_ahead_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_moment(text)


def test_the_words_are_understood() -> None:
    assert parse_moment("auto") == Moment()
    assert parse_moment("manual") == Moment(waits=True)


async def test_a_clock_that_is_set_forward_is_noticed_within_a_look_and_one_set_back_is_waited_for() -> None:
    clock = 0.0
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal clock
        slept.append(seconds)
        clock += seconds
        if len(slept) == 3:
            clock -= 50
        if len(slept) == 10:
            clock += 1e6

    await reached(1000.0, sleep, lambda: clock)
    assert len(slept) == 10
    assert max(slept) <= LOOK
