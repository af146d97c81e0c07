"""Verification as written: the destination reads back what it wrote, and what lies there otherwise is copied again.

It proves that what was read at the source is what lies at the destination; not that nothing was missed. It goes on in
the background while the guest runs, beside the first pass already, so that with the guest paused only the rest is to be
read back.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence

from qemu_blkmig.destination.protocol import VerifyReply
from qemu_blkmig.engine.convergence import Policy, Rate
from qemu_blkmig.engine.extents import Extent, union
from qemu_blkmig.engine.migration import BlockMigration, DiskFigures, Phase
from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import ContentsDiffer, DestinationFailed
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.units import show_bytes

SLICE = 32 << 20
"""Bytes that are read back in one request; copies make it shorter."""
BESIDE = 64 << 20
"""The same, beside the first pass, once so much is there: nobody waits for it, and a request has a price."""
AHEAD = 8 << 20
"""The same, of the rest, while the engine's last round is judged, which has a time limit."""
IDLE = 0.1
"""Seconds between two looks whether anything was written."""
SMALL = 0.05
"""Part of the budget in which the rest is to be read back, before the guest may be paused."""
MOST_MENDED = 1 << 30
"""Bytes of a disk that are copied again at most: storage that loses more is not to be trusted."""
PLACES = 8
"""Places that are named."""
PATIENCE = 60.0
"""Seconds in which a slice of the rest must be read back: the guest may be paused and must not wait for ever."""

ReadBack = Callable[[str, int, int | None], Awaitable[VerifyReply]]
"""Have about so many bytes of a disk read back; if a byte is told, of what lies before that, which is stable."""


