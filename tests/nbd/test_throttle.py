"""The shared bandwidth limit, on a clock of its own."""

from __future__ import annotations

from qemu_blkmig.nbd.throttle import Throttle

MIB = 1 << 20


class Clock:
    """Time that stands still until it is told to go on."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_limit_nothing_waits() -> None:
    throttle = Throttle(Clock())
    throttle.take(1 << 40)
    assert throttle.delay() == 0.0


def test_one_request_always_proceeds_and_is_paid_for_afterwards() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.limit(MIB)
    assert throttle.delay() == 0.0
    throttle.take(4 * MIB)
    assert throttle.delay() == 4.0
    clock.now = 4.0
    assert throttle.delay() == 0.0


def test_over_a_long_time_the_rate_is_kept() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.limit(10 * MIB)
    taken = 0
    while clock.now < 100:
        delay = throttle.delay()
        clock.now += delay
        throttle.take(MIB)
        taken += MIB
    assert abs(taken - 1000 * MIB) <= 2 * MIB


def test_no_second_after_a_rest_holds_more_than_a_twentieth_beyond_the_limit() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.limit(10 * MIB)
    clock.now = 5.0
    taken = 0
    while clock.now <= 6.0:
        size = throttle.largest_request(4 * MIB)
        throttle.take(size)
        taken += size
        clock.now += throttle.delay()
    assert taken <= 10.5 * MIB


def test_idle_time_is_not_saved_up() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.limit(MIB)
    clock.now = 1000.0
    throttle.take(2 * MIB)
    assert throttle.delay() > 1.8


def test_a_higher_limit_counts_at_once() -> None:
    throttle = Throttle(Clock())
    throttle.limit(1024)
    throttle.take(MIB)
    throttle.limit(1024 * MIB)
    assert throttle.delay() < 0.01
    throttle.limit(None)
    assert throttle.delay() == 0.0


def test_a_lower_limit_does_not_wait_for_what_went_out_under_the_higher_one() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.limit(1024 * MIB)
    throttle.take(64 * MIB)
    throttle.limit(1 * MIB)
    assert throttle.delay() <= 64 / 1024
    clock.now = 0.1
    throttle.take(MIB)
    assert 0.8 < throttle.delay() <= 1.0, "but it holds from then on"


def test_a_low_limit_makes_requests_small() -> None:
    throttle = Throttle(Clock())
    assert throttle.largest_request(4 * MIB) == 4 * MIB
    throttle.limit(10 * MIB)
    assert throttle.largest_request(4 * MIB) == 256 << 10
    throttle.limit(1)
    assert throttle.largest_request(4 * MIB) == 64 << 10
