"""Journals of the jobs that are over: the last hundred are kept, as one file each, in the state directory."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from qemu_blkmig.job.journal import FILE, SCHEMA

log = logging.getLogger(__name__)

FOLDER = "history"
OWNER = "owner"
"""The fact in which a journal that is over tells whose the guest is (`record.Owner`)."""
SETTLED = "settled"
"""The fact in which a journal that is over tells that its job was settled after its coordinator's death."""
MOST = 100


def archive(directory: Path) -> None:
    """Keep the journal of the job in `directory`. Failing is only logged.

    It is kept if disks were ever agreed in it, or if the job was settled: somebody was told of it, and may ask.
    """
    journal = directory / FILE
    if not journal.exists():
        return
    try:
        database = sqlite3.connect(journal, timeout=1.0)
        try:
            # One file, without a log beside it, that can be moved.
            database.execute("PRAGMA journal_mode = DELETE")
            disks = database.execute("SELECT count(*) FROM disk").fetchone()[0]
            settled = database.execute("SELECT count(*) FROM fact WHERE name = ?", (SETTLED,)).fetchone()[0]
        finally:
            database.close()
        if disks or settled:
            folder = directory.parent / FOLDER
            folder.mkdir(mode=0o700, exist_ok=True)
            journal.replace(folder / f"{directory.name}.sqlite")
            _prune(folder)
    except (OSError, sqlite3.Error) as error:
        log.warning("the journal of job %s could not be kept: %s", directory.name, error)


def note_end(directory: Path, text: str, facts: Sequence[str], owner: str) -> None:
    """Note in a dead job's journal how it was brought to an end, and who has the guest. Failing is only logged.

    A job may have died before it had a journal: it has one now.
    """
    try:
        with contextlib.closing(sqlite3.connect(directory / FILE, timeout=1.0)) as database, database:
            database.executescript(SCHEMA)
            database.execute(
                "INSERT INTO outcome (time, exit_code, text, guest) VALUES (?, ?, ?, ?)",
                (time.time(), 1, text, "; ".join(facts)),
            )
            database.executemany(
                "INSERT OR REPLACE INTO fact VALUES (?, ?)", [(OWNER, owner), (SETTLED, str(time.time()))]
            )
    except sqlite3.Error as error:
        log.warning("the end of job %s could not be noted: %s", directory.name, error)


def past_journals(state: Path) -> Iterator[Path]:
    """Journals of jobs that are over, the latest first."""
    found = []
    for path in (state / FOLDER).glob("*.sqlite"):
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(found, reverse=True):
        yield path


def past_journal(state: Path, job: str) -> Path | None:
    """The journal of a job that is over, if it is kept."""
    return next((path for path in past_journals(state) if path.stem == job), None)


def _prune(folder: Path) -> None:
    for path in list(past_journals(folder.parent))[MOST:]:
        path.unlink(missing_ok=True)
