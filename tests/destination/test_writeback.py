"""Writing out begins in time, and ends with the writer."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from qemu_blkmig.destination.writeback import STRETCH, WriteBack


def test_writing_begins_with_every_stretch_and_not_before(tmp_path: Path) -> None:
    begun: list[str] = []
    seen = threading.Semaphore(0)

    def begin(descriptor: int) -> None:
        begun.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        seen.release()

    descriptor = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    write_back = WriteBack(descriptor, begin)
    write_back.wrote(STRETCH - 1)
    assert not begun
    write_back.wrote(1)
    assert seen.acquire(timeout=60)
    write_back.wrote(2 * STRETCH)
    assert seen.acquire(timeout=60)
    write_back.stop()
    assert begun == [str(tmp_path / "image")] * 2
    os.close(descriptor)


def _files() -> set[Path]:
    return {each for each in Path("/proc/self/fd").iterdir() if each.exists()}


def test_nothing_of_it_is_left_when_it_is_stopped(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    # What tests before have left may go meanwhile.
    threads, files = {*threading.enumerate()}, _files()
    write_back = WriteBack(descriptor)
    assert len({*threading.enumerate()} - threads) == 1 and _files() - files
    write_back.stop()
    assert not {*threading.enumerate()} - threads
    assert not _files() - files
    os.close(descriptor)


def test_an_end_that_comes_just_when_writing_is_to_begin_is_heard(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    write_back = WriteBack(descriptor, lambda _descriptor: None)
    clearing, told = threading.Event(), threading.Event()
    wanted = write_back._wanted
    clear, set_ = wanted.clear, wanted.set

    def clear_late() -> None:
        clearing.set()
        assert told.wait(60)
        clear()

    def set_and_tell() -> None:
        set_()
        told.set()

    wanted.clear = clear_late  # type: ignore[method-assign]
    write_back.wrote(STRETCH)
    assert clearing.wait(60)
    wanted.set = set_and_tell  # type: ignore[method-assign]
    ending = threading.Thread(target=write_back.stop, daemon=True)
    ending.start()
    ending.join(20)
    assert not ending.is_alive()
    os.close(descriptor)


def test_what_cannot_be_written_out_early_harms_nobody() -> None:
    reading, writing = os.pipe()
    write_back = WriteBack(writing)
    write_back.wrote(STRETCH)
    write_back.stop()
    os.write(writing, b"x")
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    os.close(writing)
