"""How bytes get into an image: straight into a raw file or block device, or through our own NBD server.

A writer's operations end by calling `done` with 0 or an errno, at once or from `settle`. Ranges may be of any length.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from qemu_blkmig import errors
from qemu_blkmig.destination.placement import Placements
from qemu_blkmig.destination.qemu_nbd import Spare
from qemu_blkmig.destination.writeback import WriteBack
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd.connection import Connection
from qemu_blkmig.nbd.reader import NbdReader

Done = Callable[[int], None]
Read = Callable[[memoryview, int], None]
"""Reads what the image holds from an offset on. Blocks. Raises `OSError` or `ConnectionLost`."""

_PUNCH_HOLE_KEEP_SIZE = 0x03
_ZERO_RANGE_KEEP_SIZE = 0x11
_BLKZEROOUT = 0x127F
_ZEROES = memoryview(bytes(1 << 20))
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL}


class Writer(Protocol):
    """One disk's destination."""

    @property
    def connections(self) -> Sequence[Connection]:
        """What a poll loop has to drive while operations are under way."""

    @property
    def works_beside(self) -> bool:
        """Whether `flush`, and all that reads, may each be called in a thread of its own, beside the rest."""

    def write(self, data: memoryview, offset: int, done: Done) -> None:
        """Write `data`, which stays as it is until `done`."""

    def zero(self, offset: int, length: int, done: Done) -> None:
        """Make the range read as zeroes, with holes where possible."""

    def settle(self) -> None:
        """Call `done` of the operations that are over."""

    def flush(self) -> None:
        """Make everything stable. Blocks. Raises `OSError` or `ConnectionLost`."""

    def read(self, into: memoryview, offset: int) -> None:
        """See `Read`."""

    def reading(self, extents: Sequence[Extent]) -> Read:
        """What reads the extents, stable by now, from where they are stored, as far as that can be brought about.

        It does as long as nothing is written there, or zeroed.
        """

    def zeroes(self, offset: int, length: int) -> Iterator[Extent]:
        """Ranges within the range that are known to read as zeroes, ascending. Blocks."""

    def close(self) -> None:
        """Let go of the image."""


class RawWriter:
    """Writes a regular file or a block device that is open on `descriptor`, of which it keeps a duplicate.

    The file's size is never changed.
    """

    connections: Sequence[Connection] = ()
    works_beside = True

    def __init__(self, descriptor: int, *, keep_allocated: bool = False) -> None:
        """`keep_allocated`: zeroes make no holes."""
        self._descriptor = os.dup(descriptor)
        self._mode = _ZERO_RANGE_KEEP_SIZE if keep_allocated else _PUNCH_HOLE_KEEP_SIZE
        self._regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._zero_fast = self._punch if self._regular else self._zero_out
        self._can_zero_fast = True
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._write_back = WriteBack(descriptor)

    def write(self, data: memoryview, offset: int, done: Done) -> None:
        """See `Writer`."""
        self._write_back.wrote(len(data))
        done(_errno_of(lambda: self._write_all(data, offset)))

    def zero(self, offset: int, length: int, done: Done) -> None:
        """See `Writer`."""
        done(_errno_of(lambda: self._zero(offset, length)))

    def settle(self) -> None:
        """Every operation is over at once."""

    def flush(self) -> None:
        """See `Writer`."""
        os.fdatasync(self._descriptor)

    def read(self, into: memoryview, offset: int) -> None:
        """See `Writer`."""
        _read_all(self._descriptor, into, offset)

    def reading(self, extents: Sequence[Extent]) -> Read:
        """The page cache, which holds what was written, drops the extents, then has them read ahead; see `Writer`."""
        _have_read_ahead(self._descriptor, extents)
        return self.read

    def zeroes(self, offset: int, length: int) -> Iterator[Extent]:
        """The holes of a regular file; see `Writer`."""
        end = offset + length
        while self._regular and offset < end:
            data = min(end, self._seek(offset, os.SEEK_DATA, end))
            if data > offset:
                yield Extent(offset, data - offset)
            offset = self._seek(data, os.SEEK_HOLE, end) if data < end else end

    def close(self) -> None:
        """See `Writer`."""
        self._write_back.stop()
        os.close(self._descriptor)

    def _seek(self, offset: int, whence: int, otherwise: int) -> int:
        try:
            return os.lseek(self._descriptor, offset, whence)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return otherwise

    def _write_all(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._descriptor, data, offset)
            data, offset = data[count:], offset + count

    def _zero(self, offset: int, length: int) -> None:
        if self._can_zero_fast:
            try:
                self._zero_fast(offset, length)
                return
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self._can_zero_fast = error.errno == errno.EINVAL
        for start in range(0, length, len(_ZEROES)):
            self._write_all(_ZEROES[: min(len(_ZEROES), length - start)], offset + start)

    def _punch(self, offset: int, length: int) -> None:
        at, count = ctypes.c_int64(offset), ctypes.c_int64(length)
        if self._libc.fallocate64(self._descriptor, self._mode, at, count):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _zero_out(self, offset: int, length: int) -> None:
        fcntl.ioctl(self._descriptor, _BLKZEROOUT, struct.pack("QQ", offset, length))


