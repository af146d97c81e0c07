"""What was written to an image, unit by unit: a digest of each, and whether it has been read back.

A sparse file, read and written by position, so that memory stays flat whatever the disk's size: a header, then a byte
of state for each unit, then a digest for each. Where nothing was written the file has holes. Units of zeroes have no
digest: their state says it.

Until `keep` the file has no name, so that nothing is left of it however the agent ends; from then on it lies beside
the image, for an agent that takes the work up again. That agent trusts nothing to be as it was: every unit is to be
read back anew.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import Refused
from qemu_blkmig.hashing import SIZES, Algorithm, hash_function
from qemu_blkmig.places import state_directory
from qemu_blkmig.stable import remove_for_good

_MAGIC = b"blkmig hashes 1\n"
_HEADER = struct.Struct("<16s16sQQ")
_PAGE = 4096
_BLOCK = 1 << 16
"""States that are looked at in one go."""

_STATES = range(7)
_NONE, _DATA, _ZERO, _GOOD_DATA, _GOOD_ZERO, _AMISS_DATA, _AMISS_ZERO = _STATES
_UNPROVEN = (_DATA, _ZERO, _AMISS_DATA, _AMISS_ZERO)
_IS_UNREAD = bytes(1 if state in (_DATA, _ZERO) else 0 for state in range(256))
_IS_UNPROVEN = bytes(1 if state in _UNPROVEN else 0 for state in range(256))
_UNREAD_AGAIN = {_GOOD_DATA: _DATA, _GOOD_ZERO: _ZERO, _AMISS_DATA: _DATA, _AMISS_ZERO: _ZERO}
_UNPROVE = bytes(_UNREAD_AGAIN.get(state, state) for state in range(256))


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring units that are to be read back; `digests` of all of them, None where they are zeroes."""

    extent: Extent
    digests: bytes | None


class NotStored(OSError):
    """The table's own storage failed; `strerror` says so, and where that is."""


