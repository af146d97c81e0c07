"""`--on-stall throttle`: slows the guest's disk writes just as far as its disks need to converge.

What the guest had is in the record before anything is changed, so that whoever settles the job gives it back
(`job.limits`): the coordinator, its watchdog, `cleanup`.

How far: rounds shrink when less is dirtied than is copied. At the share `q` of the copying speed each round is `q` of
the one before, and all of them together take at most 1 / (1 - q) of what copying takes that is dirty now. What is
written dirties more than its own length, at most a granule for each request; less, where the same places are written
again before a round comes, but a guest that is slowed does that less often. So it is taken to dirty twice as much a
byte as it was seen to, unless that is more than it can. Where that was wrong, the next share follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qemu_blkmig.engine.forecast import Outlook, time_to_converge
from qemu_blkmig.engine.migration import Figures
from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.limits import give_back
from qemu_blkmig.job.result import Slowed
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.qmp.throttle import LEAST, Written, limits, slow_writes, written
from qemu_blkmig.units import show_rate, show_seconds

SHARES = (0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
"""Of the copying speed, what may be dirtied: the first, and each next one where that was not enough."""
PATIENCE = 10.0
"""Seconds in which the coordinator must show a sign of life while the guest is slowed."""


@dataclass(frozen=True)
class Pace:
    """How a guest writes: bytes a second by disk, and the most that this can dirty on all of them."""

    rates: Mapping[str, float]
    most_dirtied: float


class Brake:
    """Slows the writes of a guest to `disks`. `figures` are told by the engine; all rates are bytes a second."""

    def __init__(self, life: Lifecycle, disks: Sequence[Disk], granularity: int, clock: Clock) -> None:
        """`granularity`: bytes that become dirty together."""
        self._life = life
        self._disks = disks
        self._granularity = granularity
        self._clock = clock
        self._looked: tuple[float, Mapping[str, Written]] | None = None
        self._wrote: Mapping[str, float] = {}
        self._limits: dict[str, float] = {}
        self._began = 0.0

    async def look(self) -> Pace:
        """How the guest has written since the last look; as if not at all at the first."""
        now, total = self._clock.now(), await written(self._life.source)
        before, self._looked = self._looked, (now, total)
        pace = Pace({disk.name: 0.0 for disk in self._disks}, 0.0)
        if before is None or now <= before[0]:
            return pace
        rates, most = {}, 0.0
        for disk in self._disks:
            then, since = before[1][disk.qdev], total[disk.qdev]
            rates[disk.name] = (since.length - then.length) / (now - before[0])
            most += rates[disk.name] + self._granularity * (since.requests - then.requests) / (now - before[0])
        return Pace(rates, most)

    async def press(self, figures: Figures, share: float, downtime: float) -> None:
        """Slow the guest so far that it dirties about `share` of what is copied.

        Raises `MigrationError` when the watchdog is not there, and what `Monitor.execute` raises.
        """
        pace = await self.look()
        if not self._limits:
            self._wrote, self._began = pace.rates, self._clock.now()
        target = share * (figures.speed or 0.0)
        dirtying = min(pace.most_dirtied, 2 * (figures.dirty_rate or 0.0))
        factor = target / dirtying if dirtying else 1.0
        self._limits = {name: max(LEAST, rate * factor) for name, rate in pace.rates.items()}
        await self._apply()
        self._tell(figures, target, downtime)

    async def _apply(self) -> None:
        source, record = self._life.source, self._life.job.record
        known = {disk.name: disk for disk in record.throttled}
        # What somebody else has given a disk meanwhile is its own from now on.
        own = [
            known[now.name] if now.name in known and known[now.name].explains(now) else now
            for now in await limits(source, self._disks)
        ]
        names = {disk.name: disk.group or f"{record.prefix}-throttle{number}" for number, disk in enumerate(own)}
        groups: dict[str, float] = {}
        for name, group in names.items():
            groups[group] = groups.get(group, 0.0) + self._limits[name]
        record.throttled = [disk.slower(int(groups[names[disk.name]])) for disk in own]
        await self._life.job.save()
        # From when the record says so nobody disarms it (`Lifecycle.disarm`).
        await self._life.watchdog.arm(PATIENCE)
        for disk in record.throttled:
            await slow_writes(source, disk, disk.rates[-1], names[disk.name])

    def _tell(self, figures: Figures, target: float, downtime: float) -> None:
        told = ", ".join(
            f"{name} to {show_rate(limit)} (it wrote {show_rate(self._wrote.get(name, 0.0))})"
            for name, limit in self._limits.items()
        )
        text = f"the guest's disk writes are slowed (--on-stall throttle): {told}"
        dirty, speed = sum(disk.dirty for disk in figures.disks), figures.speed or 1.0
        overhead = max(0.0, (figures.predicted or 0.0) - dirty / speed)
        bound = time_to_converge(Outlook(0, dirty, speed, target, overhead, downtime))
        self._life.reporter.note(f"{text}; it converges within {show_seconds(bound)} then" if bound else text)

    async def release(self) -> None:
        """Let the guest write as it may without us. Raises what `Monitor.execute` raises."""
        if not self._limits:
            return
        await give_back(self._life.job, self._life.source)
        self._life.disarm()
        self._limits.clear()
        self._looked = None
        self._life.reporter.note("the guest's disk writes are not slowed any more")

    def slowed(self) -> list[Slowed]:
        """How far the guest is slowed, for the result."""
        took = self._clock.now() - self._began
        return [Slowed(name, self._wrote.get(name, 0.0), limit, took) for name, limit in self._limits.items()]
