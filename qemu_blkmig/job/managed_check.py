"""`virsh-blkmigrate --dry-run`: everything that would fail for a domain, all at once, before anything is touched."""

from __future__ import annotations

import contextlib

import msgspec

from qemu_blkmig.errors import BlkmigError
from qemu_blkmig.job.arrangement import Arrangement
from qemu_blkmig.job.check import CheckedDisk, checked_disks, state_directory_trouble
from qemu_blkmig.job.managed_look import look_at_domain
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.plan import Plan
from qemu_blkmig.nbd.binding import libnbd
from qemu_blkmig.virt.domain import without_secrets


class LeftAlone(msgspec.Struct, frozen=True):
    """A disk, by its target, that is not migrated, and why."""

    target: str
    why: str


class DomainCheck(msgspec.Struct, frozen=True):
    """`ready`: a migration would start. `problems`: why not; `warnings`: what should be known.

    `xml`: what the destination's libvirt would get; `persistent_xml`: what would be defined there; both without
    passwords.
    """

    ready: bool
    domain: str
    disks: list[CheckedDisk]
    left_alone: list[LeftAlone]
    problems: list[str]
    warnings: list[str]
    xml: str | None
    persistent_xml: str | None


async def check_managed(options: ManagedOptions) -> DomainCheck:
    """Look at both sides and touch nothing. Problems are collected, not raised."""
    problems: list[str] = []
    plans: list[Plan] = []
    arrangement: Arrangement | None = None
    try:
        libnbd()
        async with contextlib.AsyncExitStack() as stack:
            arrangement, plans = await look_at_domain(options, stack)
            problems += arrangement.problems
            problems += [problem for plan in plans for problem in plan.problems]
    except BlkmigError as error:
        problems.append(f"{error}{f': {error.advice}' if error.advice else ''}")
    if (trouble := state_directory_trouble()) is not None:
        problems.append(trouble)
    warnings = [*(arrangement.warnings if arrangement else ()), *(told for plan in plans for told in plan.warnings)]
    return DomainCheck(
        ready=not problems,
        domain=options.domain,
        disks=[disk for plan in plans for disk in checked_disks(plan)],
        left_alone=[LeftAlone(*each) for each in arrangement.left_alone] if arrangement else [],
        problems=problems,
        warnings=warnings,
        xml=_shown(arrangement.xml) if arrangement else None,
        persistent_xml=_shown(arrangement.persistent_xml) if arrangement else None,
    )


def _shown(xml: str | None) -> str | None:
    return None if xml is None else without_secrets(xml)
