"""Reads an image through an NBD export, a few requests at a time, and tells what of it is known to be zero."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd.connection import STATUS_LIMIT, Connection, Entries
from qemu_blkmig.nbd.plan import ALLOCATION

REQUEST = 1 << 20
"""Bytes of one request: a longer read has several in flight."""
_ZERO = 2


class NbdReader:
    """Reads through `connection`; implements `nbd.digests.Reader`. Blocking, for one thread."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._request = min(REQUEST, connection.request_limit)

    def read(self, into: memoryview, offset: int) -> None:
        """See `Reader`."""
        completed: list[tuple[Any, int]] = []
        starts = range(0, len(into), self._request)
        for start in starts:
            self.connection.read(into[start : start + self._request], offset + start, completed, None)
        if error := self.connection.wait(completed, len(starts)):
            raise OSError(error, os.strerror(error))

    def zeroes(self, offset: int, length: int) -> Iterator[Extent]:
        """See `Reader`."""
        end = offset + length
        while ALLOCATION in self.connection.contexts and offset < end:
            for run, flags in self._status(offset, min(STATUS_LIMIT, end - offset)):
                if flags & _ZERO and offset < end:
                    yield Extent(offset, min(run, end - offset))
                offset += run

    def close(self) -> None:
        """Disconnect."""
        self.connection.close()

    def _status(self, offset: int, length: int) -> Entries:
        completed: list[tuple[Any, int]] = []
        self.connection.status(offset, length, completed)
        error = self.connection.wait(completed)
        entries: Entries = completed[0][0].get(ALLOCATION, [])
        return entries if entries and not error else [(length, 0)]
