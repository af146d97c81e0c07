"""What a job's journal tells: read while the job writes it, after its process died, and from history.

Every read opens the file for itself, for reading only: it neither holds up the writer nor trusts an old view.
"""

from __future__ import annotations

import contextlib
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from qemu_blkmig.errors import Refused
from qemu_blkmig.job.diskmap import Cells

PATIENCE = 2.0
"""Seconds that a reader waits for a writer that is just changing the file's form."""


class AgreedDisk(msgspec.Struct, frozen=True):
    """What was agreed of a disk before its copy began; `size` in bytes."""

    name: str
    size: int
    source: str
    destination: str
    format: str


class DiskState(msgspec.Struct, frozen=True):
    """A disk's latest figures in bytes (`engine.migration.DiskFigures`); `stable`: of the bulk pass, flushed."""

    name: str
    size: int
    stable: int = 0
    copied: int = 0
    zeroed: int = 0
    skipped: int = 0
    bulk_done: int = 0
    dirty: int = 0
    rounds: int = 0


class Sample(msgspec.Struct, frozen=True):
    """The figures at `time` (seconds since 1970): bytes, bytes a second, seconds (`predicted`).

    `copied`: payload in all; `put_off`: the part of `pending` that is copied last. `downtime`, `bandwidth`: the limits
    in force. An earlier version's journal lacks these.
    """

    time: float
    percent: int
    total: int
    pending: int
    round: int
    speed: float | None
    dirty_rate: float | None
    predicted: float | None
    copied: int | None = None
    put_off: int | None = None
    downtime: float | None = None
    bandwidth: int | None = None


class PhaseChange(msgspec.Struct, frozen=True):
    """A phase that began at `time` (seconds since 1970)."""

    time: float
    name: str


class RoundDone(msgspec.Struct, frozen=True):
    """A dirty round that brought over `bytes`, ended at `time`."""

    time: float
    number: int
    bytes: int


class Note(msgspec.Struct, frozen=True):
    """Something that the user was told at `time`."""

    time: float
    text: str


class Outcome(msgspec.Struct, frozen=True):
    """How the job ended: exit code, what was told, and who has the guest, in words."""

    time: float
    exit_code: int
    text: str
    guest: str | None = None


class Story(msgspec.Struct, frozen=True):
    """All that is known of a job, of one moment; `maps` by disk."""

    facts: dict[str, str]
    phases: list[PhaseChange]
    rounds: list[RoundDone]
    samples: list[Sample]
    notes: list[Note]
    agreed: list[AgreedDisk]
    maps: dict[str, Cells]
    last: Last


class Last(msgspec.Struct, frozen=True):
    """The latest that is known."""

    phase: PhaseChange | None
    sample: Sample | None
    disks: list[DiskState]
    note: Note | None
    outcome: Outcome | None


def seal(disk: str, count: int) -> int:
    """A check of one `stable` entry: a damaged one must not pass for bytes that were flushed."""
    return zlib.crc32(f"{disk}\0{count}".encode())


class Chronicle:
    """The journal in the file `path`. Every reader raises `Refused` when it is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stable_by_disk(self) -> dict[str, int]:
        """Bytes of the bulk pass that were flushed, by disk."""
        with self._reading() as database:
            return _stable(database)

    def facts(self) -> dict[str, str]:
        """What was noted of the job as a whole."""
        with self._reading() as database:
            return dict(database.execute("SELECT name, value FROM fact"))

    def maps(self) -> dict[str, Cells]:
        """When and how often each part of a disk was copied, by disk."""
        with self._reading() as database:
            return _maps(database)

    def last(self) -> Last:
        """The latest of everything, of one moment."""
        with self._reading() as database:
            database.execute("BEGIN")
            return _last(database)

    def story(self) -> Story:
        """Everything, of one moment."""
        with self._reading() as database:
            database.execute("BEGIN")
            return Story(
                facts=dict(database.execute("SELECT name, value FROM fact")),
                phases=_all(database, PhaseChange, f"{_PHASE} ORDER BY id"),
                rounds=_all(database, RoundDone, _ROUNDS),
                samples=_all(database, Sample, f"{_SAMPLE} ORDER BY id"),
                notes=_all(database, Note, f"{_NOTE} ORDER BY id"),
                agreed=_all(database, AgreedDisk, _AGREED),
                maps=_maps(database),
                last=_last(database),
            )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            uri = f"{self.path.absolute().as_uri()}?mode=ro"
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=PATIENCE, isolation_level=None)) as database:
                yield database
        except (sqlite3.Error, msgspec.ValidationError, UnicodeDecodeError) as error:
            raise Refused(f"the journal {self.path} cannot be read: {error}") from error


_SAMPLE = "SELECT * FROM sample"
_AGREED = "SELECT name, size, source, destination, format FROM disk ORDER BY rowid"
_PHASE = "SELECT time, name FROM phase"
_NOTE = "SELECT time, text FROM note"
_ROUNDS = "SELECT time, number, bytes FROM round ORDER BY id"


def columns(database: sqlite3.Connection, table: str) -> list[str]:
    """The names of a table's columns; none where there is no such table."""
    return [name for _, name, *_ in database.execute(f"PRAGMA table_info({table})")]


def _last(database: sqlite3.Connection) -> Last:
    stable = _stable(database)
    disks = [
        DiskState(name, size, stable.get(name, 0), *(figures or ()))
        for name, size, *figures in database.execute(
            "SELECT name, size, copied, zeroed, skipped, bulk_done, dirty, rounds FROM disk ORDER BY rowid"
        )
    ]
    return Last(
        phase=_latest(database, PhaseChange, _PHASE),
        sample=_latest(database, Sample, _SAMPLE),
        disks=disks,
        note=_latest(database, Note, _NOTE),
        outcome=_latest(database, Outcome, "SELECT time, exit_code, text, guest FROM outcome"),
    )


def _maps(database: sqlite3.Connection) -> dict[str, Cells]:
    if not columns(database, "map"):
        return {}
    rows = database.execute("SELECT disk, cell, slot, began, passes, sent, picture FROM map")
    return {disk: msgspec.convert(dict(zip(Cells.__struct_fields__, row, strict=True)), Cells) for disk, *row in rows}


def _stable(database: sqlite3.Connection) -> dict[str, int]:
    rows = database.execute("SELECT disk, bytes, seal FROM stable").fetchall()
    for disk, count, check in rows:
        if not isinstance(disk, str) or not isinstance(count, int) or check != seal(disk, count):
            raise sqlite3.DatabaseError(f"what it says of {disk!r} is damaged")
    return {disk: count for disk, count, _ in rows}


def _all(database: sqlite3.Connection, kind: Any, query: str) -> list[Any]:
    rows = database.execute(query)
    names = [name for name, *_ in rows.description]
    return [msgspec.convert(dict(zip(names, row, strict=True)), kind, strict=True) for row in rows]


def _latest(database: sqlite3.Connection, kind: Any, query: str) -> Any:
    found = _all(database, kind, f"{query} ORDER BY id DESC LIMIT 1")
    return found[0] if found else None
