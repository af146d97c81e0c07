"""Raw files and block devices written, at any length and alignment."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_blkmig.destination.writers import RawWriter

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture(params=["file", "512", "4096"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file, and loop devices with sectors of 512 and 4096 bytes, full of old data."""
    backing = tmp_path / "file"
    backing.write_bytes(os.urandom(SIZE))
    if request.param == "file":
        yield backing
        return
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    command = ["losetup", "--sector-size", request.param, "--show", "-f", str(backing)]
    device = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    yield Path(device)
    subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (512, 512), (4096 - 512, 8192), (MIB, 3 * MIB)])
def test_data_and_zeroes_land_where_they_belong_and_nowhere_else(destination: Path, offset: int, length: int) -> None:
    before = destination.read_bytes()
    descriptor = os.open(destination, os.O_RDWR)
    writer = RawWriter(descriptor)
    results: list[int] = []
    data = os.urandom(length)
    writer.write(memoryview(data), offset, results.append)
    writer.flush()
    assert destination.read_bytes() == before[:offset] + data + before[offset + length :]
    writer.zero(offset, length, results.append)
    writer.flush()
    assert destination.read_bytes() == before[:offset] + bytes(length) + before[offset + length :]
    assert results == [0, 0]
    writer.close()
    os.close(descriptor)


def test_zeroes_make_holes_in_a_file_and_are_known(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    descriptor = os.open(path, os.O_RDWR)
    writer = RawWriter(descriptor)
    writer.zero(MIB, 2 * MIB, lambda _error: None)
    assert [(each.offset, each.length) for each in writer.zeroes(0, SIZE)] == [(MIB, 2 * MIB)]
    assert path.stat().st_blocks * 512 == 2 * MIB
    assert path.stat().st_size == SIZE
    writer.close()
    os.close(descriptor)


def test_a_failed_write_is_told_by_its_errno(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    results: list[int] = []
    RawWriter(descriptor).write(memoryview(b"x"), 0, results.append)
    assert [os.strerror(each) for each in results] == ["Bad file descriptor"]


def test_what_was_allocated_beforehand_stays_so_when_zeroes_are_written(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, b"x" * (1 << 20))
    os.fsync(descriptor)
    results: list[int] = []
    writer = RawWriter(descriptor, keep_allocated=True)
    writer.zero(0, 1 << 20, results.append)
    assert results == [0]
    assert os.pread(descriptor, 1 << 20, 0) == bytes(1 << 20)
    assert os.fstat(descriptor).st_blocks * 512 >= 1 << 20
    writer.close()
    os.close(descriptor)
