"""How a domain is given back to the source: which pauses are ours to end, which of somebody's are to be made again."""

from __future__ import annotations

import asyncio
from typing import cast
from unittest.mock import AsyncMock, MagicMock

import pytest

from qemu_blkmig.destination.files import boot_id
from qemu_blkmig.job import settle_domains
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.peers import HostUnreachable
from qemu_blkmig.job.place import Ssh
from qemu_blkmig.job.record import Managed, Owner, Record
from qemu_blkmig.job.settle_domains import Domains
from qemu_blkmig.job.settlement import Settlement
from qemu_blkmig.virt.connection import LibvirtError, libvirt

USER, MIGRATION = 1, 2
"""Why libvirt has a domain paused."""
UNPAUSED, CANCELED = 5, 6
"""Why libvirt has it run: somebody resumed it; its migration came to nothing."""
UNKNOWN, DESTROYED, MIGRATED = 0, 2, 4
"""Why it is shut off."""
RUNS, PAUSED, SHUT_OFF, CRASHED = 1, 3, 5, 6


class Domain:
    """As libvirt tells of it, which ends a migration of it and has it run then, at the look after so many."""

    def __init__(self, state: int, reason: int, looks: float = 0) -> None:
        self.told = (state, reason)
        self.looks = looks

    def state(self) -> tuple[int, int]:
        """See libvirt."""
        return self.told

    def ID(self) -> int:
        """See libvirt."""
        return 7

    def destroy(self) -> None:
        """See libvirt."""
        self.told = (SHUT_OFF, DESTROYED)

    def resume(self) -> None:
        """See libvirt, which refuses it of one that runs."""
        assert self.told[0] == PAUSED
        self.told = (RUNS, UNPAUSED)

    def suspend(self) -> None:
        """See libvirt."""
        self.told = (PAUSED, USER)

    def abortJob(self) -> None:
        """See libvirt; in vain."""

    async def is_migrated(self, *_: object) -> bool:
        """See `virt.migration`."""
        self.looks -= 1
        if self.looks == 0:
            self.told = (RUNS, CANCELED)
        return self.looks > 0


async def called(function: object) -> object:
    """What a libvirt answers at once."""
    return cast(MagicMock, function)()


async def silence(_: object) -> object:
    """A libvirt that does not answer."""
    return await asyncio.Event().wait()


def both(
    monkeypatch: pytest.MonkeyPatch, record: Record, domain: Domain, *, long_after: bool = False, silent: bool = False
) -> Domains:
    """The domain at both ends, where the destination has none, or is `silent`."""
    job, near, far = MagicMock(), MagicMock(), MagicMock()
    job.record = record
    near.call = called
    far.call = silence if silent else AsyncMock(return_value=(SHUT_OFF, 0))
    sides = Domains(job, MagicMock(), is_off=False, long_after=long_after, lent=(near, far))
    monkeypatch.setattr(sides, "_domain", AsyncMock(return_value=domain))
    monkeypatch.setattr(settle_domains, "is_migrated", domain.is_migrated)
    for name in ("SETTLE", "REACH"):
        monkeypatch.setattr(settle_domains, name, 0.1)
    for name in ("PassthroughMonitor", "give_back_limits", "clean_source"):
        monkeypatch.setattr(settle_domains, name, AsyncMock())
    return sides


async def returned(
    monkeypatch: pytest.MonkeyPatch, record: Record, domain: Domain, *, long_after: bool = False, silent: bool = False
) -> Settlement:
    """How things stand when it was given back."""
    settlement = Settlement(Owner.SOURCE)
    await both(monkeypatch, record, domain, long_after=long_after, silent=silent).return_to_source(settlement)
    return settlement


@pytest.mark.parametrize(
    ("reason", "told_to_pause", "was_running", "runs"),
    [
        (MIGRATION, False, True, True),
        (USER, True, True, True),
        (USER, False, True, False),
        (USER, True, False, False),
    ],
    ids=["by libvirt's migration", "by libvirt for us", "by somebody", "by somebody before us"],
)
async def test_a_guest_is_resumed_where_the_pause_was_ours_or_libvirts(
    monkeypatch: pytest.MonkeyPatch, reason: int, *, told_to_pause: bool, was_running: bool, runs: bool
) -> None:
    record = Record("cafe", "/run", run_state_taken=True, told_to_pause=told_to_pause, was_running=was_running)
    domain = Domain(PAUSED, reason)
    settlement = await returned(monkeypatch, record, domain)
    assert (domain.told[0] == RUNS) is runs
    assert settlement.facts == ["the guest runs at the source" if runs else "the guest is at the source, paused"]


@pytest.mark.parametrize(
    ("reason", "migrating", "was_running", "long_after", "runs"),
    [
        (CANCELED, True, False, False, False),
        (CANCELED, True, False, True, True),
        (CANCELED, False, False, False, True),
        (CANCELED, True, True, False, True),
        (UNPAUSED, True, False, False, True),
    ],
    ids=["by libvirt", "by libvirt, long since", "by libvirt, before us", "it is to run", "by somebody"],
)
async def test_a_guest_that_somebody_had_paused_and_libvirt_has_let_go_on_is_paused_again(
    monkeypatch: pytest.MonkeyPatch, reason: int, *, migrating: bool, was_running: bool, long_after: bool, runs: bool
) -> None:
    record = Record("cafe", "/run", run_state_taken=True, migrating=migrating, was_running=was_running)
    record.told_to_pause = was_running
    domain = Domain(RUNS, reason)
    settlement = await returned(monkeypatch, record, domain, long_after=long_after)
    assert (domain.told[0] == RUNS) is runs
    assert settlement.decided


