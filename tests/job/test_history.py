"""Which journals are kept when their jobs are over, and what they tell then."""

from __future__ import annotations

from pathlib import Path

from qemu_blkmig.job.chronicle import AgreedDisk, Chronicle
from qemu_blkmig.job.history import OWNER, archive, note_end, past_journal
from qemu_blkmig.job.journal import Journal


def _job(state: Path, *disks: AgreedDisk, name: str = "job") -> Path:
    directory = state / name
    directory.mkdir()
    journal = Journal.create(directory, lambda text: None)
    journal.phase("prepare")
    journal.agree(disks)
    journal.close()
    return directory


def test_the_journal_of_a_job_that_agreed_on_a_disk_is_kept(tmp_path: Path) -> None:
    archive(_job(tmp_path, AgreedDisk("vda", 512, "/a", "/b", "raw")))
    assert past_journal(tmp_path, "job") is not None


def test_a_job_that_ended_before_it_began_leaves_no_journal(tmp_path: Path) -> None:
    archive(_job(tmp_path))
    assert past_journal(tmp_path, "job") is None


def test_a_job_that_was_settled_before_it_began_tells_how_it_ended(tmp_path: Path) -> None:
    """Who saw it killed asks for it afterwards: "there is no such job" would not be the truth."""
    directory = _job(tmp_path)
    note_end(directory, "settled by its watchdog", ["the guest runs at the source"], "source")
    archive(directory)
    _assert_told(tmp_path)


def test_a_job_that_was_killed_before_it_had_a_journal_tells_how_it_ended(tmp_path: Path) -> None:
    directory = tmp_path / "job"
    directory.mkdir()
    (directory / "journal.sqlite").touch()
    note_end(directory, "settled by its watchdog", ["the guest runs at the source"], "source")
    archive(directory)
    _assert_told(tmp_path)


def _assert_told(state: Path) -> None:
    kept = past_journal(state, "job")
    assert kept is not None
    chronicle = Chronicle(kept)
    outcome = chronicle.last().outcome
    assert outcome is not None
    assert (outcome.text, outcome.guest) == ("settled by its watchdog", "the guest runs at the source")
    assert chronicle.facts()[OWNER] == "source"
