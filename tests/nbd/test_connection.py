"""Connections to servers that misbehave."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from qemu_blkmig.errors import ConnectionLost
from qemu_blkmig.nbd.binding import libnbd
from qemu_blkmig.nbd.connection import connect
from tests.nbd.servers import nbdkit


def test_a_server_that_does_not_answer_is_not_waited_for_without_end(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--filter=delay", "pattern", "size=1M", "rdelay=600") as listening:
        connection = connect(str(listening), "")
        completed: list[tuple[object, int]] = []
        connection.read(memoryview(bytearray(4096)), 0, completed, None)
        with pytest.raises(ConnectionLost, match=r"no answer within 0\.2 s"):
            connection.wait(completed, limit=0.2)


@pytest.mark.parametrize("structured", [True, False])
def test_the_memory_of_requests_is_given_back_when_they_are_over_and_not_before(
    tmp_path: Path, structured: bool
) -> None:
    with nbdkit(tmp_path, *([] if structured else ["--no-sr"]), "memory", "1M") as listening:
        connection = connect(str(listening), "")
        memory = bytearray(4096)
        completed: list[tuple[object, int]] = []
        for start in (connection.read, connection.write):
            start(memoryview(memory), 0, completed, None)
            with pytest.raises(BufferError):
                memory.clear()
            assert connection.wait(completed) == 0
            completed.clear()
        # As long as anybody holds it, its size cannot change.
        memory.clear()
        connection.close()


class _Troubled:
    """libnbd's handle, whose `poll` fails once and leaves the connection as it is."""

    def __init__(self, handle: Any, error: Exception) -> None:
        self._handle = handle
        self._errors = [error]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def poll(self, timeout: int) -> int:
        if self._errors:
            raise self._errors.pop()
        return int(self._handle.poll(timeout))


def test_an_error_after_which_libnbd_leaves_all_as_it_is_ends_what_is_under_way(tmp_path: Path) -> None:
    """It says so of POLLERR alone, say (nbd_poll)."""
    with nbdkit(tmp_path, "--filter=delay", "pattern", "size=1M", "rdelay=600") as listening:
        connection = connect(str(listening), "")
        connection._handle = _Troubled(connection._handle, libnbd().Error("server closed socket unexpectedly", 107))
        completed: list[tuple[object, int]] = []
        connection.read(memoryview(bytearray(4096)), 0, completed, "the read")
        connection.drive()
        with pytest.raises(ConnectionLost, match="the connection broke"):
            connection.wait(completed, limit=60)
        assert completed == [("the read", errno.ENOTCONN)]
