"""How a domain is given back to the source: which pauses are ours to end."""

from __future__ import annotations

from typing import cast
from unittest.mock import AsyncMock, MagicMock

import pytest

from qemu_blkmig.job import settle_domains
from qemu_blkmig.job.record import Owner, Record
from qemu_blkmig.job.settle_domains import Domains
from qemu_blkmig.job.settlement import Settlement

USER, MIGRATION = 1, 2
"""Why libvirt has a domain paused."""
RUNS, PAUSED = 1, 3


class Domain:
    """As libvirt tells of it; it can be paused, and resumed."""

    def __init__(self, state: int, reason: int) -> None:
        self.told = (state, reason)

    def suspend(self) -> None:
        """See libvirt."""
        self.told = (PAUSED, USER)

    def resume(self) -> None:
        """See libvirt, which refuses it of one that runs."""
        assert self.told[0] == PAUSED
        self.told = (RUNS, 0)


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
    facts = await returned(monkeypatch, record, domain)
    assert (domain.told[0] == RUNS) is runs
    assert facts == ["the guest runs at the source" if runs else "the guest is at the source, paused"]


@pytest.mark.parametrize(
    ("just_died", "migrating", "was_running", "runs"),
    [(True, True, False, False), (False, True, False, True), (True, False, False, True), (True, True, True, True)],
    ids=["libvirt let it go on", "somebody has resumed it since", "libvirt did not move it", "it is to run"],
)
async def test_a_guest_that_somebody_had_paused_and_libvirt_let_go_on_is_paused_again(
    monkeypatch: pytest.MonkeyPatch, *, just_died: bool, migrating: bool, was_running: bool, runs: bool
) -> None:
    record = Record("cafe", "/run", run_state_taken=True, migrating=migrating, was_running=was_running)
    record.told_to_pause = was_running
    domain = Domain(RUNS, 0)
    await returned(monkeypatch, record, domain, just_died=just_died)
    assert (domain.told[0] == RUNS) is runs


async def returned(
    monkeypatch: pytest.MonkeyPatch, record: Record, domain: Domain, *, just_died: bool = False
) -> list[str]:
    """Give the guest back to the source; what is told of it."""
    job, near = MagicMock(), MagicMock()
    job.record = record
    sides = Domains(job, MagicMock(), is_off=False, just_died=just_died, lent=(near, MagicMock()))

    async def call(function: object) -> object:
        return cast(MagicMock, function)()

    near.call = call
    monkeypatch.setattr(sides, "_domain", AsyncMock(return_value=domain))
    monkeypatch.setattr(sides, "_state", AsyncMock(side_effect=lambda _: settle_domains._State(domain.told)))
    for name in ("_let_migration_end", "_destroy_what_waits"):
        monkeypatch.setattr(sides, name, AsyncMock())
    for name in ("PassthroughMonitor", "give_back_limits", "clean_source"):
        monkeypatch.setattr(settle_domains, name, AsyncMock())
    settlement = Settlement(Owner.SOURCE)
    await sides.return_to_source(settlement)
    return settlement.facts
