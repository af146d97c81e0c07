"""What keeps a domain from leaving: libvirt would refuse to migrate it, after its disks were copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from qemu_blkmig.virt.connection import Connection, LibvirtError, libvirt
from qemu_blkmig.virt.domain import rooted

_LEFT_BEHIND = "passed through from this host, which libvirt does not migrate"


async def hindrances(source: Connection, domain: Any, xml: str, *, runs: bool = True) -> list[str]:
    """Jobs of libvirt's that are under way, snapshots, checkpoints, where it `runs` devices of the host's, else a saved
    state.
    """
    found = [*_bound(rooted(xml))] if runs else []
    if not runs and await source.call(domain.hasManagedSaveImage):
        found.append(
            "its state was saved here (virsh managedsave), and would be left behind, to go on with disks that are old: "
            "start it, and it moves while it runs; or virsh managedsave-remove gives up what it was doing"
        )
    if (job := await _job(source, domain)) is not None:
        found.append(f"{job} of this domain is under way (virsh domjobinfo)")
    if snapshots := await source.call(domain.snapshotNum):
        found.append(
            f"libvirt migrates no domain with snapshots, and it has {snapshots}: virsh snapshot-delete --metadata "
            "forgets one and leaves its data"
        )
    if checkpoints := await _checkpoints(source, domain):
        found.append(
            f"libvirt migrates no domain with checkpoints, and it has {checkpoints}: virsh checkpoint-delete "
            "--metadata forgets one"
        )
    return found


async def _job(source: Connection, domain: Any) -> str | None:
    module = libvirt()
    try:
        told = await source.call(domain.jobStats)
    except LibvirtError:
        # It does not run: nor does a job.
        return None
    if told.get("type", module.VIR_DOMAIN_JOB_NONE) == module.VIR_DOMAIN_JOB_NONE:
        return None
    names = {
        module.VIR_DOMAIN_JOB_OPERATION_BACKUP: "a backup",
        module.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "a migration",
        module.VIR_DOMAIN_JOB_OPERATION_SAVE: "a save",
        module.VIR_DOMAIN_JOB_OPERATION_DUMP: "a dump",
        module.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: "a snapshot",
    }
    return names.get(told.get(module.VIR_DOMAIN_JOB_OPERATION), "a job")


async def _checkpoints(source: Connection, domain: Any) -> int:
    try:
        return len(await source.call(domain.listAllCheckpoints))
    except LibvirtError as error:
        if error.code == libvirt().VIR_ERR_NO_SUPPORT:
            return 0
        raise


def _bound(root: ElementTree.Element) -> Iterator[str]:
    """Read in libvirt 9.0: qemuMigrationSrcIsAllowed. What QEMU itself does not migrate, QEMU tells."""
    for device in root.findall("./devices/hostdev"):
        kind = device.get("type", device.get("mode", "?"))
        if device.get("mode") != "subsystem" or kind.startswith("scsi"):
            yield f"a {kind} device is {_LEFT_BEHIND}: detach it (virsh detach-device)"
    for interface in root.findall("./devices/interface[@type='hostdev']"):
        if interface.find("teaming") is None:
            yield f"a network device is {_LEFT_BEHIND} without <teaming/>: detach it (virsh detach-interface)"
    for filesystem in root.findall("./devices/filesystem"):
        target = filesystem.find("target")
        name = target.get("dir") if target is not None else "?"
        yield f"a directory of this host ({name}) is shared with the guest: detach it (virsh detach-device)"


def taken_along(xml: str) -> Iterator[str]:
    """What should be known of devices that are bound to the host and do not hinder."""
    root = rooted(xml)
    for device in root.findall("./devices/hostdev[@mode='subsystem']"):
        if device.get("type") in ("usb", "pci", "mdev"):
            yield f"a {device.get('type')} device of this host is passed through: at the destination it is another one"
    cpu = root.find("./cpu")
    if cpu is not None and cpu.get("mode") == "host-passthrough":
        yield "its CPU is this host's own (host-passthrough): only the same one, with the same microcode, can go on"
