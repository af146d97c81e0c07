"""The record of what the guest writes: dirty bitmaps on its disks, harvested by FACTS.md's protocol A.

While recording, each disk has an enabled bitmap, `<prefix>-b<k>`; of several, the newest is the recording. A harvest
adds the next one and disables this one, on all disks in one transaction: the disabled ones are the round. A round's
bitmaps are removed only when all of it is known to be at the destination, by the next harvest's transaction; whatever
else becomes of a round, it is merged back into the recording.

A bitmap that is shown while it records (`qmp.watch`, from `stand_ready` on) cannot be disabled. It goes on recording
beside the next one, and a round that it is may hold later writes as well, which are recorded anew all the same.

An answer that does not come (a cancellation, a time limit) leaves open what QEMU did. Transactions are atomic and
QEMU keeps the order of commands, so the next query tells: every bitmap of ours that is neither the recording, nor of a
round that somebody holds, nor of one that has arrived, is an orphan, and `_settle` merges it back.
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
from qemu_blkmig.qmp.features import probe
from qemu_blkmig.qmp.monitor import CommandFailed, Monitor
from qemu_blkmig.qmp.removal import remove_bitmaps
from qemu_blkmig.qmp.topology import Topology, bitmaps_by_node
from qemu_blkmig.qmp.watch import Watch

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
        self._still_recording: set[str] = set()
        self._retired: set[str] = set()
        self._watch: Watch | None = None
        self._may_watch = True
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
            await self._topology.check([recording])
            names = {name for disk in self._disks.values() for name in found[disk.node] if self._is_ours(name)}
            self._generation = max(map(self._number, names))
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
            old, new = self._current(), self._next_name()
            if self._watch is not None and self._watch.bitmap == old:
                dirty = await self._harvest_watched(old, new)
                self._still_recording = {old}
            else:
                await self._unwatch()
                await self._topology.check([old])
                await self._rotate(new, [old])
                dirty = await self._counts(old)
                self._still_recording = set()
            self._recording = new
            self._held.add(old)
            self._retired.clear()
            self._unsettled = False
            return BitmapRound(self, old, dirty)

    async def _harvest_watched(self, old: str, new: str) -> Mapping[str, int]:
        """Nothing can disable what is shown: whether it has recorded all the time can be asked for afterwards."""
        try:
            await self._rotate(new, [])
        except CommandFailed:
            await self._topology.check([old])
            raise
        return (await self._topology.check([old, new]))[old]

    async def _rotate(self, new: str, disabled: Sequence[str]) -> None:
        """Begin another recording, and end what no longer is one; `_settle` finds out what became of it, if need be."""
        actions = self._add(new)
        for name in {*disabled, *self._still_recording} - self._retired:
            actions += self._each("disable", name=name)
        for name in sorted(self._retired):
            actions += self._each("remove", name=name)
        self._unsettled = True
        await self._transaction(actions)

    async def stand_ready(self) -> None:
        """Show what records, so that the next harvest can be read at once. Where that fails all goes without it."""
        async with self._lock:
            if not self._may_watch or (self._watch is not None and self._watch.bitmap == self._recording):
                return
            await self._settle()
            try:
                await self._unwatch()
                self._may_watch = (await probe(self._monitor)).watch
                if self._may_watch:
                    disks = [(disk, self._next_export("w")) for disk in self._disks.values()]
                    self._watch = await Watch.begin(self._exports, self._current(), disks)
            except (RequestError, ConnectionLost) as error:
                if self._monitor.lost:
                    raise
                log.info("what is recorded is not shown before it is harvested: %s", error)
                self._may_watch = False

    async def stand_down(self) -> None:
        """Show nothing any more before it is harvested: QEMU carries no bitmap along while another one is shown."""
        async with self._lock:
            self._may_watch = False
            await self._unwatch()

    async def verify_topology(self) -> Mapping[str, int]:
        """See `DirtyLog.verify_topology`."""
        async with self._lock:
            await self._settle()
            current = self._current()
            return (await self._topology.check([current]))[current]

    async def stop(self) -> None:
        """Stop recording; remove every export and bitmap of ours, on whatever node. Safe at any time, also twice."""
        async with self._lock:
            self._recording = None
            for names in (self._held, self._still_recording, self._retired):
                names.clear()
            self._unsettled = False
            try:
                await self._unwatch()
                await self._remove_round_exports()
                await remove_bitmaps(self._monitor, f"{self._prefix}-")
            except ConnectionLost as error:
                # Neither bitmaps (they are not persistent) nor exports outlive their QEMU.
                if not self._monitor.lost:
                    raise
                log.debug("nothing to remove: %s", error)

    async def extents(self, bitmap: str, disk: str) -> AsyncGenerator[Sequence[Extent], None]:
        """Stream what `bitmap` holds of `disk`.

        If it is not shown, over an export of its own that is removed at the end, come what may.
        """
        if bitmap not in self._held:
            raise RequestError("this round is over", disk=disk)
        if self._watch is not None and self._watch.bitmap == bitmap and self._may_watch:
            begun = False
            try:
                async with contextlib.aclosing(self._watch.extents(disk)) as batches:
                    async for batch in batches:
                        begun = True
                        yield batch
                return
            except (RequestError, ConnectionLost) as error:
                self._may_watch = False
                if begun:
                    raise
                log.info("what is recorded is to be shown anew: %s", error)
                async with self._lock:
                    await self._unwatch()
        export = self._next_export("r")
        self._round_exports.add(export)
        try:
            await self._exports.add(
                export,
                self._disks[disk].node,
                bitmaps=[] if bitmap in self._still_recording else [bitmap],
                recording=bitmap if bitmap in self._still_recording else None,
            )
            reader = dirty_extents(self._exports.address, export, bitmap, self._disks[disk].size)
            # A cancelled call goes on in its thread until the export is gone.
            while batch := await asyncio.to_thread(next, reader, ()):
                yield batch
        finally:
            await _to_the_end(self._exports.remove(export))
            self._round_exports.discard(export)

    async def retire(self, bitmap: str) -> None:
        """Forget a round that is at the destination; its bitmaps go with the next harvest, or when all is stopped.

        The guest may stand still, and who finds them here without having been told copies the round again.
        """
        async with self._lock:
            await self._settle()
            if bitmap not in self._held:
                raise RequestError("this round is over")
            await self._remove_round_exports()
            self._held.discard(bitmap)
            self._retired.add(bitmap)

    async def restore(self, bitmap: str) -> None:
        """Merge the bitmaps of a round back into the recording ones."""
        async with self._lock:
            await self._remove_round_exports()
            self._held.discard(bitmap)
            self._retired.discard(bitmap)
            self._unsettled = True
            await self._settle()

    async def _unwatch(self) -> None:
        if self._watch is not None:
            await self._watch.end()
            self._watch = None

    async def _settle(self) -> None:
        """Find out what QEMU made of what was left open, and merge every orphan into the recording."""
        if not self._unsettled:
            return
        found = bitmaps_by_node(await self._monitor.execute("query-named-block-nodes", {"flat": True}))
        self._recording = self._found_recording(found)
        if self._watch is not None and self._watch.bitmap != self._recording:
            await self._unwatch()
        actions: list[dict[str, Any]] = []
        for disk in self._disks.values():
            for name in found[disk.node]:
                if self._is_ours(name) and name not in self._held and name != self._recording:
                    if name not in self._retired:
                        merge = {"node": disk.node, "target": self._recording, "bitmaps": [name]}
                        actions.append({"type": "block-dirty-bitmap-merge", "data": merge})
                    remove = {"node": disk.node, "name": name}
                    actions.append({"type": "block-dirty-bitmap-remove", "data": remove})
        if actions:
            await self._transaction(actions)
        self._retired.clear()
        self._still_recording &= self._held
        self._unsettled = False

    def _found_recording(self, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
        names = set()
        for disk in self._disks.values():
            ours = [n for n in found.get(disk.node, {}) if self._is_ours(n) and n not in self._held | self._retired]
            enabled = [n for n in ours if found[disk.node][n]["recording"]]
            if not enabled:
                raise TopologyChanged("no bitmap records its writes any more", disk=disk.name)
            names.add(max(enabled, key=self._number))
        if len(names) != 1:
            raise TopologyChanged(f"different bitmaps record the writes of different disks: {', '.join(sorted(names))}")
        return names.pop()

    def _is_ours(self, bitmap: str) -> bool:
        return bitmap.startswith(f"{self._prefix}-b")

    def _number(self, bitmap: str) -> int:
        return int(bitmap.removeprefix(f"{self._prefix}-b"))

    def _current(self) -> str:
        if self._recording is None:
            raise RequestError("the writes of this guest are not being recorded")
        return self._recording

    def _next_name(self) -> str:
        self._generation += 1
        return f"{self._prefix}-b{self._generation}"

    def _next_export(self, kind: str) -> str:
        return f"{self._prefix}-{kind}{next(self._export_numbers)}"

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
