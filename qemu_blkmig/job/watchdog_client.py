"""The coordinator's handle on its watchdog: starts it, shows it that we live, arms and dismisses it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path

from qemu_blkmig.destination.exits import ended
from qemu_blkmig.engine.outlast import outlast
from qemu_blkmig.errors import Refused, WatchdogGone
from qemu_blkmig.job import watchdog
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.transport.starting import end

HEARTBEAT = 1.0
"""Seconds between two signs of life."""
ANSWER = 5.0
"""Seconds in which a watchdog that stands must say that it is armed."""


class Watchdog:
    """The coordinator's handle on its watchdog process.

    It is no process of asyncio's: that kills what still runs when the loop is closed (seen with Python 3.13), and a
    watchdog that was not dismissed is meant to act then.
    """

    def __init__(self, process: subprocess.Popen[bytes], tell: int, answers: asyncio.StreamReader) -> None:
        self._process = process
        self._stdin = tell
        self._answers = answers
        self._stands = False
        self._arming = asyncio.Lock()
        self._heart = asyncio.get_running_loop().create_task(self._beat())

    @classmethod
    async def start(cls, directory: Path, lock: int) -> Watchdog:
        """Start the watchdog of the job in `directory`; it inherits the job's `lock`. It does not stand yet."""
        starting = await outlast(asyncio.to_thread(
            subprocess.Popen, [sys.executable, "-m", watchdog.__name__, str(directory), str(lock), str(os.getpid())],
            bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(lock,), start_new_session=True,
        ))  # fmt: skip
        process = starting.result()
        try:
            starting.raise_cancellation()
            if process.stdin is None or process.stdout is None:
                raise OSError("the watchdog has no pipes")
            # One that hangs must not make us hang when its pipe is full.
            os.set_blocking(process.stdin.fileno(), False)
            answers = asyncio.StreamReader()
            loop = asyncio.get_running_loop()
            await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(answers), process.stdout)
        except BaseException:
            # It would take us for dead, and settle a job that is at rest, or gone, by then.
            end(process)
            raise
        return cls(process, process.stdin.fileno(), answers)

    async def stand(self) -> None:
        """Return once it watches: nothing may be touched before. Raises `Refused` when it has failed to start."""
        if self._stands:
            return
        if await self._answer() != "standing":
            raise Refused(f"the watchdog did not start (exit status {await self.wait_ended()})")
        self._stands = True

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def arm(self, seconds: float) -> None:
        """From now on be ended, and the job settled, if no sign of life comes for `seconds`.

        Raises `WatchdogGone` when the watchdog does not say that it will: no guest may be paused without one.
        """
        async with self._arming:
            self._tell(f"arm {seconds}")
            try:
                async with time_limit(ANSWER):
                    answer = await self._answer()
            except TimeoutError:
                answer = "nothing"
        if answer != "armed":
            raise WatchdogGone(f"the watchdog (pid {self.pid}) is not there any more, or hangs (it said {answer})")

    async def wait_ended(self) -> int:
        """Return, with its exit status, when the watchdog has ended."""
        return await ended(self._process)

    def disarm(self) -> None:
        """Silence is no longer a reason to act; only the coordinator's end is."""
        self._tell("disarm")

    async def dismiss(self) -> None:
        """The job is settled: the watchdog ends without doing anything; one that hangs is killed."""
        self._heart.cancel()
        self._tell("done")
        try:
            async with time_limit(ANSWER):
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
