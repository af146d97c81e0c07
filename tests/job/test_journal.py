"""The journal: what it keeps, that it never fails whoever keeps it, that it stays small, that damage is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qemu_blkmig.engine.migration import DiskFigures, Figures, Phase
from qemu_blkmig.errors import Refused
from qemu_blkmig.job import journal as journal_module
from qemu_blkmig.job.chronicle import AgreedDisk, Chronicle
from qemu_blkmig.job.diskmap import DiskMap
from qemu_blkmig.job.journal import FILE, LATER, SCHEMA, Journal

MIB = 1 << 20
VDA = AgreedDisk("vda", 64 * MIB, "/old/vda", "/new/vda", "raw")


def figures(done: int, rounds: int = 0) -> Figures:
    """Figures of one disk."""
    disk = DiskFigures("vda", 64 * MIB, done, 0, 0, rounds, done, 0, 0)
    return Figures(Phase.BULK, done * 100 // (64 * MIB), 64 * MIB, 64 * MIB - done, (disk,), rounds, 1e6, None, None)


@contextmanager
def kept(directory: Path, warnings: list[str] | None = None) -> Iterator[Journal]:
    """A journal in `directory`, closed in the end."""
    journal = Journal.open(directory, (warnings if warnings is not None else []).append)
    try:
        yield journal
    finally:
        journal.close()


async def test_what_is_told_can_be_read_while_it_is_written_and_after(tmp_path: Path) -> None:
    with kept(tmp_path) as journal:
        journal.agree([VDA])
        journal.phase("bulk")
        journal.stable("vda", 8 * MIB)
        journal.stable("vda", 16 * MIB)
        journal.sample(figures(20 * MIB))
        journal.round(1, MIB)
        journal.fact("source", "qmp:/x")
        journal.note("hello")
        assert await journal.written()
        other = Chronicle(tmp_path / FILE)
        assert other.stable_by_disk() == journal.stable_by_disk() == {"vda": 16 * MIB}
    story = other.story()
    assert story.agreed == [VDA]
    assert [phase.name for phase in story.phases] == ["bulk"]
    assert [(round_.number, round_.bytes) for round_ in story.rounds] == [(1, MIB)]
    assert story.facts == other.facts() == {"source": "qmp:/x"}
    last = other.last()
    assert story.last == last
    assert last.disks[0].bulk_done == 20 * MIB and last.disks[0].stable == 16 * MIB
    assert last.sample is not None and last.sample.speed == 1e6
    assert last.note is not None and last.note.text == "hello"
    assert last.outcome is None
    with kept(tmp_path) as journal:
        journal.outcome(0, "migrated", "the guest runs at the destination")
    last = other.last()
    assert last.outcome is not None and last.outcome.exit_code == 0
    assert other.stable_by_disk() == {"vda": 16 * MIB}


async def test_a_map_is_kept_once_for_each_disk_and_an_earlier_versions_journal_is_gone_on_with(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as database, database:
        database.executescript(f"{SCHEMA}; DROP TABLE map")
        for table, column in LATER:
            database.execute(f"ALTER TABLE {table} DROP COLUMN {column.split()[0]}")
        database.execute("INSERT INTO sample VALUES (1, 5.0, 1, 2, 3, 4, NULL, NULL, NULL)")
    story = Chronicle(tmp_path / FILE).story()
    assert story.maps == {}
    assert [each.copied for each in story.samples] == [None]
    cells = DiskMap(64 * MIB, 7.0).kept()
    with kept(tmp_path) as journal:
        journal.agree([VDA])
        journal.map("vda", cells)
        journal.map("vda", msgspec.structs.replace(cells, slot=0.25))
        journal.sample(figures(MIB), 0.3, 1000)
        assert await journal.written()
        story = journal.story()
    assert story.maps == {"vda": msgspec.structs.replace(cells, slot=0.25)}
    assert [(each.copied, each.downtime, each.bandwidth) for each in story.samples] == [
        (None, None, None),
        (MIB, 0.3, 1000),
    ]
    assert story.agreed == [VDA] and story.last.disks[0].name == "vda"


async def test_a_journal_survives_the_kill_of_its_writer(tmp_path: Path) -> None:
    program = """