class HashTable:
    """One disk's table. All offsets and lengths are bytes of the disk, and whole units but for the disk's end.

    What is written may be noted in one thread while what lies elsewhere is read back in another. Every method raises
    `OSError` as file operations do, and what stores something in a table that is there already: `NotStored`.
    """

    def __init__(self, path: Path, size: int, unit: int, algorithm: Algorithm) -> None:
        """A new, empty table that `keep` will call `path`. Raises `Refused` where the algorithm is not to be had."""
        self._lay_out(path, size, unit, algorithm)
        self._descriptor, self._is_kept = _nameless(path)
        try:
            os.ftruncate(self._descriptor, self._length)
            os.pwrite(self._descriptor, self._header(), 0)
        except BaseException:
            self.remove()
            raise

    @classmethod
    def reopen(cls, path: Path, size: int, unit: int, algorithm: Algorithm) -> HashTable:
        """The table that an earlier agent has kept at `path`; every unit in it is to be read back again.

        Raises `Refused` where there is none, or not one for this disk.
        """
        table = cls.__new__(cls)
        table._lay_out(path, size, unit, algorithm)
        try:
            table._descriptor, table._is_kept = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), True
        except OSError as error:
            raise Refused(f"the hashes of what was written, {path}, cannot be read: {error.strerror}") from error
        try:
            damaged = Refused(f"{path} does not hold the hashes of what was written to this disk")
            length = os.fstat(table._descriptor).st_size
            if length != table._length or os.pread(table._descriptor, _HEADER.size, 0) != table._header():
                raise damaged
            for first, states in table._written():
                if states.translate(None, bytes(_STATES)):
                    raise damaged
                os.pwrite(table._descriptor, states.translate(_UNPROVE), _PAGE + first)
                table._unproven += len(states) - states.count(_NONE)
        except BaseException:
            table.close()
            raise
        return table

    def _lay_out(self, path: Path, size: int, unit: int, algorithm: Algorithm) -> None:
        self.digest = hash_function(algorithm)
        self.digest_size = SIZES[algorithm]
        self.unit = unit
        self._algorithm = algorithm
        self._path = path
        self._size = size
        self._count = -(-size // unit)
        self._entries = _PAGE + -(-self._count // _PAGE) * _PAGE
        self._length = self._entries + self._count * self.digest_size
        self._unproven = 0
        self._counting = threading.Lock()
        self._next = 0

    @property
    def left(self) -> int:
        """Bytes that were written and have not been read back as they were written; the last unit counts as whole."""
        return self._unproven * self.unit

    def wrote(self, offset: int, data: memoryview) -> None:
        """`data` is what is being written at `offset`."""
        digest, unit = self.digest, self.unit
        digests = b"".join([digest(data[start : start + unit]) for start in range(0, len(data), unit)])
        first = offset // unit
        with self._storing():
            self._write_all(digests, self._entries + first * self.digest_size)
            self._set(first, len(digests) // self.digest_size, _DATA)

    def zeroed(self, offset: int, length: int) -> None:
        """The range is being made zero."""
        with self._storing():
            self._set(offset // self.unit, -(-length // self.unit), _ZERO)

    def unread(self, most: int, below: int | None = None) -> Iterator[Run]:
        """Runs to be read back, of `most` bytes (units or more) at most each, once around from where it `goes_on`.

        `below`: only from there to that byte, whatever is left before.
        """
        start = self._next
        end = self._count if below is None else min(self._count, below // self.unit)
        for low, high in ((start, end), (0, start if below is None else 0)):
            for first, kind, count in self._runs(low, high, most // self.unit):
                yield self._run(first, kind, count)

    def unread_from(self, offset: int, most: int) -> Iterator[Run]:
        """Runs to be read back from `offset` on, which is one of a unit; see `unread`, which they do not concern."""
        for first, kind, count in self._runs(offset // self.unit, self._count, most // self.unit):
            yield self._run(first, kind, count)

    def samples(self, end: int, count: int, dice: random.Random) -> Iterator[Run]:
        """Units before byte `end` that are to be read back, `count` at most, from all over."""
        before = end // self.unit
        for number in range(count):
            low, high = (before * (number + more) // count for more in (0, 1))
            for start, stop in ((dice.randrange(low, high) if high > low else low, high), (low, high)):
                found = next(self._runs(start, stop, 1), None)
                if found is not None:
                    yield self._run(*found)
                    break

    def good(self, extent: Extent) -> None:
        """The extent, of one `Run`, was read back as it was written, but for what was told to be amiss."""
        self._judge(extent, {_DATA: _GOOD_DATA, _ZERO: _GOOD_ZERO})

    def goes_on(self, end: int) -> None:
        """The next `unread` begins behind a run that ends at byte `end`."""
        self._next = -(-end // self.unit)

    def amiss(self, extent: Extent) -> None:
        """The extent, of one `Run`, was read back otherwise: it stays unproven until it is written again."""
        self._judge(extent, {_DATA: _AMISS_DATA, _ZERO: _AMISS_ZERO})

    def sync(self) -> None:
        """Make the table stable, if it is to outlive the agent."""
        if self._is_kept:
            with self._storing():
                os.fdatasync(self._descriptor)

    def keep(self) -> None:
        """From now on the table outlives the agent, until `remove`. It may have had its name from the beginning."""
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not self._is_kept:
                self._path.unlink(missing_ok=True)
                # Only with a directory does Python call linkat, which alone follows the link in /proc (proc(5)).
                os.link(f"/proc/self/fd/{self._descriptor}", self._path, src_dir_fd=directory)
                self._is_kept = True
            os.fsync(self._descriptor)
            os.fsync(directory)
        finally:
            os.close(directory)

    def remove(self) -> None:
        """Close it, and leave nothing of it."""
        if self._is_kept:
            self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of it; what was kept stays, and tells by its time when that was."""
        with contextlib.suppress(OSError):
            os.utime(self._descriptor)
        os.close(self._descriptor)

    def _header(self) -> bytes:
        return _HEADER.pack(_MAGIC, self._algorithm.encode(), self._size, self.unit)

    def _set(self, first: int, count: int, state: int) -> None:
        for at in range(first, first + count, _BLOCK):
            length = min(_BLOCK, first + count - at)
            before = os.pread(self._descriptor, length, _PAGE + at)
            self._count_unproven(length - before.translate(_IS_UNPROVEN).count(1))
            self._write_all(bytes([state]) * length, _PAGE + at)

    def _judge(self, extent: Extent, verdict: dict[int, int]) -> None:
        first, count = extent.offset // self.unit, -(-extent.length // self.unit)
        with self._storing():
            before = os.pread(self._descriptor, count, _PAGE + first)
            after = before.translate(bytes(verdict.get(state, state) for state in range(256)))
            self._count_unproven(after.translate(_IS_UNPROVEN).count(1) - before.translate(_IS_UNPROVEN).count(1))
            self._write_all(after, _PAGE + first)

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"the hashes of what is written cannot be stored in {self._path.parent}: {error.strerror}"
            raise NotStored(error.errno, what) from error

    def _count_unproven(self, more: int) -> None:
        with self._counting:
            self._unproven += more

    def _runs(self, low: int, high: int, most: int) -> Iterator[tuple[int, int, int]]:
        """(first unit, state, count) of units to be read back."""
        for first, states in self._written(low, high):
            unread = states.translate(_IS_UNREAD)
            at = unread.find(1)
            while at >= 0:
                end = unread.find(0, at)
                end = min(at + most, end if end >= 0 else len(states))
                kind = states[at]
                other = states.find(_ZERO if kind == _DATA else _DATA, at, end)
                end = other if other >= 0 else end
                yield first + at, kind, end - at
                at = unread.find(1, end)

    def _written(self, low: int = 0, high: int | None = None) -> Iterator[tuple[int, bytes]]:
        """(first unit, states) of blocks that may tell of something written."""
        high = self._count if high is None else high
        while low < high:
            try:
                low = max(low, os.lseek(self._descriptor, _PAGE + low, os.SEEK_DATA) - _PAGE)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return
            if low < high:
                states = os.pread(self._descriptor, min(_BLOCK, high - low), _PAGE + low)
                yield low, states
                low += len(states)

    def _run(self, first: int, kind: int, count: int) -> Run:
        return Run(self._extent(first, count), self._digests(first, count) if kind == _DATA else None)

    def _digests(self, first: int, count: int) -> bytes:
        return os.pread(self._descriptor, count * self.digest_size, self._entries + first * self.digest_size)

    def _extent(self, first: int, count: int) -> Extent:
        offset = first * self.unit
        return Extent(offset, min(self._size, offset + count * self.unit) - offset)

    def _write_all(self, data: bytes, at: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, at)
            view, at = view[written:], at + written


def table_path(image: str) -> Path:
    """Where the table of an image lies while it is kept; that of a block device lies in the state directory."""
    path = Path(image)
    if not path.is_block_device():
        return path.with_name(f".{path.name}.blkmig-hashes")
    state_directory().mkdir(mode=0o700, parents=True, exist_ok=True)
    return state_directory() / f"{quote(image, safe='')}.blkmig-hashes"


def is_written_since(image: str) -> bool:
    """Whether somebody may have written to the image since an agent let go of it; after one that was killed it may
    have been that one. Raises `OSError`.
    """
    try:
        noted = table_path(image).stat().st_mtime_ns
    except FileNotFoundError:
        return True
    return Path(image).stat().st_mtime_ns > noted


def forget(image: str) -> None:
    """Remove the table that was kept of an image, if any: the work on it has come to its end. Raises `OSError`.

    No crash of the host brings it back: it would vouch for what was read before a newer recording began.
    """
    remove_for_good(table_path(image))


def _nameless(path: Path) -> tuple[int, bool]:
    """A new file in the directory of `path`: its descriptor, and whether it has the name already.

    It has where the file system knows no files without a name (NFS, for one).
    """
    try:
        return os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), False
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), True
