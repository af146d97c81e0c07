"""A small process that outlives the coordinator and then brings the job to rest: no guest is left hanging.

Run as `python -m qemu_blkmig.job.watchdog JOB-DIRECTORY LOCK-FD COORDINATOR-PID`; the coordinator holds the other end
of its stdin and writes lines: `alive` once a second; `arm SECONDS` before it pauses, freezes or throttles, from when
on a coordinator that has not been heard for so long is ended (answered by `armed`); `disarm`; `done` when nothing is
left to be done; `persist` when what is left could not be done yet: then, and at the end of file without a word (the
coordinator is dead), the watchdog settles the job by its record, as often as it takes (`job/standin.py`).

Only the standard library is loaded until then, to be small.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qemu_blkmig.errors import MigrationError

HEARTBEAT = 1.0
"""Seconds between two signs of life."""
POLL = 0.05
"""Seconds between two looks for the watchdog's end."""
ANSWER = 5.0
"""Seconds in which a watchdog that stands must say that it is armed."""
DEATH = 10.0
"""Seconds in which a killed coordinator is gone; one that is stuck in its storage runs none of its code any more."""


class Watchdog:
    """The coordinator's handle on its watchdog process.

    It is no process of asyncio's: that kills what still runs when the loop is closed (seen with Python 3.13), and a
    watchdog that was not dismissed is meant to act then.
    """

    def __init__(self, process: subprocess.Popen[bytes], tell: int, answers: asyncio.StreamReader) -> None:
        self._process = process
        self._stdin = tell
        self._answers = answers
        self._heart = asyncio.get_running_loop().create_task(self._beat())

    @classmethod
    async def start(cls, directory: Path, lock: int) -> Watchdog:
        """Start the watchdog of the job in `directory`; it inherits the job's `lock`. Returns once it stands."""
        process = await asyncio.to_thread(
            subprocess.Popen, [sys.executable, "-m", __name__, str(directory), str(lock), str(os.getpid())],
            bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(lock,), start_new_session=True,
        )  # fmt: skip
        if process.stdin is None or process.stdout is None:
            raise OSError("the watchdog has no pipes")
        # One that hangs must not make us hang when its pipe is full.
        os.set_blocking(process.stdin.fileno(), False)
        answers = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(answers), process.stdout)
        watchdog = cls(process, process.stdin.fileno(), answers)
        if await watchdog._answer() != "standing":
            raise OSError(f"the watchdog did not start (exit status {await watchdog.wait_ended()})")
        return watchdog

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def arm(self, seconds: float) -> None:
        """From now on be ended, and the job settled, if no sign of life comes for `seconds`.

        Raises `MigrationError` when the watchdog does not say that it will: no guest may be paused without one.
        """
        self._tell(f"arm {seconds}")
        try:
            async with asyncio.timeout(ANSWER):
                answer = await self._answer()
        except TimeoutError:
            answer = "nothing"
        if answer != "armed":
            raise MigrationError(f"the watchdog (pid {self.pid}) is not there any more, or hangs (it said {answer})")

    async def wait_ended(self) -> int:
        """Return, with its exit status, when the watchdog has ended."""
        while (status := self._process.poll()) is None:  # noqa: ASYNC110 - only asyncio's own children tell
            await asyncio.sleep(POLL)
        return status

    def disarm(self) -> None:
        """Silence is no longer a reason to act; only the coordinator's end is."""
        self._tell("disarm")

    async def dismiss(self) -> None:
        """The job is settled: the watchdog ends without doing anything; one that hangs is killed."""
        self._heart.cancel()
        self._tell("done")
        try:
            async with asyncio.timeout(ANSWER):
                await self.wait_ended()
        except TimeoutError:
            self._process.kill()
            await self.wait_ended()

    def take_over(self) -> None:
        """The job could not be settled, which the user is told by us: it is the watchdog's now, which tries again."""
        self._heart.cancel()
        self._tell("persist")

    async def _beat(self) -> None:
        while True:
            self._tell("alive")
            await asyncio.sleep(HEARTBEAT)

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(self._stdin, f"{line}\n".encode())

    async def _answer(self) -> str:
        return (await self._answers.readline()).decode().strip()


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
