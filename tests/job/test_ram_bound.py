"""RAM that never converges: no real guest can be slowed for this under TCG (docs/decisions/009), hence fakes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qemu_blkmig.errors import Stalled
from qemu_blkmig.job.options import MigrateOptions, OnStall, Target
from qemu_blkmig.job.place import Local
from qemu_blkmig.job.rounds import disks_budget
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.job.switchover import Switchover


class FakeRam:
    """Goes over RAM once a look."""

    def __init__(self) -> None:
        self.count = 0
        self.allowed: list[float] = []

    async def allow(self, downtime: float) -> None:
        self.allowed.append(downtime)

    async def passes(self) -> int:
        self.count += 1
        return self.count


def run_with(on_stall: OnStall, done: list[str], predicted: float = 0.08) -> Any:
    """A switchover of which only what bounds RAM is there."""

    async def sleep(_seconds: float) -> None:
        done.append("slept")

    async def pause() -> None:
        done.append("paused")

    options = MigrateOptions(source="/s", target=Target(Local("/d"), qmp="/q"), max_rounds=3, on_stall=on_stall)
    clock: Any = SimpleNamespace(sleep=sleep, now=lambda: 0.0)
    life: Any = SimpleNamespace(job=None, reporter=SimpleNamespace(note=done.append), steering=Steering(0.3, None))
    connected: Any = SimpleNamespace(
        engine=SimpleNamespace(figures=lambda: SimpleNamespace(predicted=predicted)),
        log=None,
        verification=None,
        carriage=None,
        guest=SimpleNamespace(pause=pause),
        guard=SimpleNamespace(ignore_pauses=lambda: done.append("the pause is ours")),
    )
    unused: Any = None
    return Switchover(life, options, unused, SimpleNamespace(clock=clock), connected, (), unused)  # type: ignore[arg-type]


async def test_too_many_passes_abort_the_migration_when_so_asked() -> None:
    ram = FakeRam()
    with pytest.raises(Stalled, match="after 3 passes RAM"):
        await run_with(OnStall.ABORT, [])._bound_ram(ram)
    assert ram.count == 4


async def test_too_many_passes_pause_the_guest_when_so_asked() -> None:
    done: list[str] = []
    await run_with(OnStall.PAUSE, done)._bound_ram(FakeRam())
    assert done[-2:] == ["the pause is ours", "paused"]


async def test_whoever_waits_is_not_bound() -> None:
    ram = FakeRam()
    await run_with(OnStall.WAIT, [])._bound_ram(ram)
    assert ram.count == 2, "its first pass is waited for, and no more"


async def test_ram_is_allowed_ever_more_of_what_the_disks_leave_of_the_downtime() -> None:
    ram = FakeRam()
    await run_with(OnStall.WAIT, [])._bound_ram(ram)
    assert ram.allowed == [pytest.approx(share) for share in (0.0275, 0.055, 0.11, 0.22)]


async def test_a_burst_on_the_disks_takes_no_more_of_the_downtime_from_ram_than_the_disks_may_have() -> None:
    ram = FakeRam()
    await run_with(OnStall.WAIT, [], predicted=5.0)._bound_ram(ram)
    assert ram.allowed[-1] == pytest.approx(
        0.3 - disks_budget(MigrateOptions(source="/s", target=Target(Local("/d"), qmp="/q")), 0.3)
    )
