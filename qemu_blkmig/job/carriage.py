"""What carries a guest's disks across: the mover, connected to the source's exports, and the engine that drives it.

Shared by `migrate` and `copy`; owns nothing of the guest's run state.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from qemu_blkmig.destination import protocol
from qemu_blkmig.destination.protocol import (
    Close,
    CloseReply,
    Keep,
    Open,
    Prepare,
    PrepareReply,
    Progress,
    VerifyReply,
)
from qemu_blkmig.engine.device import DiskSpec
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.migration import BlockMigration, Tuning
from qemu_blkmig.engine.outlast import together
from qemu_blkmig.engine.ports import Clock, DirtyLog, Guest, Mover
from qemu_blkmig.errors import DestinationFailed, Refused
from qemu_blkmig.job.compare import Comparison
from qemu_blkmig.job.options import Transfer, Verify
from qemu_blkmig.job.place import host_name
from qemu_blkmig.job.plan import Plan
from qemu_blkmig.job.record import Job
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.result import DiskResult
from qemu_blkmig.job.space import SpaceWatch
from qemu_blkmig.job.verification import MOST_MENDED, Verification
from qemu_blkmig.nbd.address import Address, Export, UnixAddress
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.host import Host
from qemu_blkmig.transport.mover import RemoteMover

STRIDE = 1.0
"""Seconds that a range of the first pass is to take: what it costs is little beside that, what a failure costs, too."""
ROOM = 32 << 20
"""Bytes of a disk that may be under way, or not flushed, in the first pass (`BulkPass`): a way of 1 Gbit/s and 40 ms
there and back holds 5 MiB, and three times there and back lie between a range's last byte and word of its flush."""
CLOSE_LIMIT = 30.0
"""Seconds in which the images must be closed: the guest is paused and must not wait for ever."""
HASH_UNITS = range(4 << 10, 64 << 10)
"""Bytes that are hashed together: the granularity of the recording, within these."""
ZERO_UNITS = range(4 << 10, 64 << 10)
"""Bytes in which zeroes are looked for: less costs more than the holes are worth, more makes fewer holes."""


