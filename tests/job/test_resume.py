"""Which jobs are not gone on with, and what is told of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from qemu_blkmig.errors import DestinationFailed, Refused
from qemu_blkmig.job import connected, resume
from qemu_blkmig.job.moment import AT_ONCE, Moment
from qemu_blkmig.job.options import CopyOptions, MigrateOptions, Target, Transfer
from qemu_blkmig.job.place import Local
from qemu_blkmig.job.record import Job, Owner, Steered, read_record
from qemu_blkmig.job.settlement import Settlement
from qemu_blkmig.places import STATE_VARIABLE


def to_be_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settlement: Settlement) -> Job:
    """A job that has left a QEMU at the destination, and how it is settled."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.setattr(resume, "settle", AsyncMock(return_value=settlement))
    job = Job.create()
    job.record.target_launched = True
    return job


async def test_a_job_that_turns_out_to_have_handed_the_guest_over_is_told_to_be_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over = Settlement(Owner.DESTINATION, facts=["the guest runs at the destination"])
    job = to_be_settled(tmp_path, monkeypatch, handed_over)
    with pytest.raises(Refused, match="come to its end") as told:
        await resume._come_to_rest(job)
    assert told.value.state == "the guest runs at the destination"
    assert not job.directory.exists()


async def test_a_job_whose_destination_cannot_be_tidied_up_yet_is_told_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_reach = Settlement(Owner.SOURCE, suspended=True, facts=["hostb cannot be reached"])
    job = to_be_settled(tmp_path, monkeypatch, out_of_reach)
    with pytest.raises(DestinationFailed, match="cannot be tidied up yet") as told:
        await resume._come_to_rest(job)
    assert told.value.suspended == job.record.job
    assert told.value.advice is not None
    assert (
        f"when the destination host can be reached again, run: qemu-blkmig resume {job.record.job}" in told.value.advice
    )
    job.remove()


@pytest.mark.parametrize(
    ("owner", "taken_back", "why"),
    [
        (Owner.SOURCE, False, "nothing was copied yet"),
        (Owner.SOURCE, True, "its handover was undone"),
        (Owner.UNDECIDED, False, "not known who has it"),
        (Owner.DESTINATION, False, "the destination has the guest"),
    ],
)
async def test_why_a_job_of_which_nothing_is_kept_cannot_be_resumed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Owner, *, taken_back: bool, why: str
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    job = Job.create()
    job.record.owner, job.record.taken_back = owner, taken_back
    job.record.migrate = MigrateOptions("/s", Target(Local("/d"), qmp="/q"))
    job.save_blocking()
    job.release()
    anything: Any = None
    with pytest.raises(Refused, match=why) as told:
        await resume.resume(job.record.job, resume.Changes(), anything, anything, anything)
    assert told.value.advice == f"run: qemu-blkmig cleanup {job.record.job}"
    job.remove()


def suspended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **recorded: object) -> str:
    """A job that waits to be resumed, with this in its record."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    job = Job.create()
    job.record.suspended = True
    for name, value in recorded.items():
        setattr(job.record, name, value)
    job.save_blocking()
    job.release()
    return job.record.job


async def gone_on_with(monkeypatch: pytest.MonkeyPatch, job: str, work: str, changes: resume.Changes) -> list[Any]:
    """Resume the job: the options that the function `work` is called with."""
    asked: list[Any] = []

    async def do(options: object, *_: object) -> None:
        asked.append(options)

    monkeypatch.setattr(work, do)
    nobody: Any = None
    await resume.resume(job, changes, nobody, nobody, nobody)
    return asked


@pytest.mark.parametrize(
    ("changes", "bandwidth"),
    [(resume.Changes(), 2 << 20), (resume.Changes(bandwidth=3 << 20), 3 << 20), (resume.Changes(bandwidth=0), None)],
)
async def test_what_was_set_while_the_job_ran_still_holds(
    changes: resume.Changes, bandwidth: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wished = CopyOptions(Target(Local("/d")), image="/i", transfer=Transfer(bandwidth=1 << 20), downtime=0.3)
    job = suspended(monkeypatch, tmp_path, copy=wished, steered=Steered(2 << 20, 0.077))
    asked = await gone_on_with(monkeypatch, job, "qemu_blkmig.job.copy.copy", changes)
    assert [(each.transfer.bandwidth, each.downtime) for each in asked] == [(bandwidth, 0.077)]


@pytest.mark.parametrize("moment", [AT_ONCE, Moment(waits=True), Moment(waits=True, at=4e9), None])
async def test_a_time_to_switch_over_that_was_missed_can_be_told_anew(
    moment: Moment | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = Moment(waits=True, at=1.0)
    job = suspended(
        monkeypatch, tmp_path, migrate=MigrateOptions("/s", Target(Local("/d"), qmp="/q"), switchover=missed)
    )
    asked = await gone_on_with(monkeypatch, job, "qemu_blkmig.job.migrate.migrate", resume.Changes(switchover=moment))
    assert [each.switchover for each in asked] == [moment or missed]


def on_chain(*images: tuple[str, str]) -> Any:
    """A plan with one disk, vda, of these nodes and files."""
    return SimpleNamespace(disks=[SimpleNamespace(name="vda", images=[*images])])


TOP, BASE = ("libvirt-2-format", "/vm/top.qcow2"), ("libvirt-1-format", "/vm/base.qcow2")


@pytest.mark.parametrize("chain", [[("libvirt-3-format", "/vm/top.qcow2"), BASE], [TOP], [BASE]])
async def test_a_recording_on_nodes_or_above_images_that_are_others_now_is_not_gone_on_with(
    chain: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = suspended(monkeypatch, tmp_path)
    job = Job.load(name)
    connected._require_same_chains(job, on_chain(TOP, BASE))
    job.record.recording = True
    await job.save()
    job.record = read_record(job.directory)
    connected._require_same_chains(job, on_chain(TOP, BASE))
    with pytest.raises(Refused, match="its image or chain was changed while the job was suspended") as told:
        connected._require_same_chains(job, on_chain(*chain))
    assert told.value.disk == "vda" and f"resume {name} --compare" in str(told.value.advice)
    job.starts_over = True
    connected._require_same_chains(job, on_chain(*chain))
    assert job.record.chains == {"vda": chain}
    job.remove()


async def test_a_job_of_before_chains_were_recorded_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job.load(suspended(monkeypatch, tmp_path, recording=True))
    connected._require_same_chains(job, on_chain(TOP))
    assert job.record.chains == {"vda": [TOP]}
    job.remove()
