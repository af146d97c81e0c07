"""What is in flight on a connection: more on a long way, within a bound of bytes; of small requests, many."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from typing import Any, cast

import pytest

from qemu_blkmig.destination.mover import Settings, limits_for
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd.connection import Connection
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.nbd.plan import Action, Piece, Plan
from qemu_blkmig.nbd.pump import SMALL_ROOM, Driven, Lease, Limits, Pump
from qemu_blkmig.nbd.throttle import Throttle

MIB = 1 << 20


def settings(connections: int = 1, requests: int = 8, request_size: int = MIB) -> Settings:
    return Settings("/nowhere", "disk", connections, requests, request_size, 4096, None)


@pytest.mark.parametrize(
    ("round_trip", "wanted", "found"),
    [
        (0.0, settings(), 8),
        (0.0001, settings(), 8),
        (0.008, settings(), 16),
        (0.04, settings(), 32),
        (0.3, settings(), 32),
        (0.3, settings(request_size=64 << 10), 32),
        (0.3, settings(connections=2), 16),
        (0.3, settings(connections=8), 8),
        (0.3, settings(requests=64), 64),
    ],
)
def test_a_long_way_is_kept_full_within_32_mib(round_trip: float, wanted: Settings, found: int) -> None:
    assert limits_for(wanted, round_trip).requests == found


@pytest.mark.parametrize(("round_trip", "times"), [(0.0, 1), (0.0001, 1), (0.008, 2), (0.04, 4), (0.3, 4)])
def test_small_requests_have_more_room_on_a_long_way(round_trip: float, times: int) -> None:
    assert limits_for(settings(), round_trip).small == times * SMALL_ROOM


@pytest.mark.parametrize(
    ("length", "in_flight"),
    [(512, SMALL_ROOM // 8192), (4096, SMALL_ROOM // 8192), (65536, SMALL_ROOM // 65536), (MIB, 2), (3 * MIB, 2)],
)
def test_small_requests_are_bounded_by_their_bytes_and_large_ones_by_their_number(length: int, in_flight: int) -> None:
    extents = [Extent(2 * at * length, length) for at in range(1000)]
    source, sink, control = Slow(), Counting(), Control()
    connection = cast(Connection, source)
    plan = Plan(connection, extents, never_asked, look_from=1 << 40, disk="disk")
    Pump("disk", [connection], Limits(requests=2, request_size=MIB), Throttle()).run(plan, sink, control)
    source.close()
    control.close()
    assert source.most == in_flight
    assert sink.taken == sum(extent.length for extent in extents)


def never_asked(_zero: bool, _depth: int | None) -> Action:
    raise AssertionError("short extents are read without a lookup")


class Slow:
    """A source whose answers come together, when all that is asked for at once has been."""

    request_limit = 32 * MIB
    contexts: frozenset[str] = frozenset()
    lost = False

    def __init__(self) -> None:
        self.descriptor = os.eventfd(1)
        self._asked: list[tuple[list[tuple[Any, int]], object]] = []
        self.most = 0

    def read(self, _into: memoryview, _offset: int, completed: list[tuple[Any, int]], token: object) -> None:
        self._asked.append((completed, token))
        self.most = max(self.most, len(self._asked))

    def register(self, poller: select.poll) -> None:
        poller.register(self.descriptor, select.POLLIN)

    def drive(self) -> None:
        for completed, token in self._asked:
            completed.append((token, 0))
        self._asked.clear()

    def close(self) -> None:
        os.close(self.descriptor)


class Counting:
    """A sink that is done with everything at once."""

    failure: Exception | None = None
    connections: Sequence[Driven] = ()
    under_way = 0

    def __init__(self) -> None:
        self.taken = 0

    def data(self, lease: Lease) -> None:
        self.taken += len(lease.view)
        lease.release()

    def pass_over(self, piece: Piece) -> None:
        raise AssertionError(f"{piece} is data")

    def is_nothing(self, zeroes: Piece) -> bool:
        raise AssertionError(f"{zeroes} is data")

    def settle(self) -> None:
        pass
