"""The bitmaps that record, shown by exports while they do: what a harvest takes is read at once, and no export is made.

With a paused guest whose disks QEMU has taken from it, making an export re-opens the image: 25 ms in which the guest
stands still. QEMU refuses to show a bitmap that records over a read-only export of its disk, unless it is told the node
that the bitmap lies on (7.1); block status then tells what is recorded when it is asked for (tests/qmp/test_watch.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd.connection import Connection
from qemu_blkmig.nbd.dirty import extents_shown, see
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.qmp.exports import ExportServer


class Watch:
    """An export of each disk that shows `bitmap`, and a connection to each. QEMU lets go of none of these bitmaps."""

    def __init__(self, exports: ExportServer, bitmap: str) -> None:
        """Use `begin`."""
        self.bitmap = bitmap
        self._exports = exports
        self._names: list[str] = []
        self._seen: dict[str, tuple[Connection, int]] = {}

    @classmethod
    async def begin(cls, exports: ExportServer, bitmap: str, disks: Sequence[tuple[Disk, str]]) -> Watch:
        """Show the bitmap of each disk by an export of the name beside it. Raises `RequestError`, `ConnectionLost`."""
        watch = cls(exports, bitmap)
        try:
            for disk, name in disks:
                watch._names.append(name)
                await exports.add(name, disk.node, recording=bitmap)
                connection = await asyncio.to_thread(see, exports.address, name, bitmap)
                watch._seen[disk.name] = connection, disk.size
        except BaseException:
            await watch.end()
            raise
        return watch

    async def extents(self, disk: str) -> AsyncGenerator[Sequence[Extent], None]:
        """Stream what is recorded of `disk`, as `nbd.dirty.extents_shown` does; once cancelled, `end` it."""
        connection, size = self._seen[disk]
        reader = extents_shown(connection, self.bitmap, size)
        while batch := await asyncio.to_thread(next, reader, ()):
            yield batch

    async def end(self) -> None:
        """Remove the exports; the bitmaps go on as they are. Raises what `ExportServer.remove` does."""
        while self._names:
            await self._exports.remove(self._names[-1])
            self._names.pop()
        for connection, _size in self._seen.values():
            connection.close()
        self._seen.clear()
