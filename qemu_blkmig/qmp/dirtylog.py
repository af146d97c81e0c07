"""The record of what the guest writes: dirty bitmaps on its disks, harvested by FACTS.md's protocol A.

While recording, each disk has one enabled bitmap, `<prefix>-b<k>`. A harvest adds the next one and disables this one,
on all disks in one transaction: the disabled ones are the round. A round's bitmaps are removed only when all of it is
known to be at the destination; whatever else becomes of a round, it is merged back into the recording.

An answer that does not come (a cancellation, a time limit) leaves open what QEMU did. Transactions are atomic and
QEMU keeps the order of commands, so the next query tells: every bitmap of ours that neither records nor belongs to a
round which somebody holds is an orphan, and `_settle` merges it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from typing import Any

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import ConnectionLost, Refused, RequestError, TopologyChanged
from qemu_blkmig.nbd.dirty import dirty_extents
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.qmp.exports import ExportServer
from qemu_blkmig.qmp.monitor import CommandFailed, Monitor
from qemu_blkmig.qmp.removal import remove_bitmaps
from qemu_blkmig.qmp.topology import Topology, bitmaps_by_node

log = logging.getLogger(__name__)


class BitmapLog:
    """Implements `engine.ports.DirtyLog` for the disks of one QEMU."""

    def __init__(
        self,
        monitor: Monitor,
        disks: Sequence[Disk],
        *,
        prefix: str,
        granularity: int,
        exports: ExportServer,
        topology: Topology,
    ) -> None:
        """Everything made is named `<prefix>-...`; `granularity` is the bitmaps', bytes, a power of two."""
        self._monitor = monitor
        self._disks = {disk.name: disk for disk in disks}
        self._prefix = prefix
        self._granularity = granularity
        self._exports = exports
        self._topology = topology
        self._generation = 0
        self._recording: str | None = None
        self._held: set[str] = set()
        self._unsettled = False
        self._round_exports: set[str] = set()
        self._export_numbers = itertools.count()
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Start recording on all disks in one transaction. Raises `TopologyChanged`, `CommandFailed`."""
        async with self._lock:
            if self._recording is not None:
                raise RequestError("the writes of this guest are being recorded already")
            await self._topology.check()
            name = self._next_name()
            await self._transaction(self._add(name))
            self._recording = name

    async def reattach(self) -> None:
        """Go on with what a coordinator that is gone has recorded; its rounds are merged back.

        Its exports must be gone: QEMU does not let go of a bitmap that one shows. Raises `Refused` when the recording
        is not there on every disk (bitmaps end with their QEMU), `TopologyChanged`.
        """
        async with self._lock:
            if self._recording is not None:
                raise RequestError("the writes of this guest are being recorded already")
            found = bitmaps_by_node(await self._monitor.execute("query-named-block-nodes", {"flat": True}))
            try:
                recording = self._found_recording(found)
            except TopologyChanged as error:
                raise Refused(f"what the guest has written since is not known: {error}") from error
            await self._topology.check(recording=recording)
            names = {name for disk in self._disks.values() for name in found[disk.node] if self._is_ours(name)}
            self._generation = max(int(name.removeprefix(f"{self._prefix}-b")) for name in names)
            self._unsettled = True
            await self._settle()

    async def pending(self) -> Mapping[str, int]:
        """Bytes recorded and not yet harvested, by disk."""
        async with self._lock:
            await self._settle()
            return await self._counts(self._current())

    async def harvest(self) -> BitmapRound:
        """Take all that is recorded, on all disks in one transaction.

        Raises `TopologyChanged`, having taken nothing. After any other failure what was taken, if anything was, is
        put back by the next call.
        """
        async with self._lock:
            await self._settle()
            old = self._current()
            await self._topology.check(recording=old)
            new = self._next_name()
            self._unsettled = True
            await self._transaction([*self._add(new), *self._each("disable", name=old)])
            dirty = await self._counts(old)
            self._recording = new
            self._held.add(old)
            self._unsettled = False
            return BitmapRound(self, old, dirty)

    async def verify_topology(self) -> None:
        """Raise `TopologyChanged` when the disks are no longer those that recording started on."""
        async with self._lock:
            await self._settle()
            await self._topology.check(recording=self._recording)

    async def stop(self) -> None:
        """Stop recording; remove every export and bitmap of ours, on whatever node. Safe at any time, also twice."""
        async with self._lock:
            self._recording = None
            self._held.clear()
            self._unsettled = False
            try:
                await self._remove_round_exports()
                await remove_bitmaps(self._monitor, f"{self._prefix}-")
            except ConnectionLost as error:
                # Neither bitmaps (they are not persistent) nor exports outlive their QEMU.
                if not self._monitor.lost:
                    raise
                log.debug("nothing to remove: %s", error)

    async def extents(self, bitmap: str, disk: str) -> AsyncGenerator[Sequence[Extent], None]:
        """Stream what `bitmap` holds of `disk`, over an export of its own that is removed at the end, come what may."""
        if bitmap not in self._held:
            raise RequestError("this round is over", disk=disk)
        export = f"{self._prefix}-r{next(self._export_numbers)}"
        self._round_exports.add(export)
        try:
            await self._exports.add(export, self._disks[disk].node, bitmaps=[bitmap])
            reader = dirty_extents(self._exports.address, export, bitmap, self._disks[disk].size)
            # A cancelled call goes on in its thread until the export is gone.
            while batch := await asyncio.to_thread(next, reader, None):
                yield batch
        finally:
            await _to_the_end(self._exports.remove(export))
            self._round_exports.discard(export)

    async def retire(self, bitmap: str) -> None:
        """Remove the bitmaps of a round that is at the destination."""
        async with self._lock:
            await self._settle()
            if bitmap not in self._held:
                raise RequestError("this round is over")
            await self._remove_round_exports()
            self._held.discard(bitmap)
            self._unsettled = True
            try:
                await self._transaction(self._each("remove", name=bitmap))
            except CommandFailed:
                self._held.add(bitmap)
                self._unsettled = False
                raise
            self._unsettled = False

    async def restore(self, bitmap: str) -> None:
        """Merge the bitmaps of a round back into the recording ones."""
        async with self._lock:
            await self._remove_round_exports()
            self._held.discard(bitmap)
            self._unsettled = True
            await self._settle()

    async def _settle(self) -> None:
        """Find out what QEMU made of what was left open, and merge every orphan into the recording."""
        if not self._unsettled:
            return
        found = bitmaps_by_node(await self._monitor.execute("query-named-block-nodes", {"flat": True}))
        self._recording = self._found_recording(found)
        merges: list[dict[str, Any]] = []
        for disk in self._disks.values():
            for name in found[disk.node]:
                if self._is_ours(name) and name not in self._held and name != self._recording:
                    merge = {"node": disk.node, "target": self._recording, "bitmaps": [name]}
                    merges.append({"type": "block-dirty-bitmap-merge", "data": merge})
                    remove = {"node": disk.node, "name": name}
                    merges.append({"type": "block-dirty-bitmap-remove", "data": remove})
        if merges:
            await self._transaction(merges)
        self._unsettled = False

    def _found_recording(self, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
        names = set()
        for disk in self._disks.values():
            enabled = [n for n, b in found.get(disk.node, {}).items() if self._is_ours(n) and b["recording"]]
            if len(enabled) != 1:
                raise TopologyChanged("no bitmap records its writes any more", disk=disk.name)
            names.update(enabled)
        if len(names) != 1:
            raise TopologyChanged(f"different bitmaps record the writes of different disks: {', '.join(sorted(names))}")
        return names.pop()

    def _is_ours(self, bitmap: str) -> bool:
        return bitmap.startswith(f"{self._prefix}-b")

    def _current(self) -> str:
        if self._recording is None:
            raise RequestError("the writes of this guest are not being recorded")
        return self._recording

    def _next_name(self) -> str:
        self._generation += 1
        return f"{self._prefix}-b{self._generation}"

    def _add(self, name: str) -> list[dict[str, Any]]:
        return self._each("add", name=name, persistent=False, granularity=self._granularity)

    def _each(self, action: str, **arguments: object) -> list[dict[str, Any]]:
        """The transaction's actions that do the same to every disk's node."""
        return [
            {"type": f"block-dirty-bitmap-{action}", "data": {"node": disk.node, **arguments}}
            for disk in self._disks.values()
        ]

    async def _transaction(self, actions: Sequence[Mapping[str, Any]]) -> None:
        await self._monitor.execute("transaction", {"actions": list(actions)})

    async def _counts(self, bitmap: str) -> dict[str, int]:
        found = bitmaps_by_node(await self._monitor.execute("query-named-block-nodes", {"flat": True}))
        counts = {}
        for disk in self._disks.values():
            try:
                counts[disk.name] = min(int(found[disk.node][bitmap]["count"]), disk.size)
            except KeyError:
                raise TopologyChanged(f"the bitmap {bitmap} that records its writes is gone", disk=disk.name) from None
        return counts

    async def _remove_round_exports(self) -> None:
        for export in sorted(self._round_exports):
            await self._exports.remove(export)
            self._round_exports.discard(export)


class BitmapRound:
    """Implements `engine.ports.Round`: one harvest's bitmaps, of one name, on all disks."""

    def __init__(self, log: BitmapLog, bitmap: str, dirty: Mapping[str, int]) -> None:
        """Made by `BitmapLog.harvest`."""
        self._log = log
        self._bitmap = bitmap
        self._dirty = dict(dirty)

    @property
    def dirty(self) -> Mapping[str, int]:
        """Bytes harvested, by disk, in whole units of the granularity, and at most the disk's size."""
        return self._dirty

    async def extents(self, disk: str) -> AsyncGenerator[Sequence[Extent], None]:
        """The harvested extents of `disk` in ascending order, in batches; a disk without any costs nothing.

        Raises `RequestError` and `ConnectionLost`, of QEMU or of its export.
        """
        if self._dirty[disk] == 0:
            return
        batches = self._log.extents(self._bitmap, disk)
        async with contextlib.aclosing(batches):
            async for batch in batches:
                yield batch

    async def retire(self) -> None:
        """Forget the round: all of it has been copied and flushed."""
        await self._log.retire(self._bitmap)

    async def restore(self) -> None:
        """Merge the round back into the recording."""
        await self._log.restore(self._bitmap)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`, which has a time limit of its own; a cancellation is let through only when it is done."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
