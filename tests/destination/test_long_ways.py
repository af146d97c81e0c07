"""How many requests are in flight on a connection: more on a long way, within a bound of bytes."""

from __future__ import annotations

import pytest

from qemu_blkmig.destination.mover import Settings, requests_for

MIB = 1 << 20


def settings(connections: int = 1, requests: int = 8, request_size: int = MIB) -> Settings:
    return Settings("/nowhere", "disk", connections, requests, request_size, 4096, None)


@pytest.mark.parametrize(
    ("round_trip", "wanted", "found"),
    [
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
    assert requests_for(wanted, round_trip) == found
