"""The end of a job that went well, but for something that would not come to rest."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qemu_blkmig.errors import Undecided
from qemu_blkmig.job import lifecycle
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.record import Job, Owner
from qemu_blkmig.job.settle import Settlement
from qemu_blkmig.places import STATE_VARIABLE


@pytest.mark.parametrize(("left_there", "unsettled"), [(False, True), (True, False)])
async def test_a_source_that_cannot_be_ended_after_the_handover_is_told_and_the_job_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_there: bool, unsettled: bool
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    fact = "the source QEMU could not be ended"

    async def settle(*_: object, **__: object) -> Settlement:
        return Settlement(Owner.DESTINATION, decided=False, left_there=left_there, facts=["arrived", fact])

    async def end(_told: object) -> None:
        """The control socket's last word."""

    async def work() -> Any:
        return SimpleNamespace(warnings=[], outcome="migrated", guest="there")

    monkeypatch.setattr(lifecycle, "settle", settle)
    life: Any = Lifecycle(Any, SimpleNamespace(deferred=contextlib.nullcontext), Any)  # type: ignore[arg-type]
    life.job = Job.create()
    life.job.record.owner = Owner.DESTINATION
    life._control = SimpleNamespace(end=end)
    try:
        with pytest.raises(Undecided) as told:
            await life.conduct(work())
        assert fact in str(told.value.state)
        assert f"qemu-blkmig cleanup {life.job.record.job}" in str(told.value.advice)
        assert life.job.directory.exists()
        assert life._unsettled is unsettled and life._at_rest is not unsettled
    finally:
        life.job.remove()
