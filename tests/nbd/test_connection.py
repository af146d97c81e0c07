"""Connections to servers that misbehave."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_blkmig.errors import ConnectionLost
from qemu_blkmig.nbd.connection import connect
from tests.nbd.servers import nbdkit


def test_a_server_that_does_not_answer_is_not_waited_for_without_end(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--filter=delay", "pattern", "size=1M", "rdelay=600") as listening:
        connection = connect(str(listening), "")
        completed: list[tuple[object, int]] = []
        connection.read(memoryview(bytearray(4096)), 0, completed, None)
        with pytest.raises(ConnectionLost, match=r"no answer within 0\.2 s"):
            connection.wait(completed, limit=0.2)
