"""What a dirty bitmap holds, read from the block status of a QEMU export that shows it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qemu_blkmig import errors
from qemu_blkmig.engine.extents import Extent, joined
from qemu_blkmig.nbd.address import Address
from qemu_blkmig.nbd.connection import STATUS_LIMIT, Connection, Entries, connect

BATCH = 4096
_DIRTY = 1


def dirty_extents(server: str | Path | Address, export: str, bitmap: str, size: int) -> Iterator[list[Extent]]:
    """The dirty extents of `bitmap`, blocking, in batches of at most `BATCH`.

    They are ascending, disjoint, joined where they touch, and clipped to `size` bytes. Raises `ConnectionLost` when
    the export cannot be reached, does not show the bitmap, or goes away; `RequestError` when it refuses a query.
    """
    connection = see(server, export, bitmap)
    try:
        yield from extents_shown(connection, bitmap, size)
    finally:
        connection.close()


def see(server: str | Path | Address, export: str, bitmap: str) -> Connection:
    """Connect to an export that shows `bitmap`. Raises `ConnectionLost`."""
    connection = connect(server, export, contexts=[_context(bitmap)])
    if _context(bitmap) not in connection.contexts:
        connection.close()
        raise errors.ConnectionLost(f"{connection.where} does not show the dirty bitmap {bitmap!r}")
    return connection


def extents_shown(connection: Connection, bitmap: str, size: int) -> Iterator[list[Extent]]:
    """As `dirty_extents`, over a connection that `see` has made and that stays; one at a time, each read to its end."""
    runs = joined(_walk(connection, _context(bitmap), size))
    while batch := list(itertools.islice(runs, BATCH)):
        yield batch


def _context(bitmap: str) -> str:
    return f"qemu:dirty-bitmap:{bitmap}"


def _walk(connection: Connection, context: str, size: int) -> Iterator[Extent]:
    offset = 0
    while offset < size:
        for length, flags in _ask(connection, context, offset, min(STATUS_LIMIT, size - offset)):
            length = min(length, size - offset)
            if flags & _DIRTY and length:
                yield Extent(offset, length)
            offset += length


def _ask(connection: Connection, context: str, offset: int, length: int) -> Entries:
    completed: list[tuple[Any, int]] = []
    connection.status(offset, length, completed)
    error = connection.wait(completed)
    answer: dict[str, Entries] = completed[0][0]
    entries = answer.get(context, [])
    if error or not any(covered for covered, _flags in entries):
        raise errors.RequestError(f"{connection.where}: no dirty block status at offset {offset} (errno {error})")
    return entries
