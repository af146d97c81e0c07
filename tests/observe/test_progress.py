"""What people and programs see of a running job; whoever reads it, or does not, never holds up the job."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TextIO

import pytest

from qemu_blkmig import outlet as outlets
from qemu_blkmig.observe.progress import JsonLines, progress
from qemu_blkmig.observe.summary import Summary
from qemu_blkmig.observe.terminal import Terminal
from qemu_blkmig.outlet import Outlet
from tests.observe.sample import MIB, disk, figures


def busy() -> Summary:
    """A job in its rounds, with all that can be told of it."""
    summary = Summary()
    summary.enter("dirty")
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
    summary.enter("bulk")
    summary.update(figures())
    now = 2.0
    summary.moving("vda", 40 * MIB)
    assert summary.line() == "bulk 40 %, 20.0 MiB/s, 60.0 MiB pending"


def test_what_an_earlier_attempt_has_brought_is_no_speed_of_a_later_one() -> None:
    now = 0.0
    summary = Summary(lambda: now)
    summary.enter("bulk")
    summary.update(figures())
    now = 50.0
    summary.begin("1a2b3c4d")
    summary.update(figures(disk(bulk_done=60 * MIB)))
    now = 52.0
    assert summary.speed is None
    summary.moving("vda", 20 * MIB)
    assert summary.speed == 10 * MIB


def test_a_job_that_is_gone_on_with_has_an_empty_bar_until_it_copies() -> None:
    summary = busy()
    assert "100 %" in summary.bar(60)
    summary.begin("1a2b3c4d")
    summary.enter("prepare")
    assert summary.bar(60).endswith("]   0 %") and summary.pending is None


def test_a_stage_of_which_nothing_is_known_is_just_named() -> None:
    assert Summary().line() == "prepare"


def test_lines_are_plain_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with progress("auto", stream) as display:
        display.stage("prepare")
        display.note("a note")
        display.stage("bulk")
    assert stream.getvalue() == "prepare\na note\nbulk\n"


@pytest.fixture
def full(tmp_path: Path) -> tuple[TextIO, int]:
    """A pipe that nobody empties, and its other end."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
    return os.fdopen(writer, "w"), reader


@pytest.mark.parametrize("kind", ["json", "auto", "bar"])
def test_who_does_not_read_does_not_hold_up_the_job(
    kind: str, full: tuple[TextIO, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlets, "PATIENCE", 0.01)
    stream, reader = full
    with progress(kind, stream) as display:
        for number in range(2 * outlets.MOST):
            display.stage("bulk")
            display.figures(figures(pending=number))
            display.note("a note")
    os.close(reader)


def test_a_terminal_that_goes_on_after_the_end_is_told_the_rest_but_nothing_is_drawn_any_more(
    full: tuple[TextIO, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlets, "PATIENCE", 0.01)
    stream, reader = full
    with progress("bar", stream) as display:
        assert isinstance(display, Terminal)
        display.note("first")
        wait_until_it_writes(display.outlet)
        display.note("second")
    told = b""
    while b"second\n" not in told:
        told += os.read(reader, 1 << 16)
    display.outlet._thread.join()
    assert told.endswith(b"second\n")
    assert told.count(b"preparing") == 1, "what was being written when it was stopped"
    os.close(reader)


def wait_until_it_writes(outlet: Outlet) -> None:
    """Until its lines are on their way, which is as far as they get."""
    while outlet._lines:
        time.sleep(0.01)


def test_what_is_logged_meanwhile_does_not_either(full: tuple[TextIO, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlets, "PATIENCE", 0.01)
    stream, reader = full
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        with progress("auto", stream):
            logging.getLogger("test").error("a defect")
    finally:
        logging.getLogger().removeHandler(handler)
    assert handler.stream is stream, "it is given back"
    os.close(reader)


def test_who_reads_slowly_gets_every_line_but_only_the_latest_figures() -> None:
    reader, writer = os.pipe()
    outlet = Outlet(os.fdopen(writer, "w"))
    display = JsonLines(outlet)
    display.stage("bulk")
    for number in range(3):
        display._last = 0.0
        display.figures(figures(pending=number))
    display.note("a note")
    outlet.close()
    with os.fdopen(reader) as lines:
        told = [json.loads(line) for line in os.read(lines.fileno(), 1 << 20).decode().splitlines()]
    assert [each["event"] for each in told if each["event"] != "figures"] == ["stage", "note"]
    assert [each["pending"] for each in told if each["event"] == "figures"][-1] == 2


def test_who_went_away_is_no_reason_to_fail() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with progress("json", os.fdopen(writer, "w")) as display:
        display.note("nobody reads it")


def test_a_defect_in_the_drawing_leaves_plain_lines(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()

    def compose(_lines: object, _ended: bool) -> str:
        raise ZeroDivisionError

    outlet = Outlet(stream, compose)
    outlet.tell("a note")
    outlet.close()
    assert stream.getvalue() == "a note\n"
    assert "could not be drawn" in caplog.text


def test_the_status_is_told_when_it_is_asked_for() -> None:
    stream = io.StringIO()
    with progress("none", stream) as display:
        display.stage("bulk")
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stream.getvalue() == "bulk\n"
