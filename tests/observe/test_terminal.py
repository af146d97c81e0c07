"""The display on a terminal: it fits, redraws in place, and leaves the terminal as it was."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from qemu_blkmig.observe.screen import LEAST_WIDTH, MOST_WIDTH, Screen, spark
from qemu_blkmig.observe.summary import Summary
from qemu_blkmig.observe.terminal import Terminal
from tests.observe.sample import MIB, disk, figures

ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
GIB = 1 << 30


def summary(disks: int = 2, stage: str = "dirty", **more: float | None) -> Summary:
    """A job with all that can be told of it, a minute old."""
    now = 100.0
    told = Summary(lambda: now)
    told.job = "1a2b3c4d"
    told.limits(0.3, None)
    told.enter(stage)
    known = {"speed": 123.4 * MIB, "dirty_rate": 11.5 * MIB, "predicted": 0.084, "converges_in": None} | more
    named = [disk(f"vd{chr(97 + number)}", GIB, bulk_done=GIB, dirty=5 * MIB) for number in range(disks)]
    told.update(figures(*named, pending=5 * MIB, round=3, **known))
    now = 160.0
    return told


def console(encoding: str = "utf-8", **environment: str) -> Console:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    return Console(file=stream, force_terminal=True, color_system="256", _environ={"TERM": "xterm"} | environment)


def shown(told: Summary, width: int = 100, height: int = 30, where: Console | None = None) -> list[str]:
    """Its lines without their colours."""
    return [ESCAPES.sub("", line) for line in Screen(told, where or console()).lines(width, height)]


@pytest.mark.parametrize("disks", [1, 2, 30])
@pytest.mark.parametrize("stage", ["prepare", "bulk", "dirty", "ram"])
def test_it_fits_every_window(disks: int, stage: str) -> None:
    told = summary(disks, stage)
    for width in (1, 20, LEAST_WIDTH - 1, LEAST_WIDTH, 60, 79, 100, MOST_WIDTH, 300):
        for height in (1, 7, 8, 10, 24, 60):
            lines = shown(told, width, height)
            assert len(lines) <= height
            assert max(cell_len(line) for line in lines) <= width, (width, height)


def test_a_guest_that_can_move_is_told_so() -> None:
    lines = shown(summary())
    assert lines[0].startswith("copying what the guest has written  1:00")
    assert lines[0].endswith("job 1a2b3c4d, 1:00 in all")
    assert [line.split()[0] for line in lines[1:]] == ["all", "vda", "vdb", "dirtied", "pause"]
    assert "11.5 MiB/s" in lines[-2]
    assert lines[-1] == "pause     84 ms predicted, limit 300 ms, 5.0 MiB pending, round 3"


def test_a_guest_that_cannot_move_yet_is_told_when_it_may() -> None:
    assert "1.2 s predicted, fits in about 9.0 s, limit 300 ms" in shown(summary(predicted=1.2, converges_in=9.0))[-1]


def test_the_first_pass_tells_how_long_it_will_take() -> None:
    told = summary(1, "bulk")
    told.update(figures(disk("vda", GIB, bulk_done=GIB // 4), pending=GIB * 3 // 4, speed=12 * MIB))
    assert re.search(r"^vda +━+ +25 % +12\.0 MiB/s +1:04 left$", shown(told)[1])


def test_of_many_disks_those_that_are_under_way_are_shown() -> None:
    told = summary()
    disks = [disk(f"disk{number}", GIB, bulk_done=GIB if number < 20 else 0) for number in range(24)]
    told.update(figures(*disks))
    lines = shown(told, height=9)
    assert [line.split()[0] for line in lines if line.startswith("  disk")] == ["disk20", "disk21", "disk22", "disk23"]
    assert "  and 20 more" in lines


def test_no_color_is_heeded() -> None:
    coloured = "".join(Screen(summary(predicted=9.0), console()).lines(100, 30))
    plain = "".join(Screen(summary(predicted=9.0), console(NO_COLOR="1")).lines(100, 30))
    assert re.search(r"\x1b\[(\d+;)*3\d", coloured)
    assert not re.search(r"\x1b\[(\d+;)*(3|4|9|10)\d", plain)


def test_a_terminal_that_knows_no_blocks_gets_none() -> None:
    assert "".join(shown(summary(), where=console("ascii"))).isascii()


def test_the_highest_is_a_full_block_and_the_latest_stands_to_the_right() -> None:
    assert spark([0.0, 5.0, 10.0], 5, plain=False) == "  ▁▄█"
    assert spark([0.0, 0.0], 2, plain=False) == "▁▁"
    assert spark([], 3, plain=True) == "   "


class Window:
    """A terminal of some size that does what it is told, as far as our display tells it anything."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.rows = [""]
        self.row = 0

    def take(self, text: str) -> None:
        for piece in re.findall(r"\x1b\[\d*A|\x1b\[[KJ]|\x1b\[[\d;]*m|\r|\n|[^\x1b\r\n]+", text):
            if piece.endswith("A") and piece.startswith("\x1b"):
                self.row = max(0, self.row - int(piece[2:-1]))
            elif piece == "\x1b[J":
                del self.rows[self.row + 1 :]
            elif piece == "\n":
                self.row += 1
                if self.row == len(self.rows):
                    self.rows.append("")
            elif piece == "\r":
                self.fresh = True
            elif not piece.startswith("\x1b"):
                self.rows[self.row] = piece if self.fresh else self.rows[self.row] + piece
                self.fresh = False
                continue
            self.fresh = self.fresh or piece == "\n"

    def shrink(self, width: int) -> None:
        """What does not fit any more goes on in the next row, as terminals do it."""
        self.size = (width, self.size[1])
        self.rows = [row[place : place + width] for row in self.rows for place in range(0, max(1, len(row)), width)]
        self.row = len(self.rows) - 1


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Window:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    return Window(100, 24)


