"""Disks that are not copied though the guest writes to them: whether the destination has the very same storage."""

from __future__ import annotations

from collections.abc import Mapping

from qemu_blkmig.destination import devices
from qemu_blkmig.destination.files import FileId, file_id, names_everywhere
from qemu_blkmig.destination.protocol import Files, FilesReply
from qemu_blkmig.destination.sharedfs import shared_file_system
from qemu_blkmig.errors import Refused
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.virt.domain import Domain, DomainDisk

NOT_CHOSEN = "it is not chosen by --migrate-disks"
"""Why a disk is left alone, in words."""


async def staying(
    domain: Domain, there: Mapping[str, str | None], agent: AgentClient
) -> tuple[dict[str, str], list[str]]:
    """Which of a running domain's disks lie on one device that both hosts see, in words; what is lost of the others, if
    they lie on no shared file system: of what it writes to them the destination can know nothing.

    `there`: what they will lie in at the destination, by target.
    """
    shared, lost = dict[str, str](), list[str]()
    for disk in domain.disks:
        if disk.left_alone is None or not disk.written_here:
            continue
        found = None if disk.path is None else file_id(disk.path)
        if found is not None and found[0] == "device":
            known = await _same_device(found, there.get(disk.target), agent)
            if known is not None:
                shared[disk.target] = f"{disk.path} is the same device at both hosts ({known})"
                continue
        elif disk.path is not None and shared_file_system(disk.path):
            continue
        lost.append(_lost(disk, found))
    return shared, lost


async def _same_device(here: FileId, there: str | None, agent: AgentClient) -> str | None:
    """By which name it is known for certain that these are one device; None: it is not known."""
    if there is None:
        return None
    try:
        (known,) = (await agent.expect(Files([there]), FilesReply)).names
    except Refused:
        # It is out of a confined agent's bounds.
        return None
    return next((name for name in names_everywhere(here) if name in known and devices.is_certain(name)), None)


def _lost(disk: DomainDisk, found: FileId | None) -> str:
    if disk.path is None:
        return (
            f"disk {disk.target} cannot be copied: {disk.left_alone}; at the destination it would go on with another "
            "one (--unsafe permits it)"
        )
    device = found is not None and found[0] == "device"
    where = "is not known to be the same device at both hosts" if device else "is not on shared storage"
    why = "out of --migrate-disks" if disk.left_alone == NOT_CHOSEN else f"alone, for {disk.left_alone}"
    return (
        f"disk {disk.target} is left {why}, but {disk.path} {where}: at the destination the guest would go on with "
        "another one (--unsafe permits it)"
    )
