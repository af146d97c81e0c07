"""What people see of a running job: it fits the terminal, and leaves it as it was."""

from __future__ import annotations

import io

import pytest

from qemu_blkmig.observe.progress import Bar, Summary
from tests.observe.sample import MIB, disk, figures


def busy() -> Summary:
    """A job in its rounds, with all that can be told of it."""
    summary = Summary()
    summary.stage = "dirty"
    summary.update(figures(speed=123.4 * MIB, pending=5 * MIB, round=3, dirty_rate=11.5 * MIB, predicted=0.084))
    return summary


@pytest.mark.parametrize("width", range(1, 200))
def test_the_bar_never_is_wider_than_the_terminal(width: int) -> None:
    assert len(busy().bar(width)) <= width


def test_what_weighs_most_is_told_first_as_far_as_there_is_room() -> None:
    assert busy().bar(39) == "dirty      [=======] 100 %  123.4 MiB/s"
    wide = busy().bar(120)
    assert "123.4 MiB/s  predicted downtime 84 ms  dirtied at 11.5 MiB/s" in wide


def test_the_first_pass_has_a_speed_before_the_engine_tells_one() -> None:
    now = 0.0
    summary = Summary(lambda: now)
    summary.stage = "bulk"
    summary.update(figures())
    now = 2.0
    summary.moving("vda", 40 * MIB)
    assert summary.line() == "bulk 40 %, 20.0 MiB/s, 60.0 MiB pending"


def test_a_stage_of_which_nothing_is_known_is_just_named() -> None:
    assert Summary().line() == "prepare"


def test_the_bar_is_one_line_that_notes_stand_above_of() -> None:
    stream = io.StringIO()
    with Bar(stream, lambda: 60) as bar:
        bar.stage("bulk")
        bar.figures(figures(disk(bulk_done=50 * MIB), pending=50 * MIB))
        bar.note("a note")
    shown = [line.rpartition("\r\x1b[K")[2] for line in stream.getvalue().split("\n")]
    assert shown[0] == "a note"
    assert shown[1].startswith("bulk       [=") and " 50 %" in shown[1]
    assert shown[2] == ""
    assert "\x1b[?25" not in stream.getvalue(), "a hidden cursor would stay hidden when we are killed"
