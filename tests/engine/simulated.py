"""A guest, a link and a destination of any size, simulated in their own time, under the real engine.

The guest writes granules: areas of the disk get each their part of its writes, and within an area they fall anywhere,
or one after the other. Which granules a harvest finds dirty is drawn by chance then, by a seed; until then there is
only their number. So an hour of a busy guest costs no more than the rounds that are simulated.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from qemu_blkmig.engine.convergence import Policy, Verdict
from qemu_blkmig.engine.device import DiskSpec
from qemu_blkmig.engine.extents import Extent, union
from qemu_blkmig.engine.migration import BlockMigration, Tuning
from qemu_blkmig.engine.ports import CopyKind, CopyReport

MANY = 50_000
"""Granules of an area above which they are one run, wherever: which they are matters no more, and costs time."""
GROUP = 4096
"""Extents that a round gives at a time."""


@dataclass
class Area:
    """`count` granules from number `first`, which get `share` of the guest's writes.

    `sequential`: one after the other, and then from the first again.
    """

    first: int
    count: int
    share: float
    sequential: bool = False
    written: float = 0.0
    at: float = 0.0

    def number(self) -> int:
        """Granules that are dirty since the last harvest, as is to be expected."""
        if self.sequential:
            return min(self.count, int(self.at % 1 + self.written + 0.999) if self.written else 0)
        if self.count == 1:
            return int(self.written >= 1)
        return int(0.5 + self.count * (1 - (1 - 1 / self.count) ** self.written))

    def harvest(self, chance: random.Random) -> list[range]:
        """Their numbers, in disjoint runs; from now on none is dirty."""
        number = self.number()
        if self.sequential:
            found = self._run(int(self.at), number)
            self.at = (self.at + self.written) % self.count
        elif number > MANY:
            found = self._run(chance.randrange(self.count), number)
        else:
            found = [range(self.first + at, self.first + at + 1) for at in chance.sample(range(self.count), number)]
        self.written = 0.0
        return found

    def _run(self, at: int, number: int) -> list[range]:
        """So many from the area's number `at` on, and on from its first when it ends."""
        beyond = max(0, at + number - self.count)
        runs = [range(at, at + number - beyond), range(beyond)]
        return [range(self.first + run.start, self.first + run.stop) for run in runs if run]


@dataclass
class Writer:
    """A guest that writes `rate` bytes a second, in whole granules, to its areas."""

    rate: float
    areas: Sequence[Area] = field(default_factory=list)


def hot_spot(granules: int, rate: float, hot: float = 0.1, share: float = 0.9) -> Writer:
    """`share` of the writes go to the first part `hot` of the disk."""
    edge = max(1, int(granules * hot))
    return Writer(rate, [Area(0, edge, share), Area(edge, granules - edge, 1 - share)])


def zipf(granules: int, rate: float, areas: int = 24) -> Writer:
    """The granule at place n is written in proportion to 1/n; areas that double in size stand for the places."""
    edges = [0]
    while edges[-1] < granules and len(edges) <= areas:
        edges.append(min(granules, max(edges[-1] + 1, 2 * edges[-1])))
    edges[-1] = granules
    ranges = list(itertools.pairwise(edges))
    weights = [_weight(low, high) for low, high in ranges]
    return Writer(
        rate,
        [Area(low, high - low, weight / sum(weights)) for (low, high), weight in zip(ranges, weights, strict=True)],
    )


