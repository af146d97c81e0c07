"""The job's record and lock."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.errors import RecordFailed, Refused
from qemu_blkmig.job.record import Job, Owner, Record, left_behind, read_record
from qemu_blkmig.places import STATE_VARIABLE


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of the test's own."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    return tmp_path / "state"


def test_what_is_saved_is_what_is_read(state: Path) -> None:
    job = Job.create()
    job.record.owner = Owner.UNDECIDED
    job.record.source_process = ProcessId(1, 2)
    job.save_blocking()
    assert read_record(job.directory) == job.record
    assert [record.job for record in left_behind()] == [job.record.job]
    job.remove()


def test_nothing_is_left_of_a_removed_job(state: Path) -> None:
    job = Job.create()
    runtime = job.runtime
    assert runtime.is_dir()
    job.remove()
    assert not runtime.exists()
    assert list(state.iterdir()) == []


def test_a_job_that_is_being_worked_on_cannot_be_loaded(state: Path) -> None:
    job = Job.create()
    with pytest.raises(Refused, match="still being worked on"):
        Job.load(job.record.job)
    job.release()
    loaded = Job.load(job.record.job)
    assert loaded.record == job.record
    loaded.remove()


def test_who_only_looks_whether_a_job_is_alive_does_not_keep_it_from_being_loaded(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job.create()
    job.release()
    looking = os.open(job.directory / "lock", os.O_RDWR)
    fcntl.flock(looking, fcntl.LOCK_SH)
    lock, tried = fcntl.flock, list[int]()

    def flock(descriptor: int, operation: int) -> None:
        tried.append(operation)
        if len(tried) == 3:
            lock(looking, fcntl.LOCK_UN)
        lock(descriptor, operation)

    monkeypatch.setattr("qemu_blkmig.job.record.fcntl.flock", flock)
    Job.load(job.record.job).remove()
    os.close(looking)


def test_an_unknown_job_is_refused(state: Path) -> None:
    with pytest.raises(Refused, match="no job 'nonesuch'"):
        Job.load("nonesuch")


def test_a_state_directory_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "file" / "state"))
    with pytest.raises(Refused, match="cannot make the job's directory"):
        Job.create()


def test_a_pid_that_was_given_anew_is_another_process() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        found = ProcessId.of(process.pid)
        assert found is not None
        assert found.alive
        assert not ProcessId(found.pid, found.start - 1).alive
        assert ProcessId(found.pid, found.start - 1).kill(1)
        assert process.poll() is None
        assert found.kill(5)
        assert not found.alive
    finally:
        process.kill()
        process.wait()


def test_nothing_is_left_where_a_job_cannot_be_made(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(state / "nonesuch"))
    with pytest.raises(Refused, match="cannot make the job's directory"):
        Job.create()
    assert list(state.iterdir()) == []


def test_a_record_of_a_job_that_an_older_version_began_is_read(state: Path) -> None:
    job = Job.create()
    job.save_blocking()
    told = json.loads((job.directory / "record.json").read_bytes())
    del told["untouched"]
    (job.directory / "record.json").write_text(json.dumps(told | {"unchanged": None}))
    assert read_record(job.directory) == job.record
    job.remove()


def test_a_damaged_record_is_told(state: Path) -> None:
    job = Job.create()
    (job.directory / "record.json").write_text("{")
    job.release()
    with pytest.raises(Refused, match="cannot be read"):
        Job.load(job.record.job)
    job.remove()


class Storage:
    """What a record is written to: it takes nothing until `ready` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ready = threading.Event()
        fsync = os.fsync

        def stalled(descriptor: int) -> None:
            self.ready.wait()
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", stalled)


async def test_storage_that_stalls_does_not_stop_the_event_loop(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.create()
    storage = Storage(monkeypatch)
    saving = asyncio.create_task(job.save())
    await asyncio.sleep(0)
    assert not saving.done()
    storage.ready.set()
    await saving
    job.remove()


async def test_saves_are_written_in_the_order_in_which_they_were_asked_for(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job.create()
    storage = Storage(monkeypatch)
    job.record.filling = True
    abandoned = asyncio.create_task(job.save())
    await asyncio.sleep(0)
    abandoned.cancel()
    job.record.recording = True
    last = asyncio.create_task(job.save())
    await asyncio.sleep(0)
    job.record.recording = False
    assert not read_record(job.directory).filling
    storage.ready.set()
    await last
    found = read_record(job.directory)
    assert (found.filling, found.recording) == (True, True)
    job.remove()


async def test_a_guest_that_stands_still_does_not_wait_for_storage_that_stalls(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job.create()
    storage = Storage(monkeypatch)
    with pytest.raises(RecordFailed, match=r"did not take it within 0.01 s"):
        await job.undecided(0.01)
    assert job.record.owner is Owner.SOURCE
    storage.ready.set()
    await job.save()
    assert read_record(job.directory).owner is Owner.SOURCE
    job.remove()


async def test_a_full_disk_is_told_and_the_record_stays_as_it_was(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.create()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        job.record.filling = True
        with pytest.raises(RecordFailed, match="cannot be written: No space left on device"):
            await job.save()
    assert not read_record(job.directory).filling
    job.remove()


async def test_a_job_that_cannot_be_woken_leaves_no_sockets_directory(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That was made anew to bring it to rest."""
    job = Job.create()
    await job.rest()
    made = job.runtime

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(Refused, match="No space left on device"):
            await job.wake()
    assert not made.exists()
    Job.load(job.record.job).remove()


def test_a_suspended_job_has_nothing_of_the_guest_s_run_state() -> None:
    """A pause that is seen when it goes on is somebody's."""
    record = Record("cafe", "/run", run_state_taken=True, told_to_pause=True, migrating=True)
    record.rest(target_ended=True)
    assert not (record.run_state_taken or record.told_to_pause or record.migrating)
