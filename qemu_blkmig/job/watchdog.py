"""A small process that outlives the coordinator and then brings the job to rest: no guest is left hanging.

Run as `python -m qemu_blkmig.job.watchdog JOB-DIRECTORY LOCK-FD COORDINATOR-PID`; the coordinator holds the other end
of its stdin and writes lines: `alive` once a second; `arm SECONDS` before it pauses, freezes or throttles, from when
on a coordinator that has not been heard for so long is ended (answered by `armed`); `disarm`; `done` when nothing is
left to be done; `persist` when what is left could not be done yet: then, and at the end of file without a word (the
coordinator is dead), the watchdog settles the job by its record, as often as it takes (`job/standin.py`).

Only a little of the standard library is loaded until then, to be small, and there quickly. The coordinator's end of it
is `job.watchdog_client`.
"""

from __future__ import annotations

import enum
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

DEATH = 10.0
"""Seconds in which a killed coordinator is gone; one that is stuck in its storage runs none of its code any more."""


class Verdict(enum.Enum):
    """Why the watching is over."""

    DONE = "the job is settled"
    DEAD = "the coordinator is no more"
    OURS = "the coordinator could not settle the job"


def watch(stdin: int, coordinator: int, armed: Callable[[], None] = lambda: None) -> Verdict:
    """Watch until the coordinator has ended, or said that it has no more to do with the job.

    `armed` is called when it was armed.
    `coordinator` is a pidfd: a coordinator that is armed and silent for too long is ended before this returns.
    """
    limit: float | None = None
    heard = time.monotonic()
    pending = b""
    poll = select.poll()
    poll.register(stdin, select.POLLIN | select.POLLHUP)
    while True:
        wait = None if limit is None else max(0.0, heard + limit - time.monotonic()) * 1000
        if not poll.poll(wait):
            _end(coordinator)
            return Verdict.DEAD
        data = os.read(stdin, 4096)
        if not data:
            return Verdict.DEAD
        heard = time.monotonic()
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            match line.split():
                case [b"done"]:
                    return Verdict.DONE
                case [b"persist"]:
                    return Verdict.OURS
                case [b"arm", seconds]:
                    limit = float(seconds)
                    armed()
                case [b"disarm"]:
                    limit = None


def _end(coordinator: int) -> None:
    """Kill the coordinator and wait until it is gone, so that its QMP connections are free."""
    signal.pidfd_send_signal(coordinator, signal.SIGKILL)
    poll = select.poll()
    poll.register(coordinator, select.POLLIN)
    poll.poll(DEATH * 1000)


def _stand_in(directory: Path, lock: int, verdict: Verdict) -> None:
    """Settle the job; what that takes is only loaded now."""
    from qemu_blkmig.job.standin import stand_in

    stand_in(directory, lock, told=verdict is Verdict.OURS)


def _answer(word: bytes) -> None:
    """Tell the coordinator; one that is gone is told by the end of file on stdin."""
    try:
        os.write(sys.stdout.fileno(), word + b"\n")
    except BrokenPipeError:
        return


def main(arguments: list[str]) -> None:
    """The watchdog process."""
    directory, lock, parent = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    try:
        coordinator = os.pidfd_open(parent)
    except ProcessLookupError:
        _stand_in(directory, lock, Verdict.DEAD)
        return
    _answer(b"standing")
    verdict = watch(sys.stdin.fileno(), coordinator, lambda: _answer(b"armed"))
    if verdict is not Verdict.DONE:
        _stand_in(directory, lock, verdict)


if __name__ == "__main__":
    main(sys.argv[1:])
