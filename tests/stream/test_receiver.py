"""What the loop that brings blocks into images waits for, with a writer whose operations end when it is told."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from qemu_blkmig.errors import ConnectionLost, DestinationWriteError
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.stream.channel import open_source
from qemu_blkmig.stream.events import CHUNK
from qemu_blkmig.stream.framing import PAGE_SIZE
from qemu_blkmig.stream.receiver import Landing, Receiver
from tests.stream.streams import block, disks_only

DATA = bytes(range(256)) * (CHUNK // 256)


class LateWriter:
    """Its own connection. The first write fails once three are under way; then one ends at each turn of the loop."""

    lost = False

    def __init__(self) -> None:
        self.connections = [self]
        self.under_way: list[Callable[[int], None]] = []
        self.failed = False
        self.descriptor = os.eventfd(1)

    def register(self, poller: select.poll) -> None:
        poller.register(self.descriptor, select.POLLIN)

    def drive(self) -> None:
        """Nothing to do."""

    def write(self, _data: memoryview, _offset: int, done: Callable[[int], None]) -> None:
        self.under_way.append(done)

    def settle(self) -> None:
        if len(self.under_way) > 2 or (self.failed and self.under_way):
            self.under_way.pop(0)(0 if self.failed else 28)
            self.failed = True

    def close(self) -> None:
        os.close(self.descriptor)


@pytest.fixture
def writer() -> Iterator[LateWriter]:
    made = LateWriter()
    yield made
    made.close()


def test_a_write_that_fails_is_raised_when_the_others_are_over(tmp_path: Path, writer: LateWriter) -> None:
    records = [block(b"d", number * CHUNK, DATA) for number in range(8)]
    (tmp_path / "stream").write_bytes(disks_only(records))
    control = Control()
    source = open_source(f"file:{tmp_path}/stream", control, print)
    landing = Landing("d", 8 * CHUNK, cast(Any, writer), None, reads_as_zero=True)
    receiver = Receiver(source, {"d": landing}, control, page_size=PAGE_SIZE, on_progress=lambda _: None)
    with pytest.raises(DestinationWriteError, match="No space left"):
        receiver.receive_disks()
    assert not writer.under_way
    assert not landing.in_flight
    source.abandon()
    control.close()


class Broken:
    """A writer whose server is gone when it writes, and its connection."""

    descriptor = 0

    def __init__(self) -> None:
        self.connections = [self]
        self.lost = False
        self.ended: list[Callable[[int], None]] = []

    def register(self, _poller: select.poll) -> None:
        """There is nothing to wait for."""

    def drive(self) -> None:
        """Nothing to do."""

    def write(self, _data: memoryview, _offset: int, done: Callable[[int], None]) -> None:
        self.lost = True
        self.ended.append(done)

    def settle(self) -> None:
        while self.ended:
            self.ended.pop()(errno.ENOTCONN)

    def loss(self, why: str) -> ConnectionLost:
        return ConnectionLost(why)


class Idle:
    """A writer of another disk, and its connection, which nobody may wait for once the first one's is gone."""

    lost = False
    descriptor = 0

    def __init__(self, other: Broken) -> None:
        self.connections = [self]
        self._other = other

    def register(self, _poller: select.poll) -> None:
        assert not self._other.lost

    def drive(self) -> None:
        """Nothing to do."""

    def settle(self) -> None:
        """Nothing to do."""


def test_a_server_that_is_gone_is_told_whatever_other_disks_there_are() -> None:
    reading, writing = os.pipe()
    os.write(writing, disks_only([block(b"a", 0, DATA)])[: 32 << 10])
    control = Control()
    source = open_source(f"fd:{reading}", control, print)
    broken = Broken()
    landings = {
        name: Landing(name, CHUNK, cast(Any, writer), None, reads_as_zero=True)
        for name, writer in (("a", broken), ("b", Idle(broken)))
    }
    receiver = Receiver(source, landings, control, page_size=PAGE_SIZE, on_progress=lambda _: None)
    with pytest.raises(ConnectionLost):
        receiver.receive_disks()
    assert not landings["a"].in_flight
    source.abandon()
    control.close()
    os.close(reading)
    os.close(writing)
