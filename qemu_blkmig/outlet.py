"""The way of what is shown to a terminal, file or pipe: written by a thread, so that no reader holds up the job.

A terminal that was stopped (Ctrl-S), a pipe that nobody empties and a disk that hangs let a write wait for ever; were
it the job's own thread that writes, the guest would wait in the end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TextIO

log = logging.getLogger(__name__)

MOST = 1000
"""Lines that wait at most; the oldest ones go first."""
PIECE = 4096
"""Bytes that are written at once: what has gone on is seen after each."""
PATIENCE = 1.0
"""Seconds without a byte taken after which the end is not waited for any more."""

Compose = Callable[[Sequence[str], bool], str]
"""What is written for lines that wait; the second argument: nothing comes after it."""


class Outlet:
    """Writes to `stream`. Whoever tells it something, in whatever thread or signal handler, never waits.

    `compose` is called in the writing thread, with the lines that wait. With a `pace` (seconds) also when there are
    none: after each `wake`, but no more often than that, and every `rest` seconds.
    """

    def __init__(
        self, stream: TextIO, compose: Compose | None = None, pace: float | None = None, rest: float | None = None
    ) -> None:
        self._stream = stream
        try:
            # One of our own: a thread that waits for ever must not hold the stream's lock.
            stream.flush()
            self._descriptor = os.dup(stream.fileno())
        except (OSError, ValueError):
            self._descriptor = -1
        self._compose = compose or _plain
        self._pace = pace
        self._rest = rest
        # Reentrant: a signal handler may come while the same thread is inside.
        self._changed = threading.Condition(threading.RLock())
        self._lines: deque[str] = deque()
        self._passing: str | None = None
        self._awake = False
        self._ended = False
        self._writing_since: float | None = None
        self._gone = False
        self._thread = threading.Thread(target=self._run, name="outlet", daemon=True)
        self._thread.start()

    def tell(self, line: str) -> None:
        """Have the line written."""
        with self._changed:
            self._keep_passing()
            self._keep(line)
            self._changed.notify()

    def pass_by(self, line: str) -> None:
        """Have the line written, unless another one like it comes before its turn does."""
        with self._changed:
            self._passing = line
            self._changed.notify()

    def wake(self) -> None:
        """There is something new to be composed."""
        if not self._awake:
            with self._changed:
                self._awake = True
                self._changed.notify()

    def close(self) -> None:
        """Write what waits, as long as somebody takes it. Safe to call twice."""
        with self._changed:
            self._keep_passing()
            self._ended = True
            self._changed.notify()
        while self._thread.is_alive():
            since = self._writing_since
            if since is not None and time.monotonic() - since >= PATIENCE:
                # Should somebody take it later, nothing is drawn over what others have written by then.
                self._compose = _plain
                return
            self._thread.join(PATIENCE / 10)

    def write(self, text: str) -> int:
        """As a stream does it, for what logs: whole lines."""
        for line in text.splitlines():
            self.tell(line)
        return len(text)

    def flush(self) -> None:
        """As a stream has it."""

    def _keep(self, line: str) -> None:
        if len(self._lines) >= MOST:
            self._lines.popleft()
        self._lines.append(line)

    def _keep_passing(self) -> None:
        if self._passing is not None:
            self._keep(self._passing)
            self._passing = None

    def _run(self) -> None:
        ended = False
        while not ended:
            with self._changed:
                self._changed.wait_for(lambda: self._awake or self._lines or self._passing or self._ended, self._rest)
                self._keep_passing()
                lines, ended = list(self._lines), self._ended
                self._lines.clear()
                self._awake = False
            self._put(self._composed(lines, ended))
            if self._pace is not None and not ended:
                with self._changed:
                    self._changed.wait_for(lambda: self._ended, self._pace)
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _composed(self, lines: Sequence[str], ended: bool) -> str:
        try:
            return self._compose(lines, ended)
        except Exception:
            log.exception("what is shown could not be drawn, and is not any more")
            self._compose = _plain
            return _plain(lines, ended)

    def _put(self, text: str) -> None:
        """Write all of it; who does not listen any more is no reason to fail."""
        if self._gone or not text:
            return
        try:
            if self._descriptor < 0:
                self._stream.write(text)
                self._stream.flush()
                return
            data = text.encode(self._stream.encoding or "utf-8", errors="replace")
            while data:
                self._writing_since = time.monotonic()
                with contextlib.suppress(BlockingIOError):
                    data = data[os.write(self._descriptor, data[:PIECE]) :]
                    continue
                select.select([], [self._descriptor], [])
        except (OSError, ValueError):
            self._gone = True
        finally:
            self._writing_since = None


def _plain(lines: Sequence[str], _ended: bool) -> str:
    return "".join(f"{line}\n" for line in lines)
