"""The watchdog's judgement: when to stand in for the coordinator, and when not."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from qemu_blkmig.job.watchdog import Verdict, watch
from qemu_blkmig.job.watchdog_client import Watchdog


class Coordinator:
    """A process in the coordinator's place, and the pipe that it would hold."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "60"])
        self.pidfd = os.pidfd_open(self.process.pid)
        self.reading, self.writing = os.pipe()
        self.verdict: list[Verdict] = []
        self._thread = threading.Thread(target=lambda: self.verdict.append(watch(self.reading, self.pidfd)))
        self._thread.start()

    def say(self, text: str) -> None:
        os.write(self.writing, text.encode())

    def hang_up(self) -> None:
        os.close(self.writing)
        self.writing = -1

    def judged(self) -> Verdict:
        self._thread.join(timeout=20)
        return self.verdict[0]

    def end(self) -> None:
        if self.writing >= 0:
            self.hang_up()
        self._thread.join(timeout=20)
        self.process.kill()
        self.process.wait()
        os.close(self.reading)
        os.close(self.pidfd)


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    coordinator = Coordinator()
    yield coordinator
    coordinator.end()


def test_end_of_file_without_a_word_means_to_stand_in(coordinator: Coordinator) -> None:
    coordinator.say("alive\n")
    coordinator.hang_up()
    assert coordinator.judged() is Verdict.DEAD


def test_done_means_to_leave(coordinator: Coordinator) -> None:
    coordinator.say("arm 30\nalive\ndo")
    coordinator.say("ne\n")
    assert coordinator.judged() is Verdict.DONE


def test_a_coordinator_that_could_not_settle_leaves_the_job_to_its_watchdog(coordinator: Coordinator) -> None:
    coordinator.say("alive\npersist\n")
    assert coordinator.judged() is Verdict.OURS


def test_an_armed_coordinator_that_is_silent_is_ended_first(coordinator: Coordinator) -> None:
    coordinator.say("arm 0.2\n")
    assert coordinator.judged() is Verdict.DEAD
    assert coordinator.process.wait(timeout=5) < 0


def test_a_silent_coordinator_that_is_not_armed_is_left_alone(coordinator: Coordinator) -> None:
    coordinator.say("arm 0.1\ndisarm\n")
    threading.Event().wait(0.4)
    assert coordinator.verdict == []
    assert coordinator.process.poll() is None


def test_a_coordinator_that_is_gone_before_the_watchdog_stands_is_no_traceback(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    command = [sys.executable, "-m", "qemu_blkmig.job.watchdog", str(tmp_path), "-1", str(gone.pid)]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


async def test_two_that_arm_it_at_once_are_both_answered(coordinator: Coordinator) -> None:
    answers = asyncio.StreamReader()
    watchdog = Watchdog(MagicMock(pid=1), coordinator.writing, answers)
    arming = asyncio.gather(watchdog.arm(30), watchdog.arm(30))
    await asyncio.sleep(0.05)
    answers.feed_data(b"armed\narmed\n")
    await arming
    watchdog.take_over()


async def test_who_is_cancelled_while_it_starts_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[subprocess.Popen[bytes]] = []
    popen, begun, may = subprocess.Popen, threading.Event(), threading.Event()

    def slow(*words: Any, **how: Any) -> subprocess.Popen[bytes]:
        begun.set()
        may.wait(20)
        made.append(popen(*words, **how))
        return made[0]

    monkeypatch.setattr(subprocess, "Popen", slow)
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    starting = asyncio.create_task(Watchdog.start(tmp_path, lock))
    await asyncio.to_thread(begun.wait, 20)
    starting.cancel()
    await asyncio.sleep(0)
    may.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    os.close(lock)
    try:
        assert made and made[0].poll() is not None, "the job, at rest by then, would be settled by it"
    finally:
        for process in made:
            process.kill()
            process.wait()