class NbdWriter(NbdReader):
    """Writes through NBD connections to a server of our own that alone has the image open.

    `descriptor` is of the image's file, of that format; it stays the caller's. `spare`: see `QemuNbd`.
    """

    def __init__(
        self, connections: Sequence[Connection], descriptor: int, image_format: str, spare: Spare | None
    ) -> None:
        super().__init__(connections[0] if spare is None else spare.reader)
        self.connections = connections
        self._spare = spare
        self.works_beside = spare is not None
        self._descriptor = descriptor
        self._format = image_format
        self._next = 0
        self._completed: list[tuple[Done, int]] = []
        self._limit = min(connection.request_limit for connection in connections)

    def write(self, data: memoryview, offset: int, done: Done) -> None:
        """See `Writer`."""
        starts = range(0, len(data), self._limit)
        done = done if len(starts) == 1 else _all_of(len(starts), done)
        for start in starts:
            connection = self._turn()
            try:
                connection.write(data[start : start + self._limit], offset + start, self._completed, done)
            except errors.ConnectionLost:
                self._completed.append((done, errno.ENOTCONN))

    def zero(self, offset: int, length: int, done: Done) -> None:
        """See `Writer`."""
        try:
            self._turn().zero(offset, length, self._completed, done)
        except errors.ConnectionLost:
            self._completed.append((done, errno.ENOTCONN))

    def settle(self) -> None:
        """See `Writer`."""
        completed, self._completed[:] = list(self._completed), []
        for done, error in completed:
            done(error)

    def flush(self) -> None:
        """On every connection where the server does not promise multi-conn. See `Writer`."""
        for connection in self.connections if self._spare is None else [self._spare.flusher]:
            if error := connection.flush():
                raise OSError(error, os.strerror(error))

    def reading(self, extents: Sequence[Extent]) -> Read:
        """Past the server, where it is told in what place of the image's file the extents lie; see `Writer`."""
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        placement = self._placements.of(extents)
        _have_read_ahead(self._descriptor, placement.places(extents))

        def read(into: memoryview, offset: int) -> None:
            for part in placement.parts(offset, len(into)):
                view = into[part.extent.offset - offset : part.extent.end - offset]
                if part.place is None:
                    self.read(view, part.extent.offset)
                else:
                    _read_all(self._descriptor, view, part.place)

        return read

    def close(self) -> None:
        """See `Writer`."""
        for connection in (*self.connections, *(self._spare or ())):
            connection.close()

    @functools.cached_property
    def _placements(self) -> Placements:
        """Made where it blocks nobody: the image's storage may hang."""
        return Placements(self._descriptor, self._format)

    def _turn(self) -> Connection:
        connection = self.connections[self._next]
        self._next = (self._next + 1) % len(self.connections)
        return connection


def _read_all(descriptor: int, into: memoryview, offset: int) -> None:
    while into:
        count = os.preadv(descriptor, [into], offset)
        if not count:
            raise OSError(errno.EIO, f"the image ends at {offset}")
        into, offset = into[count:], offset + count


def _have_read_ahead(descriptor: int, extents: Sequence[Extent]) -> None:
    """Have extents of a file read from where they are stored."""
    for advice in (os.POSIX_FADV_DONTNEED, os.POSIX_FADV_WILLNEED):
        for extent in extents:
            os.posix_fadvise(descriptor, extent.offset, extent.length, advice)


def _all_of(count: int, done: Done) -> Done:
    """Calls `done` once with the first error, when `count` parts are over."""
    results: list[int] = []

    def part_done(error: int) -> None:
        results.append(error)
        if len(results) == count:
            done(next(filter(None, results), 0))

    return part_done


def _errno_of(operation: Callable[[], None]) -> int:
    try:
        operation()
    except OSError as error:
        return error.errno or errno.EIO
    return 0