class Verification:
    """Reads `disks` back by `read_back`, and has `engine` copy again what is not as it was written, once.

    Without disks nothing is done, and nothing is left to be done. `note` is told of what is copied again.
    """

    def __init__(
        self,
        read_back: ReadBack,
        disks: Sequence[str],
        engine: BlockMigration,
        note: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._read_back = read_back
        self._disks = list(disks)
        self._engine = engine
        self._note = note
        self._clock = clock
        self._left: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._mended: dict[str, Sequence[Extent]] = {}
        self._found: dict[str, list[Extent]] = {}
        self._amiss: Counter[str] = Counter()
        self._speed = Rate()
        self._checked = 0
        self._may_go_on = asyncio.Event()
        self._in_pass = False

    @property
    def wanted(self) -> bool:
        """Whether anything is verified at all."""
        return bool(self._disks)

    @property
    def read_back(self) -> int:
        """Bytes that were read back, each time that they were."""
        return self._checked

    @property
    def mended(self) -> int:
        """Bytes that were not as they had been written, and were copied again."""
        return sum(extent.length for extents in self._mended.values() for extent in extents)

    @contextlib.asynccontextmanager
    async def in_background(self) -> AsyncIterator[None]:
        """Read back while what is inside goes on; if that fails, by what `rest` raises too, what is inside is ended.

        Nothing is read before `beside_pass`.
        """
        try:
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(self._keep_reading())
                yield
                reading.cancel()
        except BaseExceptionGroup as group_of_errors:
            raise group_of_errors.exceptions[0] from group_of_errors

    @contextlib.contextmanager
    def beside_pass(self) -> Iterator[None]:
        """While the first pass is inside, what it has brought over and flushed is read back; from then on, all."""
        self._in_pass = True
        self._may_go_on.set()
        yield
        self._in_pass = False
        self._left.clear()
        self._tell_engine()

    def hold(self) -> None:
        """Begin nothing more in the background: the guest is paused. `release` ends it."""
        self._may_go_on.clear()

    def release(self) -> None:
        """Go on in the background."""
        self._may_go_on.set()
        self._tell_engine()

    @property
    def predicted(self) -> float:
        """Seconds in which what is left would be read back; 0 where nothing tells."""
        return sum(self._left.values()) / self._speed.value if self._speed.value else 0.0

    async def catch_up(self, policy: Policy, within: float = 0.0) -> None:
        """Keep the disks in step `until_caught_up`. Needs `in_background`. Raises as `BlockMigration.round` does."""
        if not self._disks:
            return
        try:
            async with asyncio.TaskGroup() as group:
                rounds = group.create_task(self._engine.keep_in_step(policy))
                await self.until_caught_up(policy, within)
                self._engine.request_stop()
                await rounds
        except BaseExceptionGroup as group_of_errors:
            raise group_of_errors.exceptions[0] from group_of_errors

    async def ahead(self) -> None:
        """Read back some of what is left, once all is copied; what is found amiss is for `rest` to tell.

        Raises as `AgentClient.request` does.
        """
        await asyncio.gather(*(self._read(disk, AHEAD) for disk in self._disks if self._is_left(disk)))

    async def rest(self) -> bool:
        """After `complete`: read back all that is left. False: something is to be copied again, and then read back.

        Raises `ContentsDiffer` when what was copied again is still not there, and as `AgentClient.request` does.
        """
        self.hold()
        await asyncio.gather(*(self._read_all(disk) for disk in self._disks if self._is_left(disk)))
        self._tell_engine()
        if self._engine.figures().phase is not Phase.COMPLETED:
            return False
        if left := {disk: left for disk, left in self._left.items() if left}:
            disk, length = next(iter(left.items()))
            raise DestinationFailed(f"{length} bytes were not read back, and are not to be copied again", disk=disk)
        return True

    def differ(self, disk: str, extents: Sequence[Extent]) -> None:
        """After `complete` both sides were compared, and differ there: it is to be copied again.

        Raises `ContentsDiffer` when it is too much for that.
        """
        if sum(extent.length for extent in extents) > MOST_MENDED:
            what = f"the two sides differ, and it is too much to be mended: {_places(extents)}"
            raise ContentsDiffer(what, disk=disk, offset=extents[0].offset)
        self._mended[disk] = extents
        self._note(f"disk {disk}: the two sides differ, and what does is copied again: {_places(extents)}")
        self._engine.owe(disk, extents)

    async def _keep_reading(self) -> None:
        while self._disks:
            await self._may_go_on.wait()
            there, checked = self._there(), 0
            enough = BESIDE if self._in_pass else 1
            for disk in self._disks:
                if self._may_go_on.is_set():
                    checked += await self._read(disk, BESIDE if self._in_pass else SLICE)
            # A pass may take hours, and need not go on for what may not be mended.
            if self._may_go_on.is_set() and (not self._in_pass or max(self._amiss.values(), default=0) > MOST_MENDED):
                self._tell_engine()
            if checked < enough:
                await self._until_there_may_be_more(there)

    async def _until_there_may_be_more(self, there: tuple[int, ...]) -> None:
        # The engine's figures are there at any time, and nobody waits for this.
        while self._there() == there or not self._may_go_on.is_set():
            await self._clock.sleep(IDLE / 10 if self._in_pass else IDLE)

    def _there(self) -> tuple[int, ...]:
        """What changes when there is more to be read back."""
        disks = self._engine.figures().disks
        if self._in_pass:
            return (1, *(disk.stable // BESIDE for disk in disks), *(disk.stable == disk.size for disk in disks))
        return (0, *(disk.copied + disk.zeroed for disk in disks))

    def _copied(self, disk: str) -> int:
        figures = self._figures(disk)
        return figures.copied + figures.zeroed

    def _figures(self, disk: str) -> DiskFigures:
        return next(each for each in self._engine.figures().disks if each.name == disk)

    def _is_left(self, disk: str) -> bool:
        """Whether anything may be left to be read back. What failed half way, and was not counted, is copied again."""
        return self._left.get(disk) != 0 or self._seen[disk] != self._copied(disk)

    async def until_caught_up(self, policy: Policy, within: float = 0.0) -> None:
        """Wait until what is left would be read back `within` seconds, or a small part of `policy.downtime`.

        Also ends when all that was there was read back once: what is left then is what the guest writes meanwhile.
        """
        while len(self._left) < len(self._disks):
            await self._clock.sleep(IDLE / 10)
        goal = self._checked + sum(self._left.values())
        while self._checked < goal:
            if self._speed.value and self.predicted <= max(within, SMALL * policy.downtime):
                return
            await self._clock.sleep(IDLE / 10)

    async def _read_all(self, disk: str) -> None:
        checked = 1
        while checked:
            try:
                async with time_limit(PATIENCE):
                    checked = await self._read(disk, SLICE) and self._left[disk]
            except TimeoutError:
                what = f"{show_bytes(SLICE)} of what was written could not be read back within {PATIENCE:.0f} s"
                raise DestinationFailed(what, disk=disk) from None

    async def _read(self, disk: str, most: int) -> int:
        began, copied = self._clock.now(), self._copied(disk)
        reply = await self._read_back(disk, most, self._figures(disk).stable if self._in_pass else None)
        self._seen[disk] = copied
        self._left[disk] = reply.left
        self._checked += reply.checked
        if reply.checked:
            self._speed.add(reply.checked, self._clock.now() - began)
        if reply.differ:
            found = self._sensible(disk, reply.differ)
            self._found.setdefault(disk, []).extend(found)
            self._amiss[disk] += sum(extent.length for extent in found)
        return reply.checked

    def _sensible(self, disk: str, differ: Sequence[tuple[int, int]]) -> list[Extent]:
        """What the agent tells, ascending: it reads once around."""
        size = self._figures(disk).size
        differ, end = sorted(differ), 0
        for offset, length in differ:
            if offset < end or length <= 0 or offset + length > size:
                raise DestinationFailed(f"the agent's answer makes no sense: {offset}, {length} differ", disk=disk)
            end = offset + length
        return [Extent(offset, length) for offset, length in differ]

    def _tell_engine(self) -> None:
        """Not in the midst of a completion: it takes something that is owed by then for a guest that still writes."""
        found, self._found = self._found, {}
        for disk, extents in found.items():
            extents.sort()
            self._judge(disk, extents)
            self._engine.owe(disk, extents)

    def _judge(self, disk: str, extents: Sequence[Extent]) -> None:
        mended = self._mended.get(disk, ())
        again = [*_twice(heapq.merge(mended, extents))]
        if again or self._amiss[disk] > MOST_MENDED:
            what = "twice not what was written" if again else "not what was written, and it is too much to be mended"
            raise ContentsDiffer(
                f"what was read back from the destination is {what}: {_places(again or extents)}",
                disk=disk,
                offset=(again or extents)[0].offset,
                advice="the destination's storage does not keep what it is given, or something else writes to the "
                "image: find out which before you try again",
            )
        self._mended[disk] = union(mended, extents)
        self._note(
            f"disk {disk}: what was read back from the destination is not what was written, it is copied again: "
            f"{_places(extents)}"
        )


def _twice(extents: Iterable[Extent]) -> Iterator[Extent]:
    """What of ascending extents lies in one before, too."""
    end = 0
    for extent in extents:
        if extent.offset < end:
            yield Extent(extent.offset, min(end, extent.end) - extent.offset)
        end = max(end, extent.end)


def _places(extents: Sequence[Extent]) -> str:
    named = ", ".join(f"{extent.length} bytes from offset {extent.offset}" for extent in extents[:PLACES])
    rest = extents[PLACES:]
    return named + (f", and {show_bytes(sum(extent.length for extent in rest))} more" if rest else "")
