"""Where what was read of the source goes: into the writer, counted for the copy that asked for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from qemu_blkmig import errors
from qemu_blkmig.destination.hashtable import HashTable, NotStored
from qemu_blkmig.destination.writers import Writer
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd.binding import libnbd
from qemu_blkmig.nbd.connection import Connection
from qemu_blkmig.nbd.control import Tally
from qemu_blkmig.nbd.plan import Action, Piece
from qemu_blkmig.nbd.pump import Lease

_ZERO_UNIT_OF_MIXED = 4096


class Copying:
    """One copy that was asked for: what of its extents is settled, in bytes. `over` is called when all of it is."""

    def __init__(self, extents: Sequence[Extent], over: Callable[[Copying], None]) -> None:
        self.end = extents[-1].end if extents else 0
        self.tally = Tally()
        self.left = sum(extent.length for extent in extents)
        self._over = over

    def settled(self, *, copied: int = 0, zeroed: int = 0, skipped: int = 0) -> None:
        """So many bytes more."""
        self.tally.copied += copied
        self.tally.zeroed += zeroed
        self.tally.skipped += skipped
        self.left -= copied + zeroed + skipped
        if not self.left and copied + zeroed + skipped:
            self._over(self)


def write_error(disk: str, offset: int | None, number: int, verb: str = "written") -> errors.DestinationWriteError:
    """The error that tells what the destination did not take, and why."""
    place = "" if offset is None else f" at offset {offset}"
    what = f"the destination cannot be {verb}{place}: {os.strerror(number)}"
    return errors.DestinationWriteError(what, disk=disk, offset=offset, errno=number)


def not_stored(disk: str, error: NotStored) -> errors.DestinationWriteError:
    """The same, of what is noted of what it took."""
    return errors.DestinationWriteError(error.strerror or "", disk=disk, offset=None, errno=error.errno or 0)


def zero_runs(view: memoryview, offset: int, unit: int) -> Iterator[tuple[int, int, bool]]:
    """(start, end, is zero) of the runs of `view`, which lies at `offset` of the disk, in aligned units."""
    buffer = libnbd().Buffer.from_buffer(view)
    start, was_zero = 0, False
    at, length = 0, len(view)
    while at < length:
        end = min(length, at + unit - (offset + at) % unit)
        zero = bool(buffer.is_zero(at, end - at))
        if at and zero is not was_zero:
            yield start, at, was_zero
            start = at
        was_zero, at = zero, end
    if length:
        yield start, length, was_zero


class CopySink:
    """Writes what arrives, zeroes found in it as zeroes, and notes in `table` what it writes."""

    def __init__(
        self,
        disk: str,
        writer: Writer,
        zero_unit: int,
        is_zero_already: Callable[[int, int], bool],
        table: HashTable | None,
    ) -> None:
        self.failure: Exception | None = None
        self.under_way = 0
        self._disk = disk
        self._writer = writer
        self._zero_unit = zero_unit
        self._copies: tuple[Copying, ...] = ()
        self._is_zero_already = is_zero_already
        self._table = table

    @property
    def copies(self) -> Sequence[Copying]:
        """Those that are not over."""
        return self._copies

    def expect(self, copying: Copying) -> None:
        """Pieces of `copying` may come from now on."""
        self._copies = (*self._copies, copying)

    def forget(self, copying: Copying) -> None:
        """It is over."""
        self._copies = tuple(each for each in self._copies if each is not copying)

    @property
    def connections(self) -> Sequence[Connection]:
        return self._writer.connections

    def settle(self) -> None:
        self._writer.settle()

    def pass_over(self, piece: Piece) -> None:
        if piece.action is Action.SKIP:
            self._of(piece.offset).settled(skipped=piece.length)
            return
        if not self._is_zero_already(piece.offset, piece.length):
            self._note_down(lambda table: table.zeroed(piece.offset, piece.length))
        self._zero(piece.offset, piece.length, lambda: None)

    def is_nothing(self, zeroes: Piece) -> bool:
        return self._is_zero_already(zeroes.offset, zeroes.length)

    def data(self, lease: Lease) -> None:
        offset = lease.piece.offset
        self._note_down(lambda table: table.wrote(offset, lease.view))
        zero_unit = min(self._zero_unit, _ZERO_UNIT_OF_MIXED) if lease.piece.mixed else self._zero_unit
        runs = list(zero_runs(lease.view, offset, zero_unit))
        left = len(runs)

        def run_over() -> None:
            nonlocal left
            left -= 1
            if not left:
                lease.release()

        for start, end, zero in runs:
            if zero:
                self._zero(offset + start, end - start, run_over)
            else:
                self._write(lease.view[start:end], offset + start, run_over)

    def _of(self, offset: int) -> Copying:
        return next(each for each in self._copies if offset < each.end)

    def _zero(self, offset: int, length: int, then: Callable[[], None]) -> None:
        copying = self._of(offset)
        if self._is_zero_already(offset, length):
            then()
            copying.settled(zeroed=length)
            return

        def done(error: int) -> None:
            self.under_way -= 1
            self._note(error, offset)
            then()
            copying.settled(zeroed=0 if error else length)

        self.under_way += 1
        self._writer.zero(offset, length, done)

    def _write(self, data: memoryview, offset: int, then: Callable[[], None]) -> None:
        copying = self._of(offset)

        def done(error: int) -> None:
            self.under_way -= 1
            self._note(error, offset)
            then()
            copying.settled(copied=0 if error else len(data))

        self.under_way += 1
        self._writer.write(data, offset, done)

    def _note_down(self, note: Callable[[HashTable], None]) -> None:
        """Before the bytes go: whatever becomes of them, the table does not vouch for what was there before."""
        if self._table is None:
            return
        try:
            note(self._table)
        except NotStored as error:
            self.failure = self.failure or not_stored(self._disk, error)

    def _note(self, error: int, offset: int) -> None:
        if error and self.failure is None:
            self.failure = write_error(self._disk, offset, error)
