"""What is told of a job that is brought to rest."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from qemu_blkmig.destination import ownership
from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.destination.protocol import Created
from qemu_blkmig.job.options import Afterwards, CopyOptions, Target
from qemu_blkmig.job.place import Local
from qemu_blkmig.job.record import Job, Owner
from qemu_blkmig.job.settle import settle
from qemu_blkmig.job.settlement import Settlement, unsettled
from qemu_blkmig.job.source_images import SourceImage, leave_behind


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("QEMU_BLKMIG_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return Job.create()


async def test_an_image_that_was_there_and_is_half_written_is_told(job: Job) -> None:
    job.record.images = ["/there/before"]
    assert (await settle(job)).facts == ["nothing was done to a guest, the source is as it was"]
    job.record.copy = CopyOptions(Target(Local("/there")), image="/disk.raw")
    assert (await settle(job)).facts == ["no guest is concerned, the source is as it was"]
    job.record.filling = True
    assert (await settle(job)).facts[1:] == ["what was at the destination before is partly overwritten: /there/before"]
    job.remove()


@pytest.mark.parametrize(
    ("is_there", "told"),
    [
        (True, "the incomplete images at the destination were removed"),
        (False, "no incomplete image was there any more at the destination"),
    ],
)
async def test_only_what_was_there_is_told_to_have_been_removed(
    job: Job, tmp_path: Path, is_there: bool, told: str
) -> None:
    image = tmp_path / "image"
    image.touch()
    made = image.stat()
    job.record.images, job.record.created = [str(image)], [Created(str(image), made.st_dev, made.st_ino)]
    if not is_there:
        image.unlink()
    assert (await settle(job)).facts[1:] == [told]
    assert not image.exists()
    job.remove()


@pytest.mark.parametrize(
    ("owner", "words"),
    [(Owner.SOURCE, "the guest is the source's"), (Owner.UNDECIDED, "never `cont` one while the other runs")],
)
def test_the_advice_goes_by_who_has_the_guest(owner: Owner, words: str) -> None:
    error = unsettled("it failed", Settlement(owner, decided=False, facts=["a", "b"]), "1a2b")
    assert error.exit_code == 4
    assert error.state == "a; b"
    assert error.advice is not None
    assert words in error.advice
    assert error.advice.endswith("qemu-blkmig cleanup 1a2b")


async def test_a_handover_that_was_undone_is_told_and_not_suspended_by_whoever_settles_again(
    job: Job, tmp_path: Path
) -> None:
    job.record.source_qmp = str(tmp_path / "nobody")
    job.record.owner, job.record.recording = Owner.UNDECIDED, True
    for _ in range(2):
        settlement = await settle(job, suspend=True)
        assert (settlement.owner, settlement.decided, settlement.suspended) == (Owner.SOURCE, True, False)
        assert settlement.facts[-1] == "in the handover the destination did not take it, and no longer can"
    job.remove()


def records(*images: Path) -> list[str | None]:
    """The states that the ownership records tell."""
    told = [ownership.read(str(image)) for image in images]
    return [record.state if record else None for record in told]


@pytest.mark.parametrize("before", ["neither", "source", "destination"])
async def test_after_a_crash_in_between_the_ownership_records_follow_the_job_s(
    job: Job, tmp_path: Path, before: str
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    job.record.owner = Owner.DESTINATION
    job.record.images, job.record.moving = [str(there)], [SourceImage("vda", str(here), f"hostb:{there}")]
    ownership.announce(str(there), job.record.job, "vda", f"hosta:{here}")
    if before == "source":
        ownership.move(str(here), job.record.job, "vda", f"hostb:{there}")
    elif before == "destination":
        ownership.complete(str(there), job.record.job)
    assert (await settle(job)).decided
    assert records(here, there) == ["moved", "complete"]
    assert (await settle(job)).decided
    told = ownership.read(str(here))
    assert told is not None and told.peer == f"hostb:{there}"
    job.remove()


async def test_an_image_that_nothing_was_written_to_is_what_it_was(job: Job, tmp_path: Path) -> None:
    there = tmp_path / "there"
    job.record.images = [str(there)]
    ownership.announce(str(there), job.record.job, "vda", "hosta:/here")
    await settle(job)
    assert records(there) == [None]
    ownership.announce(str(there), job.record.job, "vda", "hosta:/here")
    job.record.filling = True
    await settle(job)
    assert records(there) == ["incoming"]
    job.remove()


async def test_a_record_that_cannot_be_written_is_told_and_decides_nothing(job: Job, tmp_path: Path) -> None:
    job.record.owner = Owner.DESTINATION
    job.record.moving = [SourceImage("vda", str(tmp_path / "nowhere" / "image"), "hostb:/there")]
    settlement = await settle(job)
    assert settlement.decided
    assert "never start a guest from it" in settlement.facts[-1]
    job.remove()


@pytest.mark.parametrize("choice", Afterwards)
def test_the_source_s_images_are_put_away_and_repeating_that_is_safe(tmp_path: Path, choice: Afterwards) -> None:
    image, moved = tmp_path / "image", tmp_path / "image.moved-1a2b"
    image.write_bytes(b"old")
    there = {"keep": image, "rename": moved, "delete": None}[choice.value]
    for _ in range(2):
        assert leave_behind([SourceImage("vda", str(image), "hostb:/there")], "1a2b", choice) == []
        assert [path for path in (image, moved) if path.exists()] == ([there] if there else [])
        assert records(image, moved) == ["moved" if path == there else None for path in (image, moved)]


@pytest.mark.parametrize("choice", [Afterwards.RENAME, Afterwards.DELETE])
def test_an_image_that_was_put_away_is_not_told_of_where_a_link_to_it_stays(tmp_path: Path, choice: Afterwards) -> None:
    image, link = tmp_path / "image", tmp_path / "link"
    image.write_bytes(b"old")
    link.symlink_to(image)
    for _ in range(2):
        assert leave_behind([SourceImage("vda", str(link), "hostb:/there")], "1a2b", choice) == []
        assert not image.exists() and records(image) == [None]


@pytest.mark.parametrize("choice", Afterwards)
def test_the_file_that_an_image_has_its_data_in_goes_with_it_where_it_is_deleted(
    tmp_path: Path, choice: Afterwards
) -> None:
    image, data = tmp_path / "image", tmp_path / "data"
    image.write_bytes(b"header")
    data.write_bytes(b"old")
    for _ in range(2):
        assert leave_behind([SourceImage("vda", str(image), "hostb:/there", data_file=str(data))], "1a2b", choice) == []
        assert data.exists() == (choice is not Afterwards.DELETE)


@pytest.mark.parametrize("alive", [True, False])
async def test_images_are_put_away_only_when_the_source_qemu_is_known_to_be_gone(
    job: Job, tmp_path: Path, alive: bool
) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"old")
    job.record.source_process = ProcessId.of(os.getpid()) if alive else None
    job.record.owner, job.record.source_images = Owner.DESTINATION, Afterwards.DELETE
    job.record.moving = [SourceImage("vda", str(image), "hostb:/there")]
    assert "the images at the source were kept where they are" in (await settle(job)).facts
    assert image.exists() and records(image) == ["moved"]
    job.remove()


def test_an_image_that_somebody_has_open_is_kept(tmp_path: Path) -> None:
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", image, "1M"], check=True)
    reader = subprocess.Popen(["qemu-nbd", "-r", "-t", "-f", "raw", "-k", tmp_path / "nbd", image])
    try:
        while not (tmp_path / "nbd").exists():
            time.sleep(0.01)
        # It listens before it opens the image, but answers after.
        subprocess.run(["qemu-img", "info", f"nbd+unix:///?socket={tmp_path}/nbd"], check=True, stdout=subprocess.PIPE)
        [told] = leave_behind([SourceImage("vda", str(image), "hostb:/there")], "1a2b", Afterwards.DELETE)
    finally:
        reader.kill()
        reader.wait()
    assert told == f"{image} was kept: somebody has it open"
    assert image.exists() and records(image) == ["moved"]
