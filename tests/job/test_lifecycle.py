"""The end of a job that went well, but for something that would not come to rest."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qemu_blkmig.errors import (
    BlkmigError,
    DestinationFailed,
    DestinationWriteError,
    HostSilent,
    Interrupted,
    Refused,
    Undecided,
)
from qemu_blkmig.job import lifecycle
from qemu_blkmig.job.connected import compare_instead
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.record import Job, Owner
from qemu_blkmig.job.result import Result
from qemu_blkmig.job.settlement import Settlement
from qemu_blkmig.places import STATE_VARIABLE


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A job whose guest was handed over."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))

    async def end(_told: object) -> None:
        """The control socket's last word."""

    life: Any = Lifecycle(Any, SimpleNamespace(deferred=contextlib.nullcontext), Any)  # type: ignore[arg-type]
    life.job = Job.create()
    life.job.record.owner = Owner.DESTINATION
    life._control = SimpleNamespace(end=end)
    life.journal = SimpleNamespace(fact=lambda _name, _value: None)
    yield life
    life.job.remove()


async def migrated() -> Result:
    """What came of the work."""
    return Result("1a2b3c4d", "migrated", "there", [], 0, {}, None, "none", [])


def settling(monkeypatch: pytest.MonkeyPatch, settlement: Settlement) -> None:
    """Have the job settled so."""

    async def settle(*_: object, **__: object) -> Settlement:
        return settlement

    monkeypatch.setattr(lifecycle, "settle", settle)


async def test_a_source_that_cannot_be_ended_after_the_handover_is_told_and_the_job_stays(
    life: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fact = "the source QEMU could not be ended"
    settling(monkeypatch, Settlement(Owner.DESTINATION, decided=False, facts=["arrived", fact]))
    with pytest.raises(Undecided) as told:
        await life.conduct(migrated())
    assert fact in str(told.value.state)
    assert f"qemu-blkmig cleanup {life.job.record.job}" in str(told.value.advice)
    assert life.job.directory.exists()
    assert life._unsettled and not life._at_rest


async def test_a_host_that_cannot_be_tidied_up_after_the_handover_is_no_failure_and_the_job_stays(
    life: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fact = "hostb cannot be reached"
    settling(monkeypatch, Settlement(Owner.DESTINATION, decided=False, left_there=True, facts=["arrived", fact]))
    result = await life.conduct(migrated())
    assert result.warnings[0] == fact
    assert f"qemu-blkmig cleanup {life.job.record.job}" in result.warnings[1]
    assert life.job.directory.exists()
    assert life._at_rest and not life._unsettled


def test_who_is_to_compare_is_not_told_to_go_on_without(life: Any) -> None:
    name = life.job.record.job
    settlement = Settlement(Owner.SOURCE, suspended=True)
    plain = f"qemu-blkmig resume {name} goes on where it was; qemu-blkmig cleanup {name} removes what is left"
    assert lifecycle._told(DestinationFailed("gone"), settlement, life.job).advice == plain
    assert lifecycle._told(DestinationFailed("full", advice="make room"), settlement, life.job).advice == (
        f"make room: {plain}"
    )
    full = DestinationWriteError("cannot be written", disk="vda", offset=0, errno=errno.ENOSPC)
    assert lifecycle._told(full, settlement, life.job).advice == f"make room at the destination: {plain}"
    refused = lifecycle._told(Refused("it was resized"), settlement, life.job).advice
    assert refused == f"if that can be mended: {plain.replace('; ', '; else ')}, to begin anew"
    compare = compare_instead(name)
    told = lifecycle._told(DestinationFailed("lost", advice=compare), settlement, life.job).advice
    assert told == f"{compare}; qemu-blkmig cleanup {name} removes what is left"


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        (DestinationFailed("ssh to hostb was ended by SIGKILL"), "mend the cause and run the same command again"),
        (Refused("no room", advice="make room"), "make room"),
        (Interrupted(2), "run the same command again: it starts from the beginning"),
    ],
)
async def test_who_failed_before_anything_was_touched_is_told_what_to_do(
    life: Any, failure: BlkmigError, advice: str
) -> None:
    life.reporter = SimpleNamespace(close=lambda: None)
    life.journal.outcome, life.journal.close = lambda *_: None, lambda: None
    told = await life._fail(failure)
    assert (told.state, told.advice) == ("nothing was touched", advice)


@pytest.mark.parametrize(
    ("decided", "advice"), [(True, "see how the guest is there"), (False, "when the destination host can be reached")]
)
def test_what_fails_once_the_guest_has_arrived_does_not_say_that_the_source_is_the_truth(
    life: Any, decided: bool, advice: str
) -> None:
    facts = ["the guest runs at the destination"]
    settlement = Settlement(Owner.DESTINATION, decided=decided, left_there=not decided, facts=facts)
    told = lifecycle._told(HostSilent("hostb did not answer"), settlement, life.job)
    assert told.exit_code == 4 and told.state == facts[0] and (told.advice or "").startswith(advice)
    assert str(told) == "the guest was handed over, but then: hostb did not answer"
    settlement.owner = Owner.SOURCE
    assert lifecycle._told(HostSilent("hostb did not answer"), settlement, life.job).exit_code == 1