def display(window: Window) -> Terminal:
    """One that is drawn by hand."""
    made = Terminal(io.StringIO(), lambda: window.size)
    made.outlet.close()
    made._drawn = []
    made.summary = summary()
    made._screen = None
    return made


def test_it_is_drawn_in_place_and_notes_stand_above(window: Window) -> None:
    made = display(window)
    for lines in ([], ["a note"], [], ["another"]):
        window.take(made._compose(lines, False))
    window.take(made._compose([], True))
    assert [row.split()[0] for row in window.rows if row] == [
        "a", "another", "copying", "all", "vda", "vdb", "dirtied", "pause",
    ]  # fmt: skip
    assert window.rows[window.row] == "", "what comes next begins in a line of its own"


def test_a_window_that_becomes_narrower_keeps_nothing_of_what_was_drawn(window: Window) -> None:
    made = display(window)
    window.take(made._compose([], False))
    window.shrink(60)
    assert len(window.rows) > 6
    window.take(made._compose([], False))
    assert [row.split()[0] for row in window.rows] == ["copying", "all", "vda", "vdb", "dirtied", "pause"]
    window.shrink(30)
    window.take(made._compose([], False))
    assert len(window.rows) == 1 and window.rows[0].startswith("dirty ")


def test_fewer_lines_leave_nothing_behind(window: Window) -> None:
    made = display(window)
    window.take(made._compose([], False))
    made.summary.update(figures())
    window.take(made._compose([], False))
    assert [row.split()[0] for row in window.rows] == ["copying", "vda", "dirtied", "pause"]


def test_the_cursor_is_not_hidden_and_nothing_else_is_set(window: Window) -> None:
    text = display(window)._compose(["a note"], True)
    assert set(re.findall(r"\x1b\[[^A-Za-z]*([A-Za-z])", text)) <= {"A", "K", "J", "m"}


def test_while_the_guest_stands_still_nothing_is_drawn_at_first(window: Window) -> None:
    made = display(window)
    now = 0.0
    made.summary = Summary(lambda: now)
    made.summary.update(figures())
    made.summary.enter("switchover")
    assert made._compose([], False) == ""
    assert "a note" in made._compose(["a note"], False)
    now = 1.5
    assert "stands still" in made._compose([], False)
