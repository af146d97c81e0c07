"""The bulk phase: one pass over a disk, from sector 0 to its end, that can be taken up again where it failed."""

from __future__ import annotations

from collections.abc import Callable

from qemu_blkmig.engine.carrier import Carrier
from qemu_blkmig.engine.device import Device
from qemu_blkmig.engine.extents import Batcher, Extent
from qemu_blkmig.engine.ports import Comparer, CopyKind

MOST_UNFLUSHED = 256 << 20
"""Bytes of the pass after which it is flushed, however large the disk is; a range is copied to its end before."""
FIRST_STRIDE = 32 << 20
PART, LONGEST = 32, 16 << 30
"""A range is no longer than this part of a disk, nor than so many bytes: a failure throws no more away."""
CHANGE = 8
"""How many times as long as the last range the next one is at most, or as short."""


class Stride:
    """How many bytes of a disk to ask for at once, so that it takes about `seconds`, by what the last range took.

    What lies between two ranges (a question, its way and back, a flush) is then little beside them on a long way; and
    what a failure throws away is little. Where nothing is stored, ranges become long.
    """

    def __init__(self, seconds: float, chunk_size: int) -> None:
        self._seconds = seconds
        self._chunk = chunk_size
        self._length: int | None = None

    def length(self, size: int, interval: int) -> int:
        """Whole chunks, of a disk of `size` bytes; no more than `interval` until something was measured."""
        if self._length is None:
            return min(max(FIRST_STRIDE, self._chunk), interval)
        most = min(size // PART, LONGEST) // self._chunk * self._chunk
        return max(self._chunk, min(self._length, most))

    def took(self, length: int, seconds: float) -> None:
        """A range of `length` bytes took so long."""
        change = min(CHANGE, max(1 / CHANGE, self._seconds / seconds)) if seconds > 0 else CHANGE
        self._length = max(self._chunk, int(length * change) // self._chunk * self._chunk)


class BulkPass:
    """Copies range after range; no more is known of a disk than where its cursor stands.

    With a `comparer` the destination holds an older copy, and just what differs is sent: as DIRTY, because nothing
    may be skipped there and nothing is known to be zero. At most `batch` extents go into one request.

    Copied is not yet stable: no bitmap remembers what the pass has written. So a disk's pass is done only once it
    has been flushed, and what cannot be flushed is copied again. It is flushed now and then, too, so that whoever
    resumes the pass has little to copy again: `on_stable` is told, each time, the disk and how far it is stable.
    """

    def __init__(
        self,
        carrier: Carrier,
        range_size: int,
        batch: int,
        interval: Callable[[int], int],
        on_stable: Callable[[str, int], None],
        comparer: Comparer | None,
        stride: Callable[[], Stride] | None = None,
    ) -> None:
        """`interval`: for a disk's size, the bytes after which its pass is flushed.

        A range is of at most `range_size` bytes, unless a `stride`, which is made for each disk, tells.
        """
        self._carrier = carrier
        self._range_size = range_size
        self._batch = batch
        self._interval = interval
        self._on_stable = on_stable
        self._comparer = comparer
        self._stride = stride

    async def run(self, device: Device) -> None:
        """Copy what the pass has not yet copied of `device`, and flush it; raises what the mover raises."""
        interval = self._interval(device.size)
        stride = self._stride() if self._stride is not None else None
        while device.cursor < device.size:
            length = stride.length(device.size, interval) if stride else min(self._range_size, interval)
            try:
                extent = device.next_range(length)
                seconds = await self._bring(device, extent)
                if stride:
                    stride.took(extent.length, seconds)
            except Exception as error:
                if not self._carrier.halted:
                    await self._secure_after(error, device)
                raise
            if device.cursor - device.stable >= interval:
                await self._secure(device)
        if not device.bulk_done:
            await self._secure(device)

    async def _bring(self, device: Device, extent: Extent) -> float:
        """The seconds that copying took."""
        if self._comparer is None:
            return await self._carrier.copy(device, [extent], CopyKind.BULK)
        self._carrier.check_halted(device)
        batcher = Batcher(most=self._batch, volume=self._range_size, size=device.size, unit=device.unit)
        differing = await self._comparer.differing(device.name, extent)
        sent, seconds = 0, 0.0
        for batch in (*batcher.feed(differing), batcher.rest()):
            if batch:
                seconds += await self._carrier.copy(device, batch, CopyKind.DIRTY)
                sent += sum(each.length for each in batch)
        self._carrier.compared(device, extent, max(0, extent.length - sent))
        return seconds

    async def _secure(self, device: Device) -> None:
        """Flush; on a failure never again: a second fsync succeeds though the first one dropped the data."""
        try:
            await self._carrier.flush(device)
        except BaseException:
            device.unsecured()
            raise
        device.secured()
        self._on_stable(device.name, device.stable)

    async def _secure_after(self, error: Exception, device: Device) -> None:
        """Learn whether the writer still has what it reported: one that died may have taken unflushed data along."""
        try:
            await self._secure(device)
        except Exception as flaw:
            error.add_note(f"the flush failed as well ({flaw!r}): the pass goes on at byte {device.cursor}")


def flush_interval(size: int, flushes: int, chunk_size: int) -> int:
    """Bytes (whole chunks) after which the pass over a disk of `size` bytes is flushed: about `flushes` times."""
    chunks = min(size // flushes, MOST_UNFLUSHED) // chunk_size
    return max(1, chunks) * chunk_size
