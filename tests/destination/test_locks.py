"""Image locks, against real QEMU programs."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_blkmig.destination import locks
from tests.nbd.servers import running


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """An image, open for writing."""
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    opened = os.open(tmp_path / "image", os.O_RDWR)
    yield opened
    os.close(opened)


def qemu_io(image: Path, command: str) -> subprocess.CompletedProcess[str]:
    """What qemu-io says when it opens the image for writing."""
    return subprocess.run(["qemu-io", "-f", "raw", "-c", command, str(image)], capture_output=True, text=True)


@contextlib.contextmanager
def written_by_qemu(directory: Path, *options: str) -> Iterator[None]:
    """A qemu-nbd that has the image open: it listens before, but greets nobody until then."""
    listening = directory / "sock"
    with running(["qemu-nbd", "-t", "-f", "raw", "-k", str(listening), *options, str(directory / "image")], listening):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(listening))
            assert client.recv(1)
        yield


def test_a_locked_image_cannot_be_written_by_qemu_until_it_is_closed(tmp_path: Path, descriptor: int) -> None:
    second = os.dup(descriptor)
    assert locks.lock_as_writer(descriptor)
    os.close(second)
    assert 'Failed to get "write" lock' in qemu_io(tmp_path / "image", "write 0 512").stderr
    assert locks.in_use(tmp_path / "image")


def test_a_closed_image_can_be_written_by_qemu(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    opened = os.open(tmp_path / "image", os.O_RDWR)
    assert locks.lock_as_writer(opened)
    os.close(opened)
    assert qemu_io(tmp_path / "image", "write 0 512").returncode == 0


def test_what_qemu_writes_cannot_be_locked(tmp_path: Path, descriptor: int) -> None:
    with written_by_qemu(tmp_path):
        assert locks.in_use(tmp_path / "image")
        assert not locks.lock_as_writer(descriptor)
    assert locks.lock_as_writer(descriptor)


def test_what_qemu_only_reads_is_not_in_use(tmp_path: Path, descriptor: int) -> None:
    with written_by_qemu(tmp_path, "--read-only"):
        assert not locks.in_use(tmp_path / "image")


def test_two_writers_of_our_kind_exclude_each_other(tmp_path: Path, descriptor: int) -> None:
    other = os.open(tmp_path / "image", os.O_RDWR)
    assert locks.lock_as_writer(descriptor)
    assert not locks.lock_as_writer(other)
    assert locks.in_use(tmp_path / "image")
    os.close(other)


def test_two_jobs_exclude_each_other_and_qemu_does_not_mind(tmp_path: Path, descriptor: int) -> None:
    other = os.open(tmp_path / "image", os.O_RDWR)
    assert locks.lock_job(descriptor)
    assert not locks.lock_job(other)
    assert locks.in_use_by_job(tmp_path / "image")
    assert qemu_io(tmp_path / "image", "write 0 512").returncode == 0
    os.close(other)


def test_a_qemu_that_awaits_a_migration_does_not_mind_the_locks(tmp_path: Path, descriptor: int) -> None:
    """Both ways round: it starts while we write, and it may be there before us."""
    monitor = tmp_path / "qmp"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-display", "none", "-nodefaults", "-S", "-incoming", "defer"]
    command += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    command += ["-drive", f"if=virtio,format=raw,file={tmp_path / 'image'}"]
    assert locks.lock_as_writer(descriptor)
    with running(command, monitor):
        os.close(os.dup(descriptor))
        other = os.open(tmp_path / "image", os.O_RDWR)
        assert not locks.lock_as_writer(other)
        os.close(other)
    with running(command, monitor):
        assert locks.in_use(tmp_path / "image")


def test_an_image_that_a_qemu_awaits_with_can_be_locked(tmp_path: Path, descriptor: int) -> None:
    monitor = tmp_path / "qmp"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-display", "none", "-nodefaults", "-S", "-incoming", "defer"]
    command += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    command += ["-drive", f"if=virtio,format=raw,file={tmp_path / 'image'}"]
    with running(command, monitor):
        assert not locks.in_use(tmp_path / "image")
        assert locks.lock_as_writer(descriptor)
