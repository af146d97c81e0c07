"""A job whose preparations are done: the guest is watched, its disks are exported, and the mover reads them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.migration import BlockMigration
from qemu_blkmig.engine.ports import Clock, DirtyLog, Guest, Mover
from qemu_blkmig.errors import RecordFailed, Refused
from qemu_blkmig.job.guard import Guard
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import CopyOptions, MigrateOptions, SaveOptions
from qemu_blkmig.job.plan import Plan
from qemu_blkmig.job.record import Job
from qemu_blkmig.job.result import DiskResult
from qemu_blkmig.job.verification import Verification
from qemu_blkmig.nbd.address import Export
from qemu_blkmig.qmp.dirtylog import BitmapLog
from qemu_blkmig.qmp.guest import QemuGuest


class Carrying(Protocol):
    """What brings disks over: `job.carriage.Carriage`, `job.streaming.StreamCarriage`."""

    async def prepare(self) -> None:
        """Refuse what would fail; make what is needed at the destination."""

    async def open(self, exports: Mapping[str, Export]) -> None:
        """Connect to the source's exports, by disk, as they are reached from here."""

    async def engine(
        self, log: DirtyLog, guest: Guest, clock: Clock, watched: Callable[[Mover], Mover]
    ) -> BlockMigration:
        """The engine over the disks; its mover is what `watched` makes of ours."""

    async def keep(self) -> bool:
        """From now on what was brought over stays, whatever becomes of us; False: it cannot."""

    async def arrived(self, stable: Mapping[str, int]) -> Mapping[str, Sequence[Extent]]:
        """What one before us has brought over beyond what its journal tells (`stable`), by disk, if it is certain."""

    async def payload(self) -> int:
        """Bytes so far that the bandwidth limit concerns. Raises what the mover raises."""

    async def compare(self, verification: Verification, complete: Callable[[], Awaitable[None]]) -> None:
        """Compare both sides; what differs is copied again by `complete`, once."""

    def verification(self, engine: BlockMigration, clock: Clock) -> Verification:
        """What verifies that what was read lies at the destination, as far as that was asked for."""

    async def close(self) -> None:
        """All has been brought over: make it stable, and let go."""

    def results(self, engine: BlockMigration) -> list[DiskResult]:
        """What was done, disk by disk."""


@dataclass(frozen=True)
class Connected:
    """The guest, what records its writes, carries its disks and watches it, the engine, and what verifies them."""

    guest: QemuGuest
    log: BitmapLog
    carriage: Carrying
    guard: Guard
    engine: BlockMigration
    verification: Verification


async def connect(
    life: Lifecycle,
    plan: Plan,
    carriage: Carrying,
    guest: QemuGuest,
    options: MigrateOptions | CopyOptions | SaveOptions | ManagedOptions,
    clock: Clock,
) -> Connected:
    """Watch the guest, export its disks and connect the mover to them.

    Raises what ends a job: `Refused`, `TopologyChanged`, `GuestStateError`, and what the agent raises.
    """
    guard = life.guard()
    _require_same_chains(life.job, plan)
    await life.agree(plan)
    transfer = options.transfer
    log, exports = await life.open_source(plan, transfer.granularity, options.selection.shared_base, transfer.data)
    await open_carriage(life, carriage, exports)
    engine = await carriage.engine(log, guest, clock, life.reporter.maps.watched)
    life.steering.on_change(lambda: engine.limit(life.steering.rate))
    return Connected(guest, log, carriage, guard, engine, carriage.verification(engine, clock))


def _require_same_chains(job: Job, plan: Plan) -> None:
    """What was recorded on other nodes, or above other images, than the guest has now, is not all that was written.

    Nodes that were aside and are the guest's again may still have our bitmaps, and others below them. Raises `Refused`.
    """
    chains = {disk.name: disk.images for disk in plan.disks}
    if job.record.recording and not job.starts_over:
        for disk, chain in chains.items():
            if (before := job.record.chains.get(disk, chain)) != chain:
                raise Refused(
                    "its image or chain was changed while the job was suspended (a snapshot, a pivot, a commit) from "
                    f"{_shown(before)} to {_shown(chain)}: what the guest has written since is not known",
                    disk=disk,
                    advice=compare_instead(job.record.job),
                )
    job.record.chains = chains


def _shown(chain: Sequence[tuple[str, str]]) -> str:
    return " <- ".join(f"{filename} (node {node})" for node, filename in chain)


async def open_carriage(life: Lifecycle, carriage: Carrying, exports: Mapping[str, Export]) -> None:
    """Connect the mover to the exports. Raises what that raises, with what a job that is gone on with may do."""
    try:
        await carriage.open(exports)
    except Refused as error:
        if life.job.record.recording:
            error.advice = error.advice or compare_instead(life.job.record.job)
        raise


async def begin(life: Lifecycle, carriage: Carrying, engine: BlockMigration) -> None:
    """Start to record what the guest writes, or go on with what was recorded while the job was suspended.

    From now on a failure that can be mended suspends the job. Raises `Refused` when the recording is not there.
    """
    record = life.job.record
    if record.recording and not life.job.starts_over:
        await _go_on(life, carriage, engine)
    else:
        await life.forget_stable()
        await engine.setup()
        record.recording = await carriage.keep()
        try:
            await life.job.save()
        except RecordFailed:
            # What the record does not say cannot be gone on with.
            record.recording = False
            raise


async def _go_on(life: Lifecycle, carriage: Carrying, engine: BlockMigration) -> None:
    await carriage.keep()
    try:
        stable = life.stable()
        await engine.resume(stable, await carriage.arrived(stable))
    except Refused as error:
        error.advice = error.advice or compare_instead(life.job.record.job)
        raise


def compare_instead(job: str) -> str:
    """What is to be done where the recording is lost."""
    return (
        f"qemu-blkmig resume {job} --compare reads both sides and copies only what differs; it overwrites what the "
        "guest has written at the destination if somebody moved it there otherwise meanwhile"
    )
