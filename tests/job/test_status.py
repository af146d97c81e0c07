"""How a job of a libvirt domain's stands: which domain it is, who has it, where it goes; also when the job is over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_blkmig.job.chronicle import AgreedDisk
from qemu_blkmig.job.journal import FILE, Journal
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import CopyOptions, Target
from qemu_blkmig.job.place import Local, Ssh
from qemu_blkmig.job.record import Job, Managed, Owner
from qemu_blkmig.job.status import DomainMoved, at_rest, noted, past
from qemu_blkmig.places import STATE_VARIABLE

UUID = "6b0d5a36-4b7c-4b8e-9d54-0f8a4f6f1c11"
THERE = "qemu+ssh://hostb/system"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A job that moves the domain web1, which is to be called web2 at the destination."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    made = Job.create()
    place = Ssh("hostb", "/")
    made.record.managed = Managed(ManagedOptions("web1", THERE, place), UUID, "web1", "web2")
    made.record.target_place = place
    yield made
    made.remove()


def test_a_domains_job_names_the_domain_and_tells_who_has_it(job: Job) -> None:
    told = at_rest(job.record, job.directory, busy=False)
    assert told.domain == DomainMoved("web1", UUID, "web2", THERE)
    assert (told.source, told.destination) == ("libvirt:web1", "ssh://hostb/")
    assert told.guest == "the guest is the source's, and runs there"
    job.record.owner = Owner.DESTINATION
    assert at_rest(job.record, job.directory, busy=True).guest == "the guest is the destination's"


def test_a_job_that_was_left_behind_while_it_recorded_can_be_gone_on_with(job: Job) -> None:
    advice = f"qemu-blkmig resume {job.record.job}"
    assert advice not in str(at_rest(job.record, job.directory, busy=False).next)
    job.record.recording = True
    assert advice in str(at_rest(job.record, job.directory, busy=False).next)
    job.record.owner = Owner.UNDECIDED
    assert advice not in str(at_rest(job.record, job.directory, busy=False).next)


def test_a_domains_job_that_is_over_still_names_it(job: Job, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, lambda text: pytest.fail(text))
    for name, value in noted(job.record).items():
        journal.fact(name, value)
    journal.agree([AgreedDisk("vda", 1 << 20, "/old", "/new", "raw")])
    journal.outcome(0, "migrated", "the guest runs at the destination")
    journal.close()
    told = past(tmp_path / FILE)
    assert told.domain == DomainMoved("web1", UUID, "web2", THERE)
    assert told.source == "libvirt:web1"


def test_a_job_whose_coordinator_was_killed_before_it_kept_a_journal_has_told_nothing(job: Job) -> None:
    told = at_rest(job.record, job.directory, busy=False)
    assert told.note is None and told.next == (
        f"qemu-blkmig cleanup {job.record.job} brings it to rest and removes what it made"
    )
    (job.directory / FILE).write_text("no database")
    assert "cannot be read" in str(at_rest(job.record, job.directory, busy=False).note)


def test_a_job_that_has_found_no_guest_yet_does_not_claim_that_there_is_none(job: Job) -> None:
    job.record.managed = None
    assert at_rest(job.record, job.directory, busy=True).guest == "nothing was done to a guest"
    job.record.copy = CopyOptions(Target(Local("/srv")), image="/srv/disk.raw")
    told = at_rest(job.record, job.directory, busy=True)
    assert (told.guest, told.domain) == ("no guest is concerned", None)
