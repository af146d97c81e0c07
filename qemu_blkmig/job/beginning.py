"""What leads to the destination is begun as soon as that is known, while the rest of the program is loaded.

An agent of which nothing was asked yet has made nothing, and ends with its stdin: it may be begun before the job is
recorded.
"""

from __future__ import annotations

import contextlib
import subprocess
from types import TracebackType
from typing import Self

from qemu_blkmig.job.place import Local, Place
from qemu_blkmig.transport.starting import AGENT, start

END = 5.0
"""Seconds in which an agent that nobody has taken must end."""


class Beginning:
    """Begins the agent at `place`, if that is this host, with its block; one that nobody has taken ends with it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._agent: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if isinstance(self._place, Local):
            # What is wrong is told when it is started in earnest.
            with contextlib.suppress(OSError):
                self._agent = start(AGENT)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if (agent := self.take()) is not None:
            _end(agent)

    def take(self) -> subprocess.Popen[bytes] | None:
        """The agent, if it was begun and was not taken before; it is the caller's from now on."""
        agent, self._agent = self._agent, None
        return agent


def _end(agent: subprocess.Popen[bytes]) -> None:
    try:
        # It closes the pipes, and waits.
        agent.communicate(timeout=END)
    except subprocess.TimeoutExpired:
        agent.kill()
        agent.communicate()
