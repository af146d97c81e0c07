"""How a process that leads to an agent is started; no event loop is needed for that."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

AGENT = (sys.executable, "-m", "qemu_blkmig.destination.agent")
"""The command of an agent on this host."""


def start(command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process that is spoken with through pipes (`transport.piped`). Raises `OSError`.

    It is in a session of its own, so that Ctrl-C reaches only the coordinator.
    """
    return subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=env,
    )


def end_group(pid: int) -> None:
    """End a process of `start`, which was not waited for yet, with all that it started: an ssh's ProxyCommand, too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def end(process: subprocess.Popen[bytes]) -> None:
    """End the process of `start` at once, with all that it started, whatever it still says."""
    end_group(process.pid)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
