"""How fast is copied beside a guest: a disk that becomes the slower the more is asked of it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from qemu_blkmig.engine.adaptive import LEAST, MIB, NOISE, RISE, START, Adaptive


@dataclass
class World:
    """A disk of `capacity` bytes a second that the guest and the copy share; a request takes `alone` seconds on an idle
    one. `link`: the most that can be copied."""

    capacity: float = 400 * MIB
    alone: float = 0.002
    guest: float = 50 * MIB
    link: float = 1000 * MIB

    def latency(self, copied: float) -> float:
        used = min(0.98, (self.guest + copied) / self.capacity)
        return self.alone / (1 - used)

    def copied(self, limit: float) -> float:
        return min(limit, self.link, self.capacity * 0.97 - self.guest)

    def run(self, adaptive: Adaptive, looks: int) -> list[float]:
        """What was copied between looks."""
        speeds = []
        for _ in range(looks):
            speed = self.copied(adaptive.limit)
            adaptive.look(self.latency(speed) if self.guest else None, speed)
            speeds.append(speed)
        return speeds


def test_it_comes_near_to_what_the_guest_bears_and_stays_there() -> None:
    world, adaptive = World(), Adaptive()
    speeds = world.run(adaptive, 60)
    assert speeds[0] == START
    assert adaptive.usual == pytest.approx(world.latency(START), rel=0.01)
    assert adaptive.usual is not None
    settled = speeds[30:]
    slowest = [world.latency(speed) for speed in settled]
    assert max(slowest) < 2 * RISE * adaptive.usual, "one step too far at most"
    assert sum(slowest) / len(slowest) < RISE * adaptive.usual
    assert min(settled) > 0.2 * world.capacity, "what is free is used"


def test_where_the_link_is_what_bounds_it_nothing_is_held_back() -> None:
    world, adaptive = World(link=60 * MIB), Adaptive()
    assert world.run(adaptive, 20)[-1] == world.link
    assert not adaptive.held
    assert adaptive.limit <= 4 * world.link, "and it can be held back at once"


def test_a_guest_that_begins_to_work_holds_it_back_and_one_that_rests_lets_it_go_again() -> None:
    world, adaptive = World(), Adaptive()
    before = world.run(adaptive, 40)[-1]
    world.guest = 300 * MIB
    during = world.run(adaptive, 12)
    assert adaptive.held
    assert min(during) < before / 2
    world.guest = 20 * MIB
    after = world.run(adaptive, 20)[-1]
    assert after > 2 * min(during)
    assert not adaptive.held


def test_a_guest_without_requests_holds_nothing_back() -> None:
    world, adaptive = World(guest=0), Adaptive()
    world.run(adaptive, 10)
    assert adaptive.limit > world.capacity / 2
    assert adaptive.usual is None


def test_a_disk_that_became_slow_by_itself_is_not_paid_for_for_good() -> None:
    world, adaptive = World(), Adaptive()
    world.run(adaptive, 20)
    world.alone *= 50
    world.run(adaptive, 12)
    assert min(world.run(adaptive, 40)[20:]) > LEAST
    assert adaptive.usual is not None and adaptive.usual > 0.05


def test_next_to_nothing_is_always_copied() -> None:
    adaptive = Adaptive()
    for latency in (0.001, *(1.0 * step for step in range(1, 8))):
        assert adaptive.look(latency, adaptive.limit) >= LEAST


def test_what_is_not_to_be_told_from_noise_holds_nothing_back() -> None:
    adaptive = Adaptive()
    adaptive.look(0.0001, START)
    adaptive.look(0.0001 + NOISE, adaptive.limit)
    assert not adaptive.held
    for _ in range(2):
        adaptive.look(0.0002 + NOISE, adaptive.limit)
    assert adaptive.held


def test_a_guest_that_is_slow_now_and_then_by_itself_is_not_taken_for_one_that_we_slow() -> None:
    adaptive, link, copied = Adaptive(), 500.0 * MIB, 0.0
    for second in range(600):
        speed = min(adaptive.limit, link)
        copied += speed
        adaptive.look(0.0002 if second // 5 % 2 else 0.005, speed)
    assert copied / 600 > link / 2


def test_a_look_at_which_hardly_anything_was_copied_tells_nothing() -> None:
    adaptive = Adaptive()
    adaptive.look(0.001, START)
    usual, limit = adaptive.usual, adaptive.limit
    for _ in range(5):
        adaptive.look(0.3, 0.0)
    assert adaptive.limit == limit
    assert usual is not None and adaptive.usual == pytest.approx(usual)