import asyncio, os, sys, pathlib
from qemu_blkmig.job.journal import Journal
journal = Journal.create(pathlib.Path(sys.argv[1]), print)
journal.stable("vda", 4096)
assert asyncio.run(journal.written())
os.kill(os.getpid(), 9)
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(tmp_path))
    assert await process.wait() == -9
    warnings: list[str] = []
    with kept(tmp_path, warnings) as journal:
        assert journal.stable_by_disk() == {"vda": 4096}
    assert warnings == []


async def test_a_full_disk_is_told_once_and_what_is_flushed_is_written_when_there_is_room_again(tmp_path: Path) -> None:
    warnings: list[str] = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with kept(tmp_path, warnings) as journal:
        journal.stable("vda", 1)
        assert await journal.written()
        # Python ignores SIGXFSZ: writing beyond fails with EFBIG, as a full disk does with ENOSPC.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            for count in range(2, 5):
                journal.stable("vda", count)
                journal.note("x" * 50_000)
                assert not await journal.written()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert len(warnings) == 1 and "cannot be written" in warnings[0]
        assert journal.stable_by_disk() == {"vda": 1}, "what was not journalled counts as not flushed"
        assert await journal.written()
        assert journal.stable_by_disk() == {"vda": 4}
    assert len(warnings) == 2 and "again" in warnings[1]


@pytest.mark.parametrize("told", [{"bandwidth": 1 << 63}, {"note": "\udcff"}])
async def test_what_no_file_can_hold_is_left_out_and_nothing_else(tmp_path: Path, told: dict[str, Any]) -> None:
    warnings: list[str] = []
    with kept(tmp_path, warnings) as journal:
        journal.stable("vda", 8 * MIB)
        if "note" in told:
            journal.note(told["note"])
        else:
            journal.sample(figures(MIB), bandwidth=told["bandwidth"])
        async with asyncio.timeout(60):
            assert not await journal.written()
            journal.note("hello")
            assert await journal.written()
    assert Chronicle(tmp_path / FILE).stable_by_disk() == {"vda": 8 * MIB}
    assert len(warnings) == 2


async def test_a_directory_that_is_not_there_is_only_warned_about(tmp_path: Path) -> None:
    warnings: list[str] = []
    with kept(tmp_path / "nowhere", warnings) as journal:
        journal.phase("bulk")
        assert not await journal.written()
        with pytest.raises(Refused, match="cannot be read"):
            journal.last()
    assert len(warnings) == 1


@pytest.mark.parametrize("damage", [b"this is no database" * 300, b""], ids=["garbage", "empty"])
async def test_a_damaged_file_is_set_aside_and_nothing_counts_as_flushed(tmp_path: Path, damage: bytes) -> None:
    with kept(tmp_path) as journal:
        journal.stable("vda", 8 * MIB)
    (tmp_path / FILE).write_bytes(damage)
    warnings: list[str] = []
    with kept(tmp_path, warnings) as journal:
        assert await journal.written()
        assert journal.stable_by_disk() == {}
    assert len(warnings) == 1 and "nothing counts as copied" in warnings[0]
    assert (tmp_path / f"{FILE}.damaged").read_bytes() == damage


async def test_a_number_that_was_damaged_does_not_pass_for_flushed_bytes(tmp_path: Path) -> None:
    with kept(tmp_path) as journal:
        journal.stable("vda", 8 * MIB)
    with sqlite3.connect(tmp_path / FILE) as database:
        database.execute("UPDATE stable SET bytes = bytes * 2")
    database.close()
    with pytest.raises(Refused, match="damaged"):
        Chronicle(tmp_path / FILE).stable_by_disk()


async def test_days_of_samples_do_not_make_the_file_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "KEPT", 64)
    monkeypatch.setattr(journal_module, "RECENT", 16)
    monkeypatch.setattr(journal_module, "LATEST", 10)
    with kept(tmp_path) as journal:
        journal.agree([VDA])
        for number in range(3000):
            journal.sample(figures(number * 512, number))
            journal.round(number, 1)
            journal.phase("dirty")
            journal.note("x")
            if number % 50 == 0:
                assert await journal.written()
        assert await journal.written()
        story = journal.story()
        samples = story.samples
        assert 16 <= len(samples) <= 64 + 50
        assert len(story.rounds) <= 64 + 50
        assert len(story.phases) <= 10 and len(story.notes) <= 10
        assert samples[-1].round == 2999 and samples[0].round == 0, "from the beginning to now"
        assert [each.round for each in samples[-16:]] == list(range(2984, 3000)), "the latest ones are all there"
        size = (tmp_path / FILE).stat().st_size
    assert size < 256 << 10
