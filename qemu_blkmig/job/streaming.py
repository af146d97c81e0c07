"""What carries disks into a stream of the old wire format: from a checked name to a closed channel."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from qemu_blkmig.destination.protocol import VerifyReply
from qemu_blkmig.engine.device import DiskSpec
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.migration import BlockMigration, Tuning
from qemu_blkmig.engine.ports import Clock, DirtyLog, Guest, Mover
from qemu_blkmig.errors import MigrationError, Refused, UsageError
from qemu_blkmig.job.options import SaveOptions
from qemu_blkmig.job.plan import Plan
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.result import DiskResult
from qemu_blkmig.job.stream_mover import Saving, StreamMover
from qemu_blkmig.job.verification import Verification
from qemu_blkmig.nbd.address import Export
from qemu_blkmig.nbd.connection import Connection, connect
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.nbd.plan import ALLOCATION, DEPTH, Action, Classify
from qemu_blkmig.nbd.pump import Limits
from qemu_blkmig.nbd.throttle import Throttle
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.stable import sync_entry
from qemu_blkmig.stream.blocking import run_blocking
from qemu_blkmig.stream.channel import Channel, check, open_target
from qemu_blkmig.stream.disk_sender import DiskSender, require_loadable_tail, zero_or_data
from qemu_blkmig.stream.events import CHUNK
from qemu_blkmig.stream.sender import StreamSender

_T = TypeVar("_T")

RANGE = 256 << 20
"""Bytes of a bulk pass that are copied in one go."""
PARTIAL = ".incomplete"
"""What is appended to a file's name until the stream in it is whole."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system says that has no hard links (link(2)): FAT, some of other hosts."""


