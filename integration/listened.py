"""A run of the tool whose stderr is read as it comes, so that a test knows how far it is, and can hold it there."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from integration.lab import LabError, wait_until
from integration.tool import Outcome

MOMENT = 180.0
"""Seconds in which it must come to what is waited for, on a busy machine, where RAM may need several attempts."""
PHASES = ("prepare", "bulk", "dirty", "ram", "switchover", "verify", "handover")


def held_at(moment: str, go: Path, *, block: bool = False) -> list[str]:
    """The beginning of a command line that is held at the moment (`integration.held`) until the file `go` is there.

    `block`: with its event loop blocked.
    """
    go.unlink(missing_ok=True)
    return [sys.executable, "-m", "integration.held", moment, "block" if block else "hold", str(go)]


class Listened:
    """A running command; `go`: the file that lets it go on from where it is held."""

    def __init__(self, command: Sequence[str], go: Path) -> None:
        self._go = go
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        for line in self.process.stderr or ():
            self._said.append(line)

    @property
    def said(self) -> str:
        """Its stderr so far."""
        return "".join(line for line in list(self._said) if '"figures"' not in line)

    def _events(self) -> Iterator[dict[str, Any]]:
        for line in list(self._said):
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        def arrived() -> bool:
            if condition():
                return True
            if self.process.poll() is not None:
                self._listener.join(10)
                if not condition():
                    raise LabError(f"the tool ended before {what}: {self.said}")
            return condition()

        wait_until(arrived, what, MOMENT, lambda: self.said)

    def wait_stage(self, name: str) -> None:
        """Wait until the phase begins."""
        stages = PHASES[PHASES.index(name) :]
        self._wait(lambda: any(event.get("stage") in stages for event in self._events()), f"phase {name}")

    def wait_event(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> None:
        """Wait until it tells such an event."""
        self._wait(lambda: any(wanted(event) for event in self._events()), what)

    def wait_copying(self) -> None:
        """Wait until the bulk pass has begun to copy."""
        self.wait_stage("bulk")
        self._wait(lambda: any(event.get("percent", 0) > 0 for event in self._events()), "progress of the bulk pass")

    def wait_held(self) -> None:
        """Wait until it is held at its moment."""
        self._wait(lambda: any(event["event"] == "held" for event in self._events()), "the moment")

    def go_on(self) -> None:
        """Let it go on from where it is held."""
        # A timer may come when the laboratory is gone already.
        with contextlib.suppress(FileNotFoundError):
            self._go.touch()

    def signal(self, signum: int) -> None:
        """Send the coordinator a signal."""
        self.process.send_signal(signum)

    def outcome(self) -> Outcome:
        """Wait for its end, and for everybody's who talks to its stderr (the watchdog)."""
        try:
            self.process.wait(timeout=150)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the tool hung: {self.said}") from None
        self._listener.join(60)
        assert not self._listener.is_alive(), f"somebody keeps stderr open: {self.said}"
        stdout = self.process.stdout.read() if self.process.stdout else ""
        return Outcome(self.process.returncode, stdout, self.said)
