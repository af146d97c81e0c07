"""Which jobs are not gone on with, and what is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qemu_blkmig.errors import Refused
from qemu_blkmig.job import resume
from qemu_blkmig.job.record import Job, Owner
from qemu_blkmig.job.settlement import Settlement
from qemu_blkmig.places import STATE_VARIABLE


async def test_a_job_that_turns_out_to_have_handed_the_guest_over_is_told_to_be_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    job = Job.create()
    job.record.target_launched = True

    async def settle(*_: Any, **__: Any) -> Settlement:
        return Settlement(Owner.DESTINATION, facts=["the guest runs at the destination"])

    monkeypatch.setattr(resume, "settle", settle)
    with pytest.raises(Refused, match="come to its end") as told:
        await resume._come_to_rest(job)
    assert told.value.state == "the guest runs at the destination"
    assert not job.directory.exists()
