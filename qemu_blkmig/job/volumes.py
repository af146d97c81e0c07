"""Images that libvirt's storage API makes at the destination, so that its pools know them, and takes back."""

from __future__ import annotations

import logging
import posixpath

import msgspec

from qemu_blkmig.destination.protocol import Files, FilesReply
from qemu_blkmig.engine.outlast import outlast
from qemu_blkmig.errors import BlkmigError, Refused
from qemu_blkmig.job.plan import Plan
from qemu_blkmig.job.record import Job, Volume
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.virt.connection import Connection, LibvirtError
from qemu_blkmig.virt.storage import VolumeSpec, create_volume, delete_volume, directories

log = logging.getLogger(__name__)


async def make_volumes(
    target: Connection, agent: AgentClient, plan: Plan, job: Job, owner: tuple[int, int] | None
) -> None:
    """Have libvirt make the images of the plan that are not there and lie in a pool's directory.

    They are new and read as zeroes, which the plan then says. Preallocated ones are left to the agent. Raises
    `Refused` where libvirt will not.
    """
    pools = await directories(target)
    for disk, image in plan.images.items():
        pool = pools.get(posixpath.dirname(posixpath.normpath(image.path)))
        if pool is None or image.preallocation != "off" or not image.create or image.identity is not None:
            continue
        if (await agent.expect(Files([image.path]), FilesReply)).ids[0] is not None:
            continue
        backing = (image.backing.path, image.backing.format) if image.backing is not None else None
        name = posixpath.basename(image.path)
        spec = VolumeSpec(name, image.format, image.size, image.cluster_size, backing, owner)
        making = await outlast(_make(target, job, Volume(pool, name, image.path), spec))
        try:
            making.result()
        except LibvirtError as error:
            raise Refused(f"libvirt cannot make it in pool {pool}: {error}", disk=disk) from error
        making.raise_cancellation()
        plan.images[disk] = msgspec.structs.replace(image, known_zero=True)


async def _make(target: Connection, job: Job, volume: Volume, spec: VolumeSpec) -> None:
    await create_volume(target, volume.pool, spec)
    # Only what surely is ours is ever deleted: said after it was made, not before.
    job.record.volumes.append(volume)
    await job.save()


async def forget_volumes(target: Connection, job: Job) -> list[str]:
    """The files are gone: pools forget the volumes that were made for the job. What did not work, in sentences."""
    told = []
    for volume in list(job.record.volumes):
        try:
            await delete_volume(target, volume.pool, volume.name)
            job.record.volumes.remove(volume)
        except BlkmigError as error:
            log.warning("%s", error)
            told.append(f"pool {volume.pool} may still list {volume.name} (virsh pool-refresh): {error}")
    return told
