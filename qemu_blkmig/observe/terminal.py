"""The display on a terminal: some lines that are drawn anew in place, what is told standing above them.

The cursor stays visible and the terminal as it is, so that nothing has to be restored, whatever ends us. All is drawn
in the outlet's thread: the job's own only takes note of what is new.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from qemu_blkmig.engine.migration import Figures
from qemu_blkmig.observe.summary import Summary
from qemu_blkmig.outlet import Outlet

if TYPE_CHECKING:
    from qemu_blkmig.observe.screen import Screen

PACE = 0.2
"""Seconds between two drawings at least."""
REST = 1.0
"""Seconds after which it is drawn anyway: clocks tick, and windows change."""
BRIEF = 1.0
"""Seconds of a guest's pause in which nothing is drawn: there is better to be done."""
STILL = ("switchover", "verify", "handover")
UP, CLEAR_LINE, CLEAR_BELOW = "\x1b[{}A", "\x1b[K", "\x1b[J"


class Terminal:
    """Implements `Reporter`."""

    def __init__(self, stream: TextIO, size: Callable[[], tuple[int, int]] | None = None) -> None:
        self.summary = Summary()
        self._stream = stream
        self._size = size or self._ask_size
        self._screen: Screen | None = None
        self._drawn: list[int] = []
        self.outlet = Outlet(stream, self._compose, PACE, REST)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.outlet.close()

    def job(self, name: str) -> None:
        """The job's name."""
        self.summary.begin(name)

    def limits(self, downtime: float, rate: int | None) -> None:
        """The limits in force."""
        self.summary.limits(downtime, rate)

    def stage(self, name: str) -> None:
        """A phase begins."""
        self.summary.enter(name)
        self.outlet.wake()

    def figures(self, figures: Figures) -> None:
        """The engine's figures changed."""
        self.summary.update(figures)
        self.outlet.wake()

    def moving(self, disk: str, settled: int) -> None:
        """Bytes settled in the copy under way."""
        self.summary.moving(disk, settled)
        self.outlet.wake()

    def note(self, text: str) -> None:
        """A line above the others."""
        self.outlet.tell(text)

    def _compose(self, lines: Sequence[str], ended: bool) -> str:
        """What is new takes the place of what was drawn; then all is drawn anew, for the last time if it has ended."""
        if not self._in_front():
            self._drawn = []
            return "".join(f"{line}\n" for line in lines)
        summary = self.summary
        brief = summary.stage in STILL and summary.now() - summary.entered < BRIEF
        if brief and not lines and not ended:
            return ""
        width, height = self._size()
        # The last column stays free: some terminals wrap when it is written.
        shown = self._screened().lines(max(1, width - 1), height - 1)
        text = self._back(width) + "".join(f"{line}{CLEAR_LINE}\n" for line in lines)
        text += f"{CLEAR_LINE}\n".join(shown) + CLEAR_BELOW
        self._drawn = [_columns(line) for line in shown]
        return text + "\n" if ended else text

    def _back(self, width: int) -> str:
        """To where the lines begin that stand there; in a window that has become narrower, they take more room."""
        rows = sum(max(1, -(-columns // max(1, width))) for columns in self._drawn)
        return "\r" + (UP.format(rows - 1) if rows > 1 else "")

    def _screened(self) -> Screen:
        if self._screen is None:
            # Loaded here, in the thread that draws: it takes a tenth of a second.
            from rich.console import Console

            from qemu_blkmig.observe.screen import Screen

            self._screen = Screen(self.summary, Console(file=self._stream, force_terminal=True, soft_wrap=True))
        return self._screen

    def _ask_size(self) -> tuple[int, int]:
        with contextlib.suppress(OSError, ValueError):
            size = os.get_terminal_size(self._stream.fileno())
            if size.columns and size.lines:
                return size.columns, size.lines
        return 80, 24

    def _in_front(self) -> bool:
        """Whether the terminal is ours now; in the shell's background nothing is drawn over what others do there."""
        try:
            return os.tcgetpgrp(self._stream.fileno()) == os.getpgrp()
        except (OSError, ValueError):
            return True


def _columns(line: str) -> int:
    from rich.text import Text

    return Text.from_ansi(line).cell_len
