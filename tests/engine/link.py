"""A source, a link and a destination of any size, simulated in its own time; nothing is held but counts."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Mapping, Sequence

from qemu_blkmig.engine.device import DiskSpec
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.migration import BlockMigration, Tuning
from qemu_blkmig.engine.ports import CopyKind, CopyReport

GRANULE = 64 << 10


class Group(list[Extent]):
    """Some extents of which one can tell whether anybody still holds them."""

    __hash__ = object.__hash__  # type: ignore[assignment]


class Link:
    """All ports in one: a guest that dirties `writer` bytes a second, and a link that carries `speed`.

    What is dirty lies in granules with a gap after each, as far as the disk reaches, so nothing can be coalesced.
    `flush_time`, `harvest_time`: seconds that these take.
    """

    def __init__(self, size: int, speed: float, writer: float, flush_time: float = 0.002) -> None:
        self.size = size
        self.speed = speed
        self.writer = writer
        self.flush_time = flush_time
        self.harvest_time = 0.003
        self.time = 0.0
        self.paused = False
        self.recorded = 0.0
        self.requests = 0
        self.most_extents = 0
        self.most_groups = 0
        self.bulk_bytes = 0
        self.dirty_bytes = 0
        self.zeroes = False
        self._groups: weakref.WeakSet[Group] = weakref.WeakSet()

    def migration(self, tuning: Tuning | None = None) -> BlockMigration:
        return BlockMigration([DiskSpec("vda", self.size)], self, self, self, self, tuning or Tuning())

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self._pass(seconds)

    def _pass(self, seconds: float) -> None:
        self.time += seconds
        if not self.paused:
            self.recorded = min(self.recorded + self.writer * seconds, self.size / 2)

    async def is_paused(self) -> bool:
        return self.paused

    async def start(self) -> None:
        self.recorded = 0.0

    async def reattach(self) -> None:
        self._pass(0)

    async def stop(self) -> None:
        self.recorded = 0.0

    async def stand_ready(self) -> None:
        self._pass(0)

    async def verify_topology(self) -> Mapping[str, int]:
        return await self.pending()

    def _dirty(self) -> int:
        return int(self.recorded) // GRANULE * GRANULE

    async def pending(self) -> Mapping[str, int]:
        return {"vda": self._dirty()}

    async def harvest(self) -> LinkRound:
        self._pass(self.harvest_time)
        round_ = LinkRound(self, self._dirty())
        self.recorded -= round_.length
        return round_

    async def set_bandwidth(self, rate: int | None) -> None:
        self._pass(0)

    async def flush(self, disk: str) -> None:
        self._pass(self.flush_time)

    async def copy(self, disk: str, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        self.requests += 1
        self.most_extents = max(self.most_extents, len(extents))
        length = sum(extent.length for extent in extents)
        if kind is CopyKind.BULK:
            self.bulk_bytes += length
        else:
            self.dirty_bytes += length
        seconds = 0.001 if self.zeroes else length / self.speed
        self._pass(seconds)
        return CopyReport(0 if self.zeroes else length, length if self.zeroes else 0, 0, seconds)

    def hold(self, extents: list[Extent]) -> Group:
        group = Group(extents)
        self._groups.add(group)
        self.most_groups = max(self.most_groups, len(self._groups))
        return group


class LinkRound:
    """`length` bytes in granules, given out as they are asked for."""

    def __init__(self, link: Link, length: int) -> None:
        self._link = link
        self.length = length

    @property
    def dirty(self) -> Mapping[str, int]:
        return {"vda": self.length}

    async def extents(self, disk: str) -> AsyncIterator[Sequence[Extent]]:
        count = self.length // GRANULE
        for first in range(0, count, 1000):
            last = min(first + 1000, count)
            yield self._link.hold([Extent(2 * granule * GRANULE, GRANULE) for granule in range(first, last)])

    async def retire(self) -> None:
        self.length = 0

    async def restore(self) -> None:
        self._link.recorded += self.length
