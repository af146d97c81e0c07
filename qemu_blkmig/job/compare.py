"""Both sides of a disk compared by digests: what differs is found without carrying contents across.

The coordinator reads the source through its export, here; the agent its image, there; both at the same time. Only
digests cross. What the guest writes meanwhile is in the recording anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from qemu_blkmig.destination.protocol import Digests, DigestsReply
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import ConnectionLost, ContentsDiffer, DestinationFailed, SourceReadError
from qemu_blkmig.hashing import Algorithm
from qemu_blkmig.nbd.address import Export
from qemu_blkmig.nbd.connection import connect
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.nbd.digests import SECTOR, SLICE, UNIT, differing_units, digests_of
from qemu_blkmig.nbd.plan import ALLOCATION
from qemu_blkmig.nbd.reader import NbdReader
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.mover import carry_out, finished

_Here = TypeVar("_Here")
_There = TypeVar("_There")

FINE = 64 << 10
"""Bytes in which what differs is looked for to be copied: digests of all cost 0.03 % of the data, and a guest's small
writes are not sent as whole MiB."""
LEAST, SPEED = 60.0, 8 << 20
"""Seconds, and bytes a second, that bound a comparison: the guest may be paused and must not wait for ever."""
PATIENCE = 5.0
"""Seconds in which a read of the source must have ended once its connection was broken."""


class Comparison:
    """Compares open disks with their exports. Implements `engine.ports.Comparer`.

    `exports`: the source's, by disk, as they are reached from here.
    """

    def __init__(self, agent: AgentClient, exports: Mapping[str, Export], algorithm: Algorithm) -> None:
        self._agent = agent
        self._exports = exports
        self._algorithm = algorithm
        self._readers: dict[str, NbdReader] = {}

    async def differing(self, disk: str, extent: Extent) -> Sequence[Extent]:
        """See `Comparer`. Raises as `AgentClient.request` does, `ConnectionLost` and `SourceReadError`."""
        found: list[Extent] = []
        start = extent.offset // FINE * FINE
        for offset in range(start, extent.end, SLICE):
            end = min(offset + SLICE, extent.end)
            for each in await self._differing(disk, Extent(offset, end - offset), FINE):
                offset_within = max(each.offset, extent.offset)
                found.append(Extent(offset_within, each.end - offset_within))
        return found

    async def all_differing(self, disk: str, size: int, enough: int) -> list[Extent]:
        """What differs of the whole disk, of `size` bytes, that nobody writes to. Raises as above.

        When it is more than `enough` bytes, no more is looked for: the guest waits.
        """
        limit = LEAST + size / SPEED
        found: list[Extent] = []
        try:
            async with time_limit(limit):
                for offset in range(0, size, SLICE):
                    extent = Extent(offset, min(SLICE, size - offset))
                    for coarse in await self._differing(disk, extent, UNIT):
                        found += await self.differing(disk, coarse)
                    if sum(each.length for each in found) > enough:
                        break
        except TimeoutError:
            raise DestinationFailed(f"comparing both sides did not end within {limit:.0f} s", disk=disk) from None
        return found

    async def require_equal(self, disk: str, extents: Sequence[Extent]) -> None:
        """Compare these extents of a disk that nobody writes to. Raises `ContentsDiffer` and as above."""
        for extent in extents:
            if found := await self.differing(disk, extent):
                raise await self._difference(disk, found[0])

    def close(self) -> None:
        """Let go of the source."""
        readers, self._readers = self._readers, {}
        for reader in readers.values():
            reader.close()

    async def _difference(self, disk: str, coarse: Extent) -> ContentsDiffer:
        """What to tell of a run of units that differ: its first sectors."""
        unit = Extent(coarse.offset, min(UNIT, coarse.length))
        first = next(iter(await self._differing(disk, unit, SECTOR)), unit)
        what = f"the two sides differ, first in bytes {first.offset} to {first.end - 1}"
        return ContentsDiffer(what, disk=disk, offset=first.offset)

    async def _differing(self, disk: str, extent: Extent, unit: int) -> list[Extent]:
        op = Digests(disk, extent.offset, extent.length, unit, self._algorithm)
        ours, theirs = await at_once(self._of_source(disk, extent, unit), carry_out(self._agent, op, DigestsReply))
        return differing_units(ours, theirs.digests, extent, unit, self._algorithm)

    async def _of_source(self, disk: str, extent: Extent, unit: int) -> bytes:
        try:
            if disk not in self._readers:
                connected = await asyncio.to_thread(connect, *self._exports[disk], contexts=[ALLOCATION])
                self._readers[disk] = NbdReader(connected)
            return await _digests(self._readers[disk], extent, unit, self._algorithm)
        except OSError as error:
            what = f"the source cannot be read in bytes {extent.offset} to {extent.end - 1}: {error.strerror}"
            raise SourceReadError(what, disk=disk, offset=extent.offset) from error
        except (ConnectionLost, asyncio.CancelledError) as error:
            self._readers.pop(disk, None)
            if isinstance(error, ConnectionLost):
                error.disk = disk
            raise


async def at_once(here: Coroutine[Any, Any, _Here], there: Coroutine[Any, Any, _There]) -> tuple[_Here, _There]:
    """What both give. When one fails, or the caller is cancelled, the other has been cancelled and has ended."""
    one, other = asyncio.ensure_future(here), asyncio.ensure_future(there)
    try:
        return await asyncio.gather(one, other)
    except BaseException:
        one.cancel()
        other.cancel()
        await finished(asyncio.gather(one, other, return_exceptions=True), PATIENCE)
        raise


async def _digests(reader: NbdReader, extent: Extent, unit: int, algorithm: Algorithm) -> bytes:
    """`digests_of` in a thread; when cancelled, the reader's connection is broken, and the thread ends."""
    control = Control()
    working = asyncio.ensure_future(asyncio.to_thread(digests_of, reader, extent, unit, algorithm, control))
    working.add_done_callback(lambda _: control.close())
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        control.cancel()
        reader.connection.drop()
        await finished(asyncio.gather(working, return_exceptions=True), PATIENCE)
        raise