def _weight(low: int, high: int) -> float:
    """Of all places from `low` on below `high`; of a large area, some stand for all."""
    places = range(low + 1, high + 1, max(1, (high - low) // 1000))
    return sum(1 / place for place in places) * (high - low) / len(places)


def uniform(granules: int, rate: float) -> Writer:
    """Anywhere."""
    return Writer(rate, [Area(0, granules, 1.0)])


def sequential(granules: int, rate: float) -> Writer:
    """All of the disk, over and over."""
    return Writer(rate, [Area(0, granules, 1.0, sequential=True)])


def appender(granules: int, rate: float) -> Writer:
    """A log at the end of the disk that grows, and the few places that file systems write along with it."""
    return Writer(rate, [Area(0, 4, 0.05), Area(granules // 2, granules // 2, 0.95, sequential=True)])


class Simulation:
    """All ports in one. Bytes, bytes a second, seconds.

    `sent`: payload that has crossed the link, `sent_dirty` in rounds; `downtime`: how long the last round took with the
    guest paused; `slowed`: the part of its writes that the guest was left, from `stalled_at` on. `flush_time`,
    `harvest_time`: seconds that these take.
    """

    def __init__(
        self,
        size: int,
        speed: float,
        writer: Writer,
        *,
        granule: int = 64 << 10,
        seed: int = 1,
        flush_time: float = 0.002,
        counts_unique: bool = True,
    ) -> None:
        self.size = size
        self.speed = speed
        self.writer = writer
        self.granule = granule
        self.flush_time = flush_time
        self.harvest_time = 0.003
        self.time = 0.0
        self.paused = False
        self.sent = 0
        self.sent_dirty = 0
        self.downtime = 0.0
        self.slowed = 1.0
        self.stalled_at = 0.0
        self._counts_unique = counts_unique
        self._restored: Sequence[Extent] = ()
        self._crossed: set[int] = set()
        self._chance = random.Random(seed)

    def engine(self) -> BlockMigration:
        """The real engine, over all this."""
        tuning = Tuning(granule=self.granule, range_size=max(128 << 20, self.granule))
        return BlockMigration([DiskSpec("vda", self.size, 512)], self, self, self, self, tuning)

    async def migrate(self, policy: Policy, *, ram: float = 0.0, throttled_to: float | None = None) -> Verdict:
        """The whole migration, while whose `ram` seconds RAM migrates; whether it converged by itself.

        If not, the guest is slowed, if `throttled_to` says how many bytes a second it may dirty then, or just paused.
        """
        engine = self.engine()
        await engine.setup()
        await engine.bulk()
        verdict = await engine.converge(policy)
        if verdict is Verdict.STALLED and throttled_to is not None:
            self.slowed = throttled_to / self.writer.rate
            self.stalled_at = self.time
            await engine.converge(policy)
        if ram:
            self._stop_at, self._engine = self.time + ram, engine
            await engine.keep_in_step(policy)
        self.paused = True
        began = self.time
        await engine.complete()
        self.downtime = self.time - began
        await engine.finish()
        return verdict

    _stop_at: float | None = None
    _engine: BlockMigration

    @property
    def unique_dirty(self) -> int:
        """Bytes of the granules that dirty rounds have sent, each counted once."""
        return len(self._crossed) * self.granule

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self._pass(seconds)

    def _pass(self, seconds: float) -> None:
        self.time += seconds
        if not self.paused:
            for area in self.writer.areas:
                area.written += self.writer.rate * self.slowed * area.share * seconds / self.granule
        if self._stop_at is not None and self.time >= self._stop_at:
            self._stop_at = None
            self._engine.request_stop()

    async def is_paused(self) -> bool:
        return self.paused

    async def start(self) -> None:
        for area in self.writer.areas:
            area.written = 0.0

    async def reattach(self) -> None:
        self._pass(0)

    async def stop(self) -> None:
        self._restored = ()

    async def stand_ready(self) -> None:
        self._pass(0)

    async def verify_topology(self) -> Mapping[str, int]:
        return await self.pending()

    async def pending(self) -> Mapping[str, int]:
        dirty = sum(area.number() for area in self.writer.areas) * self.granule
        return {"vda": min(self.size, sum(extent.length for extent in self._restored) + dirty)}

    async def harvest(self) -> SimulatedRound:
        self._pass(self.harvest_time)
        runs = sorted(
            (run for area in self.writer.areas for run in area.harvest(self._chance)), key=lambda run: run.start
        )
        found = union(self._restored, (Extent(run.start * self.granule, len(run) * self.granule) for run in runs))
        self._restored = ()
        return SimulatedRound(self, found)

    def restore(self, extents: Sequence[Extent]) -> None:
        self._restored = union(self._restored, extents)

    async def set_bandwidth(self, rate: int | None) -> None:
        self._pass(0)

    async def flush(self, disk: str) -> None:
        self._pass(self.flush_time)

    async def copy(self, disk: str, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        length = sum(extent.length for extent in extents)
        self.sent += length
        if kind is CopyKind.DIRTY:
            self.sent_dirty += length
            for extent in extents if self._counts_unique else ():
                self._crossed.update(range(extent.offset // self.granule, -(-extent.end // self.granule)))
        seconds = length / self.speed
        self._pass(seconds)
        return CopyReport(length, 0, 0, seconds)


class SimulatedRound:
    """What a harvest found."""

    def __init__(self, simulation: Simulation, found: Sequence[Extent]) -> None:
        self._simulation = simulation
        self._found = found

    @property
    def dirty(self) -> Mapping[str, int]:
        return {"vda": sum(extent.length for extent in self._found)}

    async def extents(self, disk: str) -> AsyncIterator[Sequence[Extent]]:
        for first in range(0, len(self._found), GROUP):
            yield self._found[first : first + GROUP]

    async def retire(self) -> None:
        self._found = ()

    async def restore(self) -> None:
        self._simulation.restore(self._found)
