"""Ctrl-C and its like: the first one cancels cleanly, is put off in a handover; a second one insists."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from qemu_blkmig.errors import SIGNALS, Interrupted, Refused


class Interrupts:
    """Turns signals into the cancellation of one task.

    In `deferred` (the handover) a signal is only remembered: what has begun there must be brought to an end, which
    takes moments. A second signal outside of it ends this process at once (after `on_insisted`), and the watchdog
    settles the job; None: there is no watchdog yet, and what is to be tidied up takes moments as well.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._deferring = False
        self._task: asyncio.Task[object] | None = None
        self.on_insisted: Callable[[], None] | None = None
        self.received: signal.Signals | None = None
        self._what: str | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for signals on behalf of the current task."""
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        for signum in SIGNALS:
            loop.add_signal_handler(signum, self._on_signal, signum)
        try:
            yield
        finally:
            for signum in SIGNALS:
                loop.remove_signal_handler(signum)

    @contextlib.contextmanager
    def before_there_is_a_job(self) -> Iterator[None]:
        """Watch as well; what comes before there is a job that would tell of it raises `Interrupted`."""
        with self.watching():
            try:
                yield
            except asyncio.CancelledError:
                if (interrupt := self.error("nothing was touched")) is None:
                    raise
                raise interrupt from None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """The handover: put signals off until it is over."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def settling(self) -> None:
        """The work is over, or failed and is being undone: a first signal is told so, a second one insists."""
        self._deferring = False
        self._task = None

    def cancel(self) -> None:
        """Cancel as the first Ctrl-C does. Raises `Refused` when the work is over, being undone, or handed over."""
        if self._deferring:
            raise Refused("the handover is under way, which takes moments: it is too late to cancel")
        if self.received is not None or self._task is None:
            raise Refused("the job is ending already")
        self._tell("cancelling, as asked from another terminal")
        self.received = signal.SIGINT
        self._what = "cancelled from another terminal"
        self._task.cancel()

    def error(self, state: str | None = None) -> Interrupted | None:
        """What ended the work, if that was an interrupt."""
        return None if self.received is None else Interrupted(self.received, self._what, state=state)

    def _on_signal(self, signum: signal.Signals) -> None:
        if self._deferring:
            self._tell("the handover is under way and takes moments: the interrupt waits for it")
            self.received = self.received or signum
        elif self.received is None:
            self._tell("interrupted: cancelling (interrupt again to insist)")
            self.received = signum
            if self._task is not None:
                self._task.cancel()
        elif self.on_insisted is not None:
            self._tell(
                "interrupted again: ending at once; the watchdog gives the guest back and tidies up, which takes "
                "moments (`qemu-blkmig jobs` lists the job until it has)"
            )
            self.on_insisted()
            os._exit(128 + signum)
