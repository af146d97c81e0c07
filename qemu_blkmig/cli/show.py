"""Results as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qemu_blkmig.units import show_bytes, show_rate, show_seconds

if TYPE_CHECKING:
    from qemu_blkmig.demo.run import DemoResult
    from qemu_blkmig.job.check import CheckedDisk, CheckResult
    from qemu_blkmig.job.managed_check import DomainCheck
    from qemu_blkmig.job.result import DiskResult, Result

VERIFIED = {
    "none": "not verified (--verify none)",
    "written": "verified as written: what was read at the source is what lies at the destination",
    "full": "fully compared: both sides are equal",
}


def result(outcome: Result) -> str:
    """A migration's or a copy's result."""
    lines = [f"{outcome.outcome}: {outcome.guest}" + (f" (pid {outcome.serving})" if outcome.serving else "")]
    for disk in outcome.disks:
        lines.append(f"  disk {disk.name}: {disk.source} -> {disk.destination} ({disk.format})")
        lines.append(
            f"    {show_bytes(disk.virtual_size)} virtual, {show_bytes(disk.allocated)} allocated; {_resumed(disk)}"
            f"copied {show_bytes(disk.copied)}, zeroed {show_bytes(disk.zeroed)}, skipped {show_bytes(disk.skipped)}, "
            f"{disk.rounds} dirty rounds"
        )
    phases = ", ".join(f"{name} {show_seconds(seconds)}" for name, seconds in outcome.phases.items())
    lines.append(f"  {show_bytes(outcome.total_copied)} copied in all; {phases}")
    if outcome.downtime is not None:
        lines.append(
            f"  downtime {show_seconds(outcome.downtime.total)} (disks {show_seconds(outcome.downtime.disk)}, "
            f"verification {show_seconds(outcome.downtime.verify)}, "
            f"RAM and devices {show_seconds(outcome.downtime.ram)})"
        )
    for slow in outcome.slowed:
        lines.append(
            f"  disk {slow.disk}: the guest's writes were slowed to {show_rate(slow.limit)} for "
            f"{show_seconds(slow.seconds)}; before, it wrote {show_rate(slow.wrote)}"
        )
    if outcome.consistency is not None:
        lines.append(f"  consistency: {outcome.consistency}")
    lines.append(f"  {VERIFIED[outcome.verified]}")
    lines += [f"  note: {warning}" for warning in outcome.warnings]
    return "\n".join(lines)


def checked_domain(outcome: DomainCheck) -> str:
    """What `virsh-blkmigrate --dry-run` found."""
    left = [f"disk {disk.target} is left alone: {disk.why}" for disk in outcome.left_alone]
    xml = [] if outcome.xml is None else ["the domain's XML for the destination:", outcome.xml.rstrip()]
    return "\n".join([*_disks(outcome.disks), *left, *xml, *_verdict(outcome)])


def checked(outcome: CheckResult) -> str:
    """What `check` found."""
    return "\n".join([*_disks(outcome.disks), *_verdict(outcome)])


def _disks(disks: Sequence[CheckedDisk]) -> list[str]:
    return [
        f"disk {disk.name}: {disk.source} -> {disk.destination or '?'} ({disk.format}, "
        f"{show_bytes(disk.virtual_size)} virtual)"
        for disk in disks
    ]


def _verdict(outcome: CheckResult | DomainCheck) -> list[str]:
    lines = [f"problem: {problem}" for problem in outcome.problems]
    lines += [f"note: {warning}" for warning in outcome.warnings]
    return [*lines, "ready" if outcome.ready else "not ready: nothing was touched"]


def demo(outcome: DemoResult) -> str:
    """What the demo did, and the proof."""
    mark = {True: "yes", False: "NO"}
    lines = [
        result(outcome.migration),
        "",
        f"proof: both disks equal at the switchover: {mark[outcome.equal]}",
        f"       records written by the guest: {outcome.records}, lost: {outcome.lost}, torn: {outcome.torn}",
        f"       {outcome.records_after} of them after the switchover, at the destination",
        f"       the guest's own longest gap between two writes: {show_seconds(outcome.longest_gap)}",
    ]
    if outcome.kept is not None:
        lines.append(f"       everything is in {outcome.kept}")
    return "\n".join(lines)


def _resumed(disk: DiskResult) -> str:
    return f"{show_bytes(disk.resumed)} were there already; " if disk.resumed else ""
