"""What is told of a job that is brought to rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_blkmig.job.record import Job, Owner
from qemu_blkmig.job.settle import Settlement, settle, unsettled


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("QEMU_BLKMIG_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return Job.create()


async def test_an_image_that_was_there_and_is_half_written_is_told(job: Job) -> None:
    job.record.images = ["/there/before"]
    assert (await settle(job)).facts == ["no guest is concerned, the source is as it was"]
    job.record.filling = True
    assert (await settle(job)).facts[1:] == ["what was at the destination before is partly overwritten: /there/before"]
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
