"""A job's journal: what was agreed, what is flushed, phases, rounds, figures; an SQLite file that a thread writes.

Keeping it never fails, or holds up, a migration: what cannot be written (disk full, damaged file) is told once and
tried again with what comes next. The record (`job.record`) says who owns the guest; the journal only spares work, so
what is not in it counts as not done. Transactions outlive the process, not always a power cut: with that the source
QEMU and its bitmaps are gone, too.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from qemu_blkmig.engine.migration import Figures
from qemu_blkmig.errors import Refused
from qemu_blkmig.job.chronicle import AgreedDisk, Chronicle, columns, seal
from qemu_blkmig.job.diskmap import Cells

FILE = "journal.sqlite"
KEPT, RECENT = 4096, 1024
"""Samples, and rounds, that a journal holds at most; and of them the latest ones, which are not thinned out."""
LATEST = 1000
"""Phases and notes that are kept."""
WAITING = 4096
"""Entries that wait at most while the file cannot be written; the oldest ones go first (never what is flushed)."""
END = 5.0
"""Seconds that a journal's end is waited for: its disk may hang."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS disk (name TEXT PRIMARY KEY, size INTEGER NOT NULL, source TEXT NOT NULL,
    destination TEXT NOT NULL, format TEXT NOT NULL, copied INTEGER NOT NULL DEFAULT 0,
    zeroed INTEGER NOT NULL DEFAULT 0, skipped INTEGER NOT NULL DEFAULT 0, bulk_done INTEGER NOT NULL DEFAULT 0,
    dirty INTEGER NOT NULL DEFAULT 0, rounds INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS stable (disk TEXT PRIMARY KEY, bytes INTEGER NOT NULL, seal INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS phase (id INTEGER PRIMARY KEY, time REAL NOT NULL, name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS round (id INTEGER PRIMARY KEY, time REAL NOT NULL, number INTEGER NOT NULL,
    bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS note (id INTEGER PRIMARY KEY, time REAL NOT NULL, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outcome (id INTEGER PRIMARY KEY, time REAL NOT NULL, exit_code INTEGER NOT NULL,
    text TEXT NOT NULL, guest TEXT);
CREATE TABLE IF NOT EXISTS sample (id INTEGER PRIMARY KEY, time REAL NOT NULL, percent INTEGER NOT NULL,
    total INTEGER NOT NULL, pending INTEGER NOT NULL, round INTEGER NOT NULL, speed REAL, dirty_rate REAL,
    predicted REAL, copied INTEGER, put_off INTEGER, downtime REAL, bandwidth INTEGER);
CREATE TABLE IF NOT EXISTS map (disk TEXT PRIMARY KEY, cell INTEGER NOT NULL, slot REAL NOT NULL, began REAL NOT NULL,
    passes BLOB NOT NULL, sent BLOB NOT NULL, picture BLOB NOT NULL);
"""
LATER = (("sample", "copied INTEGER"), ("sample", "put_off INTEGER"), ("sample", "downtime REAL"),
         ("sample", "bandwidth INTEGER"))  # fmt: skip
"""Columns that a journal lacks which an earlier version has begun."""

STABLE = "INSERT OR REPLACE INTO stable VALUES (?, ?, ?)"
MAP = "INSERT OR REPLACE INTO map VALUES (?, ?, ?, ?, ?, ?, ?)"

Entry = tuple[str, tuple[object, ...]]
"""A statement and its values."""
Told = Entry | concurrent.futures.Future[bool] | None
"""What the thread gets: an entry, a question whether all is written, or the end."""


class Journal(Chronicle):
    """The journal of a job under way, to be written by one process at a time. What is told is written soon after.

    `warn` is called, from the writing thread, when something could not be written, and when it can be again.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        super().__init__(path)
        self._told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=lambda: _Keeper(path, warn).keep(self._told), name="journal", daemon=True
        )
        self._thread.start()

    @classmethod
    def create(cls, directory: Path, warn: Callable[[str], None]) -> Journal:
        """The journal of a new job, in its directory."""
        return cls(directory / FILE, warn)

    @classmethod
    def open(cls, directory: Path, warn: Callable[[str], None]) -> Journal:
        """Go on with the journal of a job that was interrupted; a damaged one is set aside, and begun anew."""
        path = directory / FILE
        try:
            Chronicle(path).last()
        except Refused as error:
            if path.exists():
                warn(f"{error}: nothing counts as copied; it is kept as {path.name}.damaged")
                _set_aside(path)
        return cls(path, warn)

    def agree(self, disks: Sequence[AgreedDisk]) -> None:
        """What was agreed of the disks."""
        for disk in disks:
            self._tell(
                "INSERT INTO disk (name, size, source, destination, format) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET size = excluded.size, source = excluded.source,"
                " destination = excluded.destination, format = excluded.format",
                disk.name, disk.size, disk.source, disk.destination, disk.format,
            )  # fmt: skip

    def fact(self, name: str, value: str) -> None:
        """Something of the job as a whole; told anew, it replaces what it was."""
        self._tell("INSERT OR REPLACE INTO fact VALUES (?, ?)", name, value)

    def stable(self, disk: str, count: int) -> None:
        """The first `count` bytes of the bulk pass over `disk` are flushed. Less than before: wait for `written`."""
        self._tell(STABLE, disk, count, seal(disk, count))

    def phase(self, name: str) -> None:
        """A phase begins."""
        self._tell("INSERT INTO phase (time, name) VALUES (?, ?)", time.time(), name)

    def round(self, number: int, count: int) -> None:
        """A dirty round has brought over `count` bytes."""
        self._tell("INSERT INTO round (time, number, bytes) VALUES (?, ?, ?)", time.time(), number, count)

    def note(self, text: str) -> None:
        """Something that the user was told."""
        self._tell("INSERT INTO note (time, text) VALUES (?, ?)", time.time(), text)

    def outcome(self, exit_code: int, text: str, guest: str | None) -> None:
        """How the job ended."""
        self._tell("INSERT INTO outcome (time, exit_code, text, guest) VALUES (?, ?, ?, ?)",
                   time.time(), exit_code, text, guest)  # fmt: skip

    def map(self, disk: str, cells: Cells) -> None:
        """Where, when and how often `disk` has been copied so far."""
        self._tell(MAP, disk, cells.cell, cells.slot, cells.began, cells.passes, cells.sent, cells.picture)

    def sample(self, figures: Figures, downtime: float | None = None, bandwidth: int | None = None) -> None:
        """The figures of this moment, and the limits in force: seconds, bytes a second."""
        self._tell(
            "INSERT INTO sample (time, percent, total, pending, round, speed, dirty_rate, predicted, copied, put_off,"
            " downtime, bandwidth) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            time.time(), figures.percent, figures.total, figures.pending, figures.round, figures.speed,
            figures.dirty_rate, figures.predicted, sum(disk.copied for disk in figures.disks),
            sum(disk.put_off for disk in figures.disks), downtime, bandwidth,
        )  # fmt: skip
        for disk in figures.disks:
            self._tell(
                "UPDATE disk SET copied = ?, zeroed = ?, skipped = ?, bulk_done = ?, dirty = ?, rounds = ?"
                " WHERE name = ?",
                disk.copied, disk.zeroed, disk.skipped, disk.bulk_done, disk.dirty, disk.rounds, disk.name,
            )  # fmt: skip

    async def written(self) -> bool:
        """Wait until all that was told has been tried; whether it is all in the file."""
        answer: concurrent.futures.Future[bool] = concurrent.futures.Future()
        self._told.put(answer)
        return await asyncio.wrap_future(answer)

    def close(self) -> None:
        """Write what waits, and let go of the file; blocks for `END` seconds at most. What is told after is
        lost. Safe to call twice."""
        if self._thread.is_alive():
            self._told.put(None)
            self._thread.join(END)

    def _tell(self, statement: str, *values: object) -> None:
        self._told.put((statement, values))


class _Keeper:
    """The writing thread's part: entries that wait, and the file, opened anew after every failure."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._database: sqlite3.Connection | None = None
        self._waiting: deque[Entry] = deque(maxlen=WAITING)
        self._latest: dict[tuple[str, object], Entry] = {}
        self._ailing = False

    def keep(self, told: queue.SimpleQueue[Told]) -> None:
        """Write what comes, all that has come meanwhile in one transaction, until the end is told."""
        ended = False
        while not ended:
            questions: list[concurrent.futures.Future[bool]] = []
            item: Told = told.get()
            while True:
                if item is None:
                    ended = True
                    break
                if isinstance(item, tuple):
                    self._take(item)
                else:
                    questions.append(item)
                try:
                    item = told.get_nowait()
                except queue.Empty:
                    break
            written = self._write()
            for question in questions:
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    question.set_result(written)
        self._drop()

    def _take(self, entry: Entry) -> None:
        statement, values = entry
        if statement in (STABLE, MAP):
            self._latest[statement, values[0]] = entry
        else:
            self._waiting.append(entry)

    def _write(self) -> bool:
        try:
            database = self._database = self._database or _connect(self._path)
            with database:
                for statement, values in (*self._waiting, *self._latest.values()):
                    database.execute(statement, values)
                _thin_out(database)
        except (sqlite3.Error, OSError, ValueError, OverflowError) as error:
            self._drop()
            if not isinstance(error, (sqlite3.Error, OSError)):
                # What no file can hold would be in the way of all that follows.
                self._waiting.clear()
            if not self._ailing:
                self._warn(
                    f"the job's journal {self._path} cannot be written ({error}): what is copied from now on may have "
                    "to be copied again by a resume, and status shows what was last written"
                )
            self._ailing = True
            return False
        self._waiting.clear()
        self._latest.clear()
        if self._ailing:
            self._warn("the job's journal can be written again")
        self._ailing = False
        return True

    def _drop(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.close()


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=END)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.executescript(SCHEMA)
        for table, column in LATER:
            if column.split()[0] not in columns(database, table):
                database.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
    except BaseException:
        database.close()
        raise
    return database


def _thin_out(database: sqlite3.Connection) -> None:
    """Keep the file's size flat, over days: every other one of what is old goes; phases and notes are the latest."""
    for table in ("sample", "round"):
        (count,) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
        if count > KEPT:
            database.execute(
                f"DELETE FROM {table} WHERE id IN (SELECT id FROM"
                f" (SELECT id, row_number() OVER (ORDER BY id) AS place FROM {table})"
                " WHERE place % 2 = 0 AND place <= ?)",
                (count - RECENT,),
            )
    for table in ("phase", "note"):
        database.execute(f"DELETE FROM {table} WHERE id <= (SELECT max(id) FROM {table}) - ?", (LATEST,))


def _set_aside(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.replace(path.with_name(f"{path.name}.damaged"))
        for end in ("-wal", "-shm"):
            path.with_name(f"{path.name}{end}").unlink(missing_ok=True)