async def test_a_crashed_guest_whose_qemu_libvirt_keeps_is_rid_of_what_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record("cafe", "/run", run_state_taken=True, was_running=True)
    sides, cleaned = both(monkeypatch, record, Domain(CRASHED, 1)), AsyncMock()
    monkeypatch.setattr(settle_domains, "clean_source", cleaned)
    settlement = Settlement(Owner.SOURCE)
    await sides.return_to_source(settlement)
    assert settlement.facts == ["the guest is at the source, crashed"]
    cleaned.assert_awaited_once()


@pytest.mark.parametrize(
    ("reason", "known", "taken"),
    [(DESTROYED, False, False), (MIGRATED, False, True), (UNKNOWN, False, True), (DESTROYED, True, True)],
)
async def test_a_domain_that_somebody_else_may_have_moved_onto_the_images_keeps_them(
    monkeypatch: pytest.MonkeyPatch, reason: int, *, known: bool, taken: bool
) -> None:
    unknown = LibvirtError("the destination's libvirt", "no domain", libvirt().VIR_ERR_NO_DOMAIN)
    sides = both(monkeypatch, Record("cafe", "/run"), Domain(SHUT_OFF, reason))
    monkeypatch.setattr(
        sides._far_end, "call", AsyncMock(return_value=(SHUT_OFF, 0), side_effect=None if known else unknown)
    )
    settlement = Settlement(Owner.SOURCE)
    await sides.return_to_source(settlement)
    assert settlement.taken is taken
    assert ("its disks hold all that it wrote" in settlement.facts) is not taken


@pytest.mark.parametrize(
    ("left", "long_after", "taken", "moved"),
    [(True, False, True, False), (True, True, False, True), (False, False, False, False)],
)
async def test_so_may_one_of_which_nobody_knows_any_more_when_a_job_was_left(
    monkeypatch: pytest.MonkeyPatch, *, left: bool, long_after: bool, taken: bool, moved: bool
) -> None:
    unknown = LibvirtError("libvirt", "no domain", libvirt().VIR_ERR_NO_DOMAIN)
    sides = both(monkeypatch, Record("cafe", "/run"), Domain(SHUT_OFF, DESTROYED), long_after=long_after)
    monkeypatch.setattr(sides, "_domain", AsyncMock(side_effect=unknown))
    sides._job.left = left
    settlement = Settlement(Owner.SOURCE)
    await sides.return_to_source(settlement)
    assert (settlement.taken, settlement.moved) == (taken, moved)


@pytest.mark.parametrize(
    ("number", "booted", "there", "destroyed", "returned"),
    [
        (7, boot_id(), SHUT_OFF, True, False),
        (7, boot_id(), RUNS, True, False),
        (None, "", RUNS, True, False),
        (6, boot_id(), SHUT_OFF, False, True),
        (6, boot_id(), RUNS, False, False),
        (7, "another time", SHUT_OFF, False, True),
        (7, "another time", RUNS, False, False),
    ],
)
async def test_only_the_rest_of_what_was_handed_over_is_ended_at_the_source(
    monkeypatch: pytest.MonkeyPatch, number: int | None, booted: str, there: int, *, destroyed: bool, returned: bool
) -> None:
    domain = Domain(PAUSED, USER)
    sides = both(monkeypatch, Record("cafe", "/run", owner=Owner.DESTINATION), domain)
    options = ManagedOptions("vm", "qemu+ssh://hostb/system", Ssh("hostb", "/"))
    sides._managed = Managed(options, "uuid", "vm", "vm", number, booted)
    monkeypatch.setattr(sides._far_end, "call", AsyncMock(return_value=(there, 0)))
    settlement = Settlement(Owner.DESTINATION)
    await sides.leave_to_destination(settlement)
    assert (domain.told[0] == SHUT_OFF) is destroyed
    assert settlement.returned is returned
    assert settlement.decided is (destroyed or returned)


async def test_what_libvirt_ends_only_while_the_job_is_settled_undoes_nobody_s_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = Record("cafe", "/run", run_state_taken=True, migrating=True, was_running=False)
    domain = Domain(PAUSED, MIGRATION, looks=3)
    settlement = await returned(monkeypatch, record, domain)
    assert domain.told[0] == PAUSED and settlement.decided
    assert settlement.facts == ["the guest is at the source, paused"]


async def test_a_paused_guest_is_not_left_to_a_migration_that_libvirt_has_not_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = Record("cafe", "/run", run_state_taken=True, migrating=True, was_running=False)
    domain = Domain(PAUSED, MIGRATION, looks=float("inf"))
    settlement = await returned(monkeypatch, record, domain)
    assert domain.told[0] == PAUSED and not settlement.decided
    assert "may let the paused guest go on" in settlement.facts[0]


async def test_a_destination_that_tells_nothing_of_the_domain_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = Record("cafe", "/run", run_state_taken=True, migrating=True)
    domain = Domain(PAUSED, MIGRATION)
    settlement = await asyncio.wait_for(returned(monkeypatch, record, domain, silent=True), 5)
    assert domain.told[0] == RUNS and settlement.decided
    with pytest.raises(HostUnreachable, match="did not tell within"):
        await asyncio.wait_for(both(monkeypatch, record, domain, silent=True).decide(settlement), 5)
