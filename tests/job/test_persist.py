"""--retry: which failures are followed by another attempt."""

from __future__ import annotations

from typing import cast

import pytest

from qemu_blkmig.errors import BlkmigError, Interrupted, LibvirtFailed, Refused
from qemu_blkmig.job.persist import persist
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.result import Result


class Clock:
    """Time that passes at once."""

    def now(self) -> float:
        return 0.0

    async def sleep(self, _seconds: float) -> None:
        return


def failing(error: BlkmigError, *, suspended: bool = True, lasting: bool = False) -> BlkmigError:
    error.suspended = "job1" if suspended else None
    error.lasting = lasting
    return error


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (failing(LibvirtFailed("the network is gone")), 3),
        (failing(Refused("the destination's network lan is not active")), 3),
        (failing(LibvirtFailed("unsupported configuration"), lasting=True), 1),
        (failing(Refused("libvirt would not migrate it"), lasting=True), 1),
        (failing(Refused("the destination has no network lan"), suspended=False), 1),
        (failing(Interrupted(1)), 1),
    ],
    ids=str,
)
async def test_what_may_pass_is_tried_again_and_what_cannot_is_not(error: BlkmigError, attempts: int) -> None:
    tried: list[str | None] = []
    told: list[BlkmigError] = []

    async def attempt(job: str | None = None) -> Result:
        tried.append(job)
        raise error

    reporter = cast("Reporter", type("Quiet", (), {"note": lambda *_: None})())
    with pytest.raises(type(error)):
        await persist(attempt, attempt, 2, reporter, Clock(), told.append)
    assert tried == [None, "job1", "job1"][:attempts]
    assert len(told) == attempts - 1
