"""--retry: which failures are followed by another attempt."""

from __future__ import annotations

import signal
from typing import cast

import pytest

from qemu_blkmig.errors import BlkmigError, Interrupted, LibvirtFailed, Refused
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.persist import persist
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.result import Result

QUIET = cast("Reporter", type("Quiet", (), {"note": lambda *_: None})())


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

    async def first(_: Interrupts) -> Result:
        tried.append(None)
        raise error

    async def again(job: str, _: Interrupts) -> Result:
        tried.append(job)
        raise error

    with pytest.raises(type(error)):
        await persist(first, again, 2, QUIET, Clock(), told.append)
    assert tried == [None, "job1", "job1"][:attempts]
    assert len(told) == attempts - 1


@pytest.mark.parametrize("failures", [0, 1])
@pytest.mark.parametrize("more_follows", [False, True])
async def test_an_interrupt_that_came_too_late_for_any_attempt_ends_what_follows(
    failures: int, *, more_follows: bool
) -> None:
    done = cast("Result", object())

    async def first(interrupts: Interrupts) -> Result:
        if failures:
            raise failing(LibvirtFailed("the network is gone"))
        return await again("", interrupts)

    async def again(_: str, interrupts: Interrupts) -> Result:
        interrupts.received = signal.SIGINT
        return done

    work = persist(first, again, 2, QUIET, Clock(), lambda _: None, more_follows=more_follows)
    if more_follows:
        with pytest.raises(Interrupted):
            await work
    else:
        assert await work is done