class StreamCarriage:
    """The disks' way into a stream. See `job.carriage.Carriage`."""

    def __init__(self, plan: Plan, options: SaveOptions, machine: str | None, reporter: Reporter) -> None:
        self._plan = plan
        self._options = options
        self._machine = machine
        self._reporter = reporter
        self._throttle = Throttle()
        self._senders: dict[str, DiskSender] = {}
        self._channel: Channel | None = None
        self._names = _names(plan.disks, options.names)
        kind, place = check(options.to)
        self._file = Path(place) if kind == "file" else None

    async def prepare(self) -> None:
        """Refuse what would fail, as far as it is known without reading. Raises `Refused`."""
        if self._file is not None and self._file.exists():
            raise Refused(
                f"{self._file} is there already", advice="save writes over no file: remove it, or name another"
            )
        if self._file is not None and self._partial.exists():
            raise Refused(
                f"{self._partial} is there already: a save is writing it, or was killed while it did",
                advice="if no save is running, remove it: what it holds is no whole stream",
            )
        for disk in self._plan.disks:
            if self._options.for_qemu and not self._options.zero_blocks and disk.size % CHUNK:
                raise Refused(
                    f"its size, {disk.size} bytes, is not a multiple of 1 MiB: without zero blocks a real QEMU cannot "
                    "load it",
                    disk=disk.name,
                )

    async def keep(self) -> bool:
        """A stream that broke off cannot be gone on with."""
        return False

    async def arrived(self, stable: Mapping[str, int]) -> Mapping[str, Sequence[Extent]]:
        """Nothing: see `keep`."""
        return {}

    async def open(self, exports: Mapping[str, Export]) -> None:
        """Connect to the source's exports, by disk, then to where the stream goes; its header is sent."""
        total = sum(disk.size for disk in self._plan.disks)
        options = self._options
        connections = await self._attempt(lambda _: self._connect_all(exports))
        try:
            self._channel = await self._attempt(lambda _: open_target(self._target()))
        except BaseException:
            for each in connections.values():
                for connection in each:
                    connection.close()
            raise
        self._stream = StreamSender(
            self._channel, machine=self._machine, footers=options.footers, zero_blocks=options.zero_blocks, total=total
        )
        for disk in self._plan.disks:
            self._senders[disk.name] = self._sender(disk, connections[disk.name])
        await self._attempt(self._stream.begin)

    async def engine(
        self, log: DirtyLog, guest: Guest, clock: Clock, watched: Callable[[Mover], Mover]
    ) -> BlockMigration:
        """The engine over these disks, with the bandwidth limit set."""
        mover = watched(StreamMover(self._stream, self._senders, self._throttle, self._reporter.moving))
        await mover.set_bandwidth(self._options.transfer.bandwidth)
        return Saving(
            self._stream,
            # Rounds divide what is dirty into what is copied now and what is put off: in whole chunks, here.
            [DiskSpec(disk.name, disk.size, unit=CHUNK) for disk in self._plan.disks],
            log, mover, guest, clock,
            # A stream that has broken off is not gone on with: flushing it on the way spares nothing.
            Tuning(chunk_size=CHUNK, range_size=RANGE, flushes=1, granule=CHUNK),
            self._reporter.figures,
        )  # fmt: skip

    async def payload(self) -> int:
        """Bytes so far that the bandwidth limit concerns."""
        return self._throttle.taken

    async def compare(self, verification: Verification, complete: Callable[[], Awaitable[None]]) -> None:
        """A stream can't be compared with what it was made from."""
        raise UsageError("a stream cannot be compared with its source", advice="load it, and compare the images")

    def verification(self, engine: BlockMigration, clock: Clock) -> Verification:
        """Nothing: what was sent cannot be read back."""

        async def read_back(_disk: str, _limit: int, _below: int | None) -> VerifyReply:
            return VerifyReply(0, 0, [])

        return Verification(read_back, (), engine, self._reporter.note, clock)

    async def close(self) -> None:
        """End the stream and its channel; a file is stable then, and has its name."""
        channel = self._channel
        if channel is None:
            raise RuntimeError("the stream is not open")
        await self._attempt(self._stream.finish)
        await self._attempt(lambda _: channel.sync())
        await self._attempt(lambda _: channel.finish())
        if self._file is not None:
            await self._attempt(lambda _: self._name_file())
        for sender in self._senders.values():
            sender.disconnect()

    def abandon(self) -> None:
        """After a failure: whoever reads sees the stream break off; a file is removed. Harmless after `close`."""
        for sender in self._senders.values():
            sender.disconnect()
        if self._channel is not None:
            self._channel.abandon()
            if self._file is not None:
                self._partial.unlink(missing_ok=True)

    def results(self, engine: BlockMigration) -> list[DiskResult]:
        """What was done, disk by disk; `allocated` is what it occupies in the stream."""
        figures = {disk.name: disk for disk in engine.figures().disks}
        return [
            DiskResult(
                name=disk.name,
                source=disk.filename,
                destination=f"{self._options.to}, device {self._names[disk.name]}",
                format="stream",
                virtual_size=disk.size,
                allocated=self._senders[disk.name].sent,
                copied=figures[disk.name].copied,
                zeroed=figures[disk.name].zeroed,
                skipped=figures[disk.name].skipped,
                rounds=figures[disk.name].rounds,
            )
            for disk in self._plan.disks
        ]

    @property
    def _partial(self) -> Path:
        return Path(f"{self._file}{PARTIAL}")

    def _target(self) -> str:
        return f"file:{self._partial}" if self._file is not None else self._options.to

    def _name_file(self) -> None:
        """Under its name only now, and never over another file."""
        if self._file is None:
            return
        try:
            try:
                self._file.hardlink_to(self._partial)
                self._partial.unlink()
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                # Ours, then, is what is renamed over.
                self._file.touch(exist_ok=False)
                self._partial.rename(self._file)
            sync_entry(self._file.absolute())
        except OSError as error:
            raise MigrationError(f"{self._partial} cannot be renamed to {self._file}: {error.strerror}") from error

    def _connect_all(self, exports: Mapping[str, Export]) -> dict[str, list[Connection]]:
        """Connections by disk; raises `Refused` where a disk's tail stands in the way."""
        made: dict[str, list[Connection]] = {}
        try:
            for disk in self._plan.disks:
                contexts = [ALLOCATION, DEPTH] if self._is_shared(disk) else [ALLOCATION]
                made[disk.name] = []
                for _ in range(self._options.transfer.connections):
                    made[disk.name].append(connect(*exports[disk.name], contexts=contexts))
                self._check(disk, made[disk.name][0])
        except BaseException:
            for each in made.values():
                for connection in each:
                    connection.close()
            raise
        return made

    def _check(self, disk: Disk, connection: Connection) -> None:
        if connection.size != disk.size:
            raise Refused(f"its export has {connection.size} bytes, not {disk.size}", disk=disk.name)
        if self._is_shared(disk) and DEPTH not in connection.contexts:
            raise Refused("its export does not tell allocation depths (shared base)", disk=disk.name)
        if self._options.for_qemu:
            require_loadable_tail(connection, disk.name)

    def _is_shared(self, disk: Disk) -> bool:
        return self._options.selection.shared_base and disk.backing is not None

    def _sender(self, disk: Disk, connections: Sequence[Connection]) -> DiskSender:
        private = self._plan.private.get(disk.name)
        return DiskSender(
            disk.name,
            self._names[disk.name],
            connections,
            self._stream,
            self._throttle,
            limits=Limits(self._options.transfer.requests, self._options.transfer.request_size),
            classify=_above_base(private) if private is not None else zero_or_data,
            refuse_tail=self._options.for_qemu,
        )

    async def _attempt(self, work: Callable[[Control], _T]) -> _T:
        control = Control()
        try:
            return await run_blocking(lambda: work(control), control)
        finally:
            control.close()


def _names(disks: Sequence[Disk], wanted: Mapping[str, str]) -> dict[str, str]:
    """What each disk is called in the stream: as told, else by its drive id, by which a real QEMU finds it."""
    unknown = sorted(set(wanted) - {disk.name for disk in disks})
    if unknown:
        raise UsageError(f"--name is given for disk {unknown[0]!r}, which is not saved")
    names = {disk.name: wanted.get(disk.name, disk.device or disk.name) for disk in disks}
    if len(set(names.values())) < len(names):
        raise UsageError(
            f"the disks' names in the stream must differ: {', '.join(names.values())}", advice="use --name"
        )
    for name in names.values():
        if not 0 < len(name.encode()) < 256:
            raise UsageError(f"a name in a stream has 1 to 255 bytes: {name!r}", advice="use --name")
    return names


def _above_base(private: int) -> Classify:
    def classify(zero: bool, depth: int | None) -> Action:
        if depth is not None and not 1 <= depth <= private:
            return Action.SKIP
        return zero_or_data(zero, depth)

    return classify
