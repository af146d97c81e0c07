"""What a watchdog does with a job that cannot be settled yet: it stays, and leaves when it is asked to."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.job.record import Job, read_record
from qemu_blkmig.job.standin import ask_to_leave
from qemu_blkmig.places import STATE_VARIABLE

SCRIPT = """
import sys
from pathlib import Path
from qemu_blkmig.job import standin
from qemu_blkmig.job.record import Owner

async def settle(job, suspend):
    if (job.directory / "troubled").exists():
        raise BlockingIOError("no more processes")
    return standin.Settlement(Owner.SOURCE, decided=(job.directory / "mended").exists(), facts=["tried"])

standin.settle = settle
standin.FIRST_PAUSE = standin.LONGEST_PAUSE = 0.05
standin.stand_in(Path(sys.argv[1]), int(sys.argv[2]), told=False)
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A job whose source QEMU (this process) lives."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    job = Job.create()
    job.record.source_process = ProcessId.of(os.getpid())
    job.save_blocking()
    yield job
    job.remove()


@pytest.fixture
def watchdog(job: Job) -> Iterator[subprocess.Popen[str]]:
    """A process that stands in, and cannot settle the job before there is a file `mended` in its directory."""
    command = [sys.executable, "-c", SCRIPT, str(job.directory), str(job.lock)]
    process = subprocess.Popen(command, pass_fds=(job.lock,), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    job.release()
    yield process
    process.kill()
    process.communicate()


def until_it_persists(job: Job) -> None:
    while read_record(job.directory).settler is None:
        time.sleep(0.02)


def test_it_stays_until_the_job_is_settled_and_keeps_nobody_waiting(job: Job, watchdog: subprocess.Popen[str]) -> None:
    assert watchdog.stderr is not None
    said = watchdog.stderr.read()
    assert "tried" in said and "qemu-blkmig cleanup" in said
    until_it_persists(job)
    settler = read_record(job.directory).settler
    assert settler is not None and settler.alive, "it has let go of its output, and lives"
    with pytest.raises(Exception, match="still being worked on"):
        Job.load(job.record.job)
    (job.directory / "mended").touch()
    watchdog.wait(timeout=20)
    assert not job.directory.exists()


def test_whoever_takes_over_asks_it_to_leave_and_has_the_job_alone(job: Job, watchdog: subprocess.Popen[str]) -> None:
    until_it_persists(job)
    assert ask_to_leave(job.directory, 20)
    assert watchdog.wait(timeout=20) == 0
    taken = Job.load(job.record.job)
    taken.release()


def test_nobody_is_asked_to_leave_a_job_whose_coordinator_lives(job: Job) -> None:
    assert not ask_to_leave(job.directory, 0)


def test_a_terminal_that_was_stopped_does_not_keep_it_from_settling(job: Job) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    command = [sys.executable, "-c", SCRIPT, str(job.directory), str(job.lock)]
    process = subprocess.Popen(command, pass_fds=(job.lock,), stderr=writer)
    job.release()
    try:
        until_it_persists(job)
        (job.directory / "mended").touch()
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(writer)
        os.close(reader)


def test_it_ends_when_the_job_was_removed_under_it(job: Job, watchdog: subprocess.Popen[str]) -> None:
    until_it_persists(job)
    shutil.rmtree(job.directory)
    assert watchdog.wait(timeout=20) == 0


def test_what_it_never_reckoned_with_does_not_end_it(job: Job, request: pytest.FixtureRequest) -> None:
    (job.directory / "troubled").touch()
    watchdog: subprocess.Popen[str] = request.getfixturevalue("watchdog")
    assert watchdog.stderr is not None
    assert "no more processes" in watchdog.stderr.read()
    (job.directory / "mended").touch()
    (job.directory / "troubled").unlink()
    assert watchdog.wait(timeout=20) == 0
    assert not job.directory.exists()


NO_THREADS = """
import threading
start = threading.Thread.start

def refused(thread):
    if not (Path(sys.argv[1]) / "mended").exists():
        raise RuntimeError("can't start new thread")
    start(thread)

threading.Thread.start = refused
"""


def test_no_thread_to_be_had_does_not_end_it(job: Job) -> None:
    head, body = SCRIPT.split("async def settle", 1)
    (job.directory / "troubled").touch()
    script = f"{head}{NO_THREADS}async def settle{body}"
    command = [sys.executable, "-c", script, str(job.directory), str(job.lock)]
    watchdog = subprocess.Popen(command, pass_fds=(job.lock,), stderr=subprocess.PIPE, text=True)
    job.release()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            watchdog.wait(timeout=1)
        (job.directory / "mended").touch()
        (job.directory / "troubled").unlink()
        assert watchdog.wait(timeout=20) == 0
        assert not job.directory.exists()
    finally:
        watchdog.kill()
        watchdog.communicate()


STALLED = """
from qemu_blkmig.job import durable
write = durable.DurableFile._write

def stalled(self, *content):
    while not (Path(sys.argv[1]) / "flows").exists():
        standin.time.sleep(0.02)
    write(self, *content)

durable.DurableFile._write = stalled
standin.DECISION = 0.05
"""


def test_storage_that_stalls_does_not_keep_it_from_trying_again(job: Job) -> None:
    head, body = SCRIPT.split("async def settle", 1)
    body = body.replace(
        "    if", "    (job.directory / ('again' if job.record.settler else 'once')).touch()\n    if", 1
    )
    script = f"{head}{STALLED}async def settle{body}"
    command = [sys.executable, "-c", script, str(job.directory), str(job.lock)]
    watchdog = subprocess.Popen(command, pass_fds=(job.lock,), stderr=subprocess.DEVNULL)
    job.release()
    try:
        deadline = time.monotonic() + 5
        while not (job.directory / "again").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (job.directory / "again").exists()
        (job.directory / "mended").touch()
        (job.directory / "flows").touch()
        assert watchdog.wait(timeout=20) == 0
    finally:
        watchdog.kill()
        watchdog.wait()