class Carriage:
    """The disks' way to the destination, from prepared images to closed ones."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        host: Host,
        agent: AgentClient,
        transfer: Transfer,
        reporter: Reporter,
        verify: Verify,
        on_stable: Callable[[str, int], None],
    ) -> None:
        """`on_stable`: told by disk how many bytes of the bulk pass are flushed."""
        self._on_stable = on_stable
        self._job = job
        self._plan = plan
        self._host = host
        self._agent = agent
        self._transfer = transfer
        self._reporter = reporter
        self._hash = transfer.hash if verify is Verify.WRITTEN else None
        self._compares = any(image.compared for image in plan.images.values())
        self._allocated: dict[str, int] = {}
        occupied = {disk.name: disk.allocated for disk in plan.disks if disk.allocated is not None}
        agent.on_space = SpaceWatch(occupied, reporter.note).heard

    async def prepare(self) -> None:
        """Create or check, and lock, the destination's images."""
        images = list(self._plan.images.values())
        record = self._job.record
        record.images = [image.path for image in images]
        record.moving = self._plan.source_images(host_name(record.target_place))
        await self._job.save()
        reply = await self._agent.expect(Prepare(images, record.job), PrepareReply)
        volumes = {volume.path for volume in record.volumes}
        made = [*reply.created, *(each for each in reply.identities if each.path in volumes)]
        record.created += [created for created in made if created not in record.created]
        # One that is gone on with stays what it was at first: that it is that one is not certain yet.
        record.identities = [image.identity or found for image, found in zip(images, reply.identities, strict=True)]
        await self._job.save()

    async def keep(self) -> bool:
        """From now on the images stay, whatever becomes of us or of the agent."""
        await self._agent.request(Keep())
        return True

    async def arrived(self, stable: Mapping[str, int]) -> Mapping[str, Sequence[Extent]]:
        """What an agent before this one has brought over beyond `stable`, by disk, as the hashes of that prove.

        The guest's writes are recorded since before it was read. Raises `Refused` where another's data lies: nothing is
        written there yet.
        """
        if self._hash is None:
            return {}
        for disk in self._plan.disks:
            await self._recognize(disk, stable.get(disk.name, 0))
        found = {}
        for disk in self._plan.disks:
            start = stable.get(disk.name, 0)
            if start < disk.size:
                op = protocol.Arrived(disk.name, start, protocol.MOST_READ_BACK)
                reply = await self._agent.expect(op, protocol.ArrivedReply)
                found[disk.name] = [Extent(offset, length) for offset, length in reply.extents]
        return found

    async def _recognize(self, disk: Disk, stable: int) -> None:
        path = self._plan.images[disk.name].path
        try:
            await self._agent.request(protocol.Recognize(disk.name, stable))
        except Refused as error:
            error.what = f"{path}: {error.what}"
            error.advice = f"see where {path} leads, or what has changed it: resume --compare would write over it"
            raise

    async def open(self, exports: Mapping[str, Export]) -> None:
        """Connect the mover to the source's exports, by disk, as they are reached from here."""
        self._job.record.filling = True
        await self._job.save()
        self._comparison = Comparison(self._agent, exports, self._transfer.hash)
        there = {address: await self._seen_there(address) for address in {each.address for each in exports.values()}}
        for disk in self._plan.disks:
            await self._agent.request(
                Open(
                    disk=disk.name,
                    source=there[exports[disk.name].address],
                    export=exports[disk.name].name,
                    connections=self._transfer.connections,
                    requests=self._transfer.requests,
                    request_size=self._transfer.request_size,
                    zero_unit=min(max(self._transfer.granularity, ZERO_UNITS.start), ZERO_UNITS.stop),
                    private_layers=self._plan.private.get(disk.name),
                    hash=self._hash,
                    hash_unit=self._unit(disk),
                )
            )

    async def _seen_there(self, address: Address) -> Address:
        return UnixAddress(await self._host.expose(address.path)) if isinstance(address, UnixAddress) else address

    async def engine(
        self, log: DirtyLog, guest: Guest, clock: Clock, watched: Callable[[Mover], Mover]
    ) -> BlockMigration:
        """The engine over these disks, with the bandwidth limit set."""
        mover = watched(RemoteMover(self._agent, self._on_progress))
        await mover.set_bandwidth(self._transfer.bandwidth)
        return BlockMigration(
            [DiskSpec(disk.name, disk.size, self._unit(disk)) for disk in self._plan.disks],
            log, mover, guest, clock,
            Tuning(chunk_size=self._transfer.chunk_size, range_size=128 << 20, stride=STRIDE, room=ROOM),
            self._reporter.figures,
            self._comparison if self._compares else None,
            self._on_stable,
        )  # fmt: skip

    def verification(self, engine: BlockMigration, clock: Clock) -> Verification:
        """What reads back what was written, if that was asked for."""
        disks = [disk.name for disk in self._plan.disks] if self._hash is not None else []
        return Verification(self._read_back, disks, engine, self._reporter.note, clock)

    async def _read_back(self, disk: str, limit: int, below: int | None) -> VerifyReply:
        return await self._agent.expect(protocol.Verify(disk, limit, below), VerifyReply)

    def _unit(self, disk: Disk) -> int:
        """Bytes that are hashed together, and copied together; see docs/decisions/017-verified-as-written.md.

        No more than a cluster of an overlay: else what it leaves to its base would be sent along.
        """
        clusters = disk.cluster_size if self._plan.images[disk.name].backing else None
        return max(HASH_UNITS.start, min(HASH_UNITS.stop, self._transfer.granularity, clusters or HASH_UNITS.stop))

    def _on_progress(self, progress: Progress) -> None:
        self._reporter.moving(progress.disk, progress.copied + progress.zeroed + progress.skipped)

    async def payload(self) -> int:
        """Bytes so far that the bandwidth limit concerns. Raises as `AgentClient.request` does."""
        return (await self._agent.expect(protocol.Payload(), protocol.PayloadReply)).taken

    async def compare(self, verification: Verification, complete: Callable[[], Awaitable[None]]) -> None:
        """Compare both sides in full; the guest must be paused. What differs is copied again by `complete`, once.

        Raises `ContentsDiffer` when it differs still, or is too much, and as `complete` does.
        """
        wrong = {}
        for disk in self._plan.disks:
            if extents := await self._comparison.all_differing(disk.name, disk.size, MOST_MENDED):
                verification.differ(disk.name, extents)
                wrong[disk.name] = extents
        if wrong:
            await complete()
        for name, extents in wrong.items():
            await self._comparison.require_equal(name, extents)

    async def close(self) -> None:
        """End all writers: their images are stable, unlocked and ready to be activated by a QEMU."""
        self._comparison.close()
        await together(*(self._close(disk.name) for disk in self._plan.disks))

    async def _close(self, disk: str) -> None:
        try:
            async with time_limit(CLOSE_LIMIT):
                reply = await self._agent.expect(Close(disk), CloseReply)
        except TimeoutError:
            raise DestinationFailed(f"its image was not closed within {CLOSE_LIMIT:.0f} s", disk=disk) from None
        self._allocated[disk] = reply.allocated

    def results(self, engine: BlockMigration) -> list[DiskResult]:
        """What was done, disk by disk; after `close`."""
        figures = {disk.name: disk for disk in engine.figures().disks}
        results = []
        for disk in self._plan.disks:
            image, own = self._plan.images[disk.name], figures[disk.name]
            results.append(
                DiskResult(
                    name=disk.name,
                    source=disk.filename,
                    destination=image.path,
                    format=image.format,
                    virtual_size=disk.size,
                    allocated=self._allocated.get(disk.name, 0),
                    copied=own.copied,
                    zeroed=own.zeroed,
                    skipped=own.skipped,
                    rounds=own.rounds,
                    copied_dirty=own.copied_dirty,
                    resumed=own.resumed,
                )
            )
        return results
