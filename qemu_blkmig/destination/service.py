"""What the agent does for each operation of the protocol; knows nothing of stdin and stdout."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import qemu_blkmig
from qemu_blkmig import errors
from qemu_blkmig.destination import (
    arrivals,
    certificates,
    files,
    images,
    launching,
    locks,
    migration_sockets,
    protocol,
    qemu_nbd,
)
from qemu_blkmig.destination.backing import backing_files
from qemu_blkmig.destination.bases import Bases
from qemu_blkmig.destination.carrying import Carrying
from qemu_blkmig.destination.confine import NO_BOUNDS, Bounds, Confinement
from qemu_blkmig.destination.digests import digests
from qemu_blkmig.destination.expecting import Expecting
from qemu_blkmig.destination.handshake import End
from qemu_blkmig.destination.hashtable import HashTable, forget, table_path
from qemu_blkmig.destination.launching import Launcher
from qemu_blkmig.destination.mover import DiskMover, Settings
from qemu_blkmig.destination.ownership import Guest
from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.destination.sink import write_error
from qemu_blkmig.destination.writers import NbdWriter, RawWriter, Writer
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd.control import Cancelled, Control
from qemu_blkmig.nbd.throttle import Throttle
from qemu_blkmig.time_limit import time_limit

_PROGRESS_SECONDS = 0.2
_SPACE_SECONDS = 1.0
_TEARDOWN_SECONDS = 20.0
_HASH_UNITS = range(4 << 10, (1 << 20) + 1)
_KILL_SECONDS = 10.0
_OTHERS_SECONDS = 0.2
"""Between two looks whether a QEMU that is not our job's waits for a guest."""
_JOB = re.compile(r"[0-9A-Za-z-]{1,64}")

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Tell = Callable[[protocol.Progress | protocol.Space], Awaitable[None]]


@dataclass
class _Disk:
    """A prepared disk. `thread` does what blocks for it, one thing at a time; `flusher` flushes beside that, and
    `reader` reads back.

    `turn` is held while anything is done in `thread`, `reading` while anything is read, and by what may not go on
    beside that; `turn` is taken first. `below`: the byte up to which is read back beside the first pass. `touched`: it
    may be written to. `urgent`: requests that wait for what is read back to end.
    """

    prepared: images.Prepared
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))
    flusher: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))
    reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    flushing: asyncio.Lock = field(default_factory=asyncio.Lock)
    carrying: Carrying | None = None
    server: qemu_nbd.QemuNbd | None = None
    writer: Writer | None = None
    mover: DiskMover | None = None
    table: HashTable | None = None
    urgent: int = 0
    below: int = 0
    control: Control | None = None
    touched: bool = False
    closed: bool = False
    space_told: float = -math.inf

    @property
    def name(self) -> str:
        return self.prepared.image.disk

    @contextlib.asynccontextmanager
    async def urgently(self, *, beside: bool = False) -> AsyncIterator[None]:
        """Take the turn, and the reading unless that may go on `beside`; what reads back makes room."""
        async with contextlib.AsyncExitStack() as held:
            self.urgent += 1
            try:
                await held.enter_async_context(self.turn)
                if not beside:
                    await held.enter_async_context(self.reading)
            finally:
                self.urgent -= 1
            yield

    async def run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self.thread, work)

    async def read(self, read: Callable[[Callable[[], bool]], _T], interrupted: Callable[[], bool]) -> _T:
        """What `read` finds, which is asked to end when `interrupted`, or when something urgent waits."""
        work = functools.partial(read, lambda: interrupted() or self.urgent > 0)
        return await asyncio.get_running_loop().run_in_executor(self.reader, work)

    @contextlib.contextmanager
    def cancellable(self) -> Iterator[Control]:
        """What `Cancel` reaches while a copy, or a reading for digests, is under way; one at a time.

        Copies that have been answered are not under way, though their thread may have something to tidy up.
        """
        if self.control is not None and (self.carrying is None or not self.carrying.idle):
            raise errors.Refused("a copy, or a reading for digests, is under way", disk=self.name)
        self.carrying = None
        control = self.control = Control()
        try:
            yield control
        finally:
            if self.control is control:
                self.control = None
            control.close()

    def carried(self, carrying: Carrying) -> None:
        """No copy can join that one any more."""
        if self.carrying is carrying:
            self.carrying = None

    async def digests(self, op: protocol.Digests, control: Control) -> protocol.DigestsReply:
        if (writer := self.writer) is None:
            raise errors.Refused("is not open", disk=op.disk)
        size, descriptor = self.prepared.image.size, self.prepared.descriptor
        found = await self.run(lambda: digests(op, size, writer, descriptor, control))
        return protocol.DigestsReply(found, control.tally.copied)


class Service:
    """The agent's disks, and the QEMU beside them. `tell` is where progress goes."""

    def __init__(self, tell: Tell, bounds: Bounds = NO_BOUNDS) -> None:
        self._tell = tell
        self._launcher = Launcher(None)
        self._job: str | None = None
        self._expecting = Expecting()
        self._runtime: str | None = None
        self._bounds = Confinement(
            bounds,
            ours=self._is_ours,
            launched=lambda: self._launcher.launched(),
            waited=lambda: self._launcher.waited(),
        )
        self._throttle = Throttle()
        self._disks: dict[str, _Disk] = {}
        self._bases = Bases(self._bounds.check_base)
        self._tasks: set[asyncio.Task[None]] = set()
        self._handshake: End | None = None
        self._ended = False
        self._kept = False

    async def perform(self, op: protocol.Operation) -> protocol.Outcome:
        """Carry out one operation; every failure is an answer."""
        try:
            return await self._dispatch(op)
        except Exception as error:
            return failure(error)

    async def end(self, *, remove: bool) -> None:
        """Stop everything: copies drained, servers gone, locks dropped; what was created and not closed is removed
        if `remove`.

        Images that are incomplete stay locked as long as a QEMU waits for a guest to go on with them.
        """
        self._ended = True
        self._bases.cancel(None)
        remove = remove and not self._kept
        disks, self._disks = list(self._disks.values()), {}
        for disk in disks:
            if disk.control is not None:
                disk.control.cancel()
        self._expecting.end()
        await self._outlast_others([disk.prepared.image.path for disk in disks if not disk.closed])
        ended = await asyncio.gather(*(self._end(disk, remove=remove) for disk in disks), return_exceptions=True)
        for disk, trouble in zip(disks, ended, strict=True):
            if trouble is not None:
                _log.error("disk %s could not be given up: %s", disk.name, trouble)
        if self._job is not None:
            await asyncio.to_thread(migration_sockets.remove, self._job)
        if self._runtime is not None:
            await asyncio.to_thread(shutil.rmtree, self._runtime, ignore_errors=True)

    async def _dispatch(self, op: protocol.Operation) -> protocol.Outcome:
        # Not for all: a cancellation must not overtake the copy that it is to end.
        if self._bounds.concerns(op):
            await asyncio.to_thread(self._bounds.check, op)
        match op:
            case protocol.Hello():
                return self._hello(op)
            case protocol.Ping():
                return protocol.Done()
            case protocol.Inspect():
                await self._wait_for_predecessor(op.images)
                problems, rooms = await asyncio.to_thread(images.inspect, op.images, self._job)
                there = [image.path for image in op.images if image.create and os.path.lexists(image.path)]
                return protocol.InspectReply(problems, rooms, there, await asyncio.to_thread(images.incomplete, there))
            case protocol.Prepare():
                return await self._prepare(op)
            case protocol.Keep():
                return await self._keep()
            case protocol.Discard():
                return protocol.DiscardReply(
                    *await asyncio.to_thread(
                        images.discard, op.images, op.given_up, self._job, unless_written=op.unless_written
                    )
                )
            case protocol.Mark():
                await asyncio.to_thread(images.mark, op.images, op.job, op.state, _guest(op.domain))
                return protocol.Done()
            case protocol.Bandwidth():
                return self._limit(op.rate)
            case protocol.Payload():
                return protocol.PayloadReply(self._throttle.taken)
            case protocol.Open():
                return await self._open(op)
            case protocol.Copy():
                return await self._move(op)
            case protocol.Digests():
                return await self._digest(op)
            case protocol.BaseDigest() | protocol.BaseDigests():
                return await self._bases.answer(op)
            case protocol.Verify():
                return await self._verify(op)
            case protocol.Arrived():
                return await self._arrived(op)
            case protocol.Recognize():
                return await self._recognize(op)
            case protocol.Flush():
                return await self._flush(op)
            case protocol.Cancel():
                return self._cancel(op)
            case protocol.Close():
                return await self._close(op)
            case protocol.Bye():
                await self.end(remove=False)
                await asyncio.to_thread(self._launcher.forget)
                return protocol.Done()
            case _:
                return await self._dispatch_for_qemu(op)

    async def _dispatch_for_qemu(self, op: protocol.Operation) -> protocol.Outcome:
        match op:
            case protocol.Launch():
                return protocol.Launched(*await asyncio.to_thread(self._launcher.launch, op.command, op.directory))
            case protocol.Go():
                return protocol.Identified(await self._launcher.go())
            case protocol.Output():
                return protocol.OutputReply(self._launcher.output())
            case protocol.FindProgram():
                missing = await asyncio.to_thread(launching.program_missing, op.command, op.directory)
                return protocol.FindProgramReply(missing)
            case protocol.Identify():
                return protocol.Identified(await self._identify(op.socket))
            case protocol.Alive():
                return protocol.AliveReply(op.process.alive)
            case protocol.EndProcess():
                gone = await asyncio.to_thread(op.process.kill, _KILL_SECONDS, group=op.group)
                return protocol.AliveReply(not gone)
            case protocol.Expect():
                await asyncio.to_thread(self._expecting.expect, op, self._job)
                return protocol.Done()
            case protocol.Held():
                return protocol.HeldReply([path for path in op.paths if not _in_use(path)])
            case protocol.Files():
                pid = op.process.pid if op.process else None
                ids = [files.file_id_for(pid, name) for name in op.names]
                real = [files.real_path(pid, name) for name in op.names]
                return protocol.FilesReply(ids, real, [files.names_everywhere(each) for each in ids])
            case protocol.Below():
                found = await asyncio.to_thread(
                    lambda: [backing_files(each, self._bounds.permits) for each in op.images]
                )
                return protocol.BelowReply([files for files, _ in found], [whole for _, whole in found])
            case protocol.Certificates():
                return await asyncio.to_thread(_certificates, op)
            case protocol.Handshake():
                if op.begin or self._handshake is None:
                    self._handshake = await asyncio.to_thread(End.of, op)
                return await asyncio.to_thread(self._handshake.answer, op.said)
        raise errors.Refused(f"{type(op).__name__} is not understood")

    async def _identify(self, path: str) -> ProcessId | None:
        process = await asyncio.to_thread(launching.listener, path)
        if process is not None and self._bounds.confined:
            self._bounds.know(process)
            if await asyncio.to_thread(launching.waiting, path) == process:
                await asyncio.to_thread(self._launcher.take, process)
        return process

    def _hello(self, op: protocol.Hello) -> protocol.HelloReply:
        ours = qemu_blkmig.__version__
        if op.protocol != protocol.PROTOCOL:
            raise errors.Refused(mismatch(socket.gethostname(), (op.version, op.protocol), (ours, protocol.PROTOCOL)))
        if op.job is not None and not _JOB.fullmatch(op.job):
            raise errors.Refused(f"{op.job!r} is no name of a job")
        self._job = op.job
        if self._runtime is None and op.job is not None:
            self._launcher = Launcher(op.job)
            self._runtime = tempfile.mkdtemp(prefix=launching.private_prefix(op.job, "agent"))
        return protocol.HelloReply(ours, protocol.PROTOCOL, socket.gethostname(), files.boot_id(), self._runtime or "")

    def _is_ours(self, path: str) -> bool:
        """Whether `path` is a socket in a directory that we made."""
        place = Path(os.path.realpath(path))
        in_runtime = self._runtime is not None and place.is_relative_to(os.path.realpath(self._runtime))
        return in_runtime or self._launcher.is_ours(path)

    def _limit(self, rate: int | None) -> protocol.Done:
        if rate is not None and rate <= 0:
            raise errors.Refused(f"a bandwidth of {rate} bytes a second is no limit")
        self._throttle.limit(rate)
        return protocol.Done()

    async def _wait_for_predecessor(self, wanted: Sequence[protocol.Image]) -> None:
        """An image that is to be taken up again may still be held by an agent before us; our own are not waited for."""
        ours = {os.path.realpath(disk.prepared.image.path) for disk in self._disks.values()}
        for image in wanted:
            if image.identity is not None and os.path.realpath(image.path) not in ours:
                await asyncio.to_thread(images.wait_for_predecessor, image.path)

    async def _prepare(self, op: protocol.Prepare) -> protocol.PrepareReply:
        for image in op.images:
            if image.disk in self._disks:
                raise errors.Refused("is prepared already", disk=image.disk)
        if len({image.disk for image in op.images}) < len(op.images):
            raise errors.Refused("a disk was named twice")
        prepared = await asyncio.to_thread(images.prepare, op.images, op.job, _guest(op.domain))
        try:
            for each in prepared:
                await asyncio.to_thread(self._bounds.check_held, each.image, created=each.created is not None)
            self._still_free(prepared)
        except BaseException:
            for each in prepared:
                images.give_up(each, untouched=True)
            raise
        self._disks.update((each.image.disk, _Disk(each)) for each in prepared)
        created = [each.created for each in prepared if each.created is not None]
        return protocol.PrepareReply(created, [each.identity for each in prepared])

    def _still_free(self, prepared: Sequence[images.Prepared]) -> None:
        """Raise `Refused` if its disks were prepared by another request meanwhile, or the agent is ending."""
        twice = [each.image.disk for each in prepared if each.image.disk in self._disks]
        if self._ended or twice:
            raise errors.Refused(
                "is prepared already" if twice else "the agent is ending", disk=next(iter(twice), None)
            )

    async def _keep(self) -> protocol.Done:
        self._kept = True
        for disk in self._disks.values():
            if disk.table is not None:
                try:
                    await disk.run(disk.table.keep)
                except OSError as error:
                    what = f"the hashes of what is written cannot be kept: {error.strerror}"
                    raise errors.DestinationWriteError(
                        what, disk=disk.name, offset=None, errno=error.errno or 0
                    ) from error
        return protocol.Done()

    async def _open(self, op: protocol.Open) -> protocol.Done:
        disk = self._disk(op.disk)
        settings = _settings(op)
        async with disk.turn:
            self._still(disk, None)
            disk.touched = True
            disk.writer = disk.writer or await self._start_writer(disk, settings.connections)
            writer, image = disk.writer, disk.prepared.image
            disk.table = disk.table or await disk.run(lambda: _table(op, image))
            disk.mover = await disk.run(
                lambda: DiskMover(
                    op.disk,
                    image.size,
                    settings,
                    writer,
                    self._throttle,
                    reads_as_zero=disk.prepared.reads_as_zero,
                    table=disk.table,
                )
            )
        return protocol.Done()

    async def _start_writer(self, disk: _Disk, connections: int) -> Writer:
        prepared = disk.prepared
        image = prepared.image
        if image.format == "raw":
            return RawWriter(prepared.descriptor, keep_allocated=prepared.keep_allocated)
        try:
            server = await qemu_nbd.start(image.path, image.format, connections, keep_allocated=prepared.keep_allocated)
        except errors.DestinationFailed as error:
            raise errors.DestinationWriteError(error.what, disk=disk.name, offset=None, errno=0) from error
        try:
            # Only now its backing files, too, are locked.
            await asyncio.to_thread(self._bounds.check_held, image, created=prepared.created is not None)
        except BaseException:
            await asyncio.to_thread(server.kill)
            raise
        disk.server = server
        return NbdWriter(server.connections, prepared.descriptor, image.format, server.spare)

    async def _move(self, op: protocol.Copy) -> protocol.CopyReply:
        disk, mover = self._opened(op.disk)
        extents, bulk, began = _extents(op), op.kind == "bulk", time.monotonic()
        if not extents:
            return protocol.CopyReply(0, 0, 0, 0.0)
        carrying = disk.carrying
        if carrying is not None and carrying.is_gone_on_with(extents, bulk=bulk):
            copying = carrying.join(extents)
        else:
            carrying = self._set_out(disk, mover, extents, bulk=bulk)
            copying = carrying.first
        tally = await carrying.over(copying)
        return protocol.CopyReply(tally.copied, tally.zeroed, tally.skipped, time.monotonic() - began)

    def _set_out(self, disk: _Disk, mover: DiskMover, extents: Sequence[Extent], *, bulk: bool) -> Carrying:
        with contextlib.ExitStack() as stack:
            control = stack.enter_context(disk.cancellable())
            disk.carrying = carrying = Carrying(mover, extents, control, bulk=bulk)
            stack.callback(disk.carried, carrying)
            begins = extents[0].offset if bulk else None
            task = asyncio.create_task(self._carry(disk, mover, carrying, begins, stack.pop_all()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return carrying

    async def _carry(
        self, disk: _Disk, mover: DiskMover, carrying: Carrying, begins: int | None, joinable: contextlib.ExitStack
    ) -> None:
        """`begins`: the byte at which its part of the first pass begins, if it is of that."""
        beside = begins is not None and begins >= disk.below
        try:
            async with disk.urgently(beside=beside), self._reporting(disk, carrying):
                with joinable:
                    self._still(disk, mover)
                    await carrying.run(disk.run)
        except BaseException as error:
            joinable.close()
            carrying.end(error)
            if not isinstance(error, Exception):
                raise

    async def _digest(self, op: protocol.Digests) -> protocol.DigestsReply:
        disk, mover = self._opened(op.disk)
        with disk.cancellable() as control:
            async with disk.urgently():
                self._still(disk, mover)
                return await disk.digests(op, control)

    @contextlib.asynccontextmanager
    async def _reporting(self, disk: _Disk, carrying: Carrying) -> AsyncIterator[None]:
        """Tell of progress and of the room that is left, while copies last."""

        async def report() -> None:
            told = protocol.Progress(disk.name, 0, 0, 0)
            while True:
                await self._tell_space(disk)
                await asyncio.sleep(_PROGRESS_SECONDS)
                tally = carrying.tally
                now = protocol.Progress(disk.name, tally.copied, tally.zeroed, tally.skipped)
                if now != told:
                    await self._tell(now)
                    told = now

        task = asyncio.create_task(report())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _tell_space(self, disk: _Disk) -> None:
        """Tell of the room that the image has, now and then."""
        now = time.monotonic()
        if now - disk.space_told < _SPACE_SECONDS:
            return
        disk.space_told = now
        with contextlib.suppress(OSError):
            if (space := await asyncio.to_thread(images.space, disk.prepared)) is not None:
                await self._tell(space)

    async def _flush(self, op: protocol.Flush) -> protocol.Done:
        """Beside a copy, if need be: what that writes meanwhile is for the next flush."""
        disk, mover = self._opened(op.disk)
        async with disk.flushing:
            if disk.carrying is not None and mover.works_beside:
                self._still(disk, mover)
                await asyncio.get_running_loop().run_in_executor(disk.flusher, mover.flush)
            else:
                async with disk.urgently(beside=mover.works_beside):
                    self._still(disk, mover)
                    await disk.run(mover.flush)
        return protocol.Done()

    async def _verify(self, op: protocol.Verify) -> protocol.VerifyReply:
        disk, mover = self._opened(op.disk)
        _check_limit(op)
        async with contextlib.AsyncExitStack() as held:
            if op.below is None:
                await held.enter_async_context(disk.turn)
            await held.enter_async_context(disk.reading)
            self._still(disk, mover)
            disk.below = op.below or 0
            found = await disk.read(lambda interrupted: mover.verify(op.limit, interrupted, op.below), self._is_ended)
        differ = [(extent.offset, extent.length) for extent in found.differ]
        return protocol.VerifyReply(found.checked, found.left, differ)

    async def _arrived(self, op: protocol.Arrived) -> protocol.ArrivedReply:
        disk, mover = self._opened(op.disk)
        _check_limit(op)
        async with disk.turn, disk.reading:
            self._still(disk, mover)
            found = await disk.read(lambda interrupted: mover.arrived(op.offset, op.limit, interrupted), self._is_ended)
        return protocol.ArrivedReply([(extent.offset, extent.length) for extent in found])

    def _is_ended(self) -> bool:
        return self._ended

    async def _recognize(self, op: protocol.Recognize) -> protocol.Done:
        disk, mover = self._opened(op.disk)
        async with disk.turn, disk.reading:
            self._still(disk, mover)
            await disk.run(lambda: mover.recognize(op.end))
        return protocol.Done()

    def _cancel(self, op: protocol.Cancel) -> protocol.Done:
        self._bases.cancel(op.disk)
        for disk in self._disks.values():
            if op.disk in (None, disk.name) and disk.control is not None:
                disk.control.cancel()
        return protocol.Done()

    async def _close(self, op: protocol.Close) -> protocol.CloseReply:
        disk = self._disk(op.disk)
        async with disk.flushing, disk.turn, disk.reading:
            self._still(disk, disk.mover)
            descriptor = disk.prepared.descriptor
            try:
                await self._end_writer(disk)
                await disk.run(lambda: os.fsync(descriptor))
                allocated = await disk.run(lambda: images.allocated(descriptor))
            except OSError as error:
                raise write_error(disk.name, None, error.errno or 0, "closed") from error
            os.close(descriptor)
            disk.closed = True
            if disk.table is not None:
                # A kept one goes once the image is marked as complete: until then the job may be suspended.
                await disk.run(disk.table.close if self._kept else disk.table.remove)
        disk.thread.shutdown(wait=False)
        disk.flusher.shutdown(wait=False)
        disk.reader.shutdown(wait=False)
        self._disks.pop(op.disk, None)
        return protocol.CloseReply(allocated)

    async def _outlast_others(self, incomplete: Sequence[str]) -> None:
        """Wait until no QEMU but those of our job, which start nothing without our word, waits for a guest with these
        images: it may be somebody else's migration of it, of which no coordinator keeps us informed any more.
        """

        def waiting() -> set[ProcessId]:
            return arrivals.waiting(incomplete) - self._launcher.launched() - self._launcher.waited()

        if not incomplete:
            return
        while await asyncio.to_thread(waiting):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(_OTHERS_SECONDS)

    async def _end_writer(self, disk: _Disk) -> None:
        if disk.mover is not None:
            await disk.run(disk.mover.flush)
            disk.mover.disconnect()
            disk.mover = None
        if disk.writer is not None:
            await disk.run(disk.writer.close)
            disk.writer = None
        if disk.server is not None:
            server, disk.server = disk.server, None
            try:
                await server.stop()
            except errors.DestinationFailed as error:
                raise errors.DestinationWriteError(error.what, disk=disk.name, offset=None, errno=0) from error

    async def _end(self, disk: _Disk, *, remove: bool) -> None:
        """Give the disk up. A thread that hangs in its storage is left behind: the process exits over it."""
        try:
            async with time_limit(_TEARDOWN_SECONDS), disk.flushing, disk.turn, disk.reading:
                if disk.closed:
                    return
                await disk.run(lambda: None)
        except TimeoutError:
            _log.error("disk %s: still busy after %.0f s, given up", disk.name, _TEARDOWN_SECONDS)
        if disk.server is not None:
            for connection in (*disk.server.connections, *(disk.server.spare or ())):
                connection.close()
            with contextlib.suppress(errors.DestinationFailed):
                await disk.server.stop()
        if disk.table is not None:
            with contextlib.suppress(OSError):
                (disk.table.close if self._kept else disk.table.remove)()
        if remove:
            images.give_up(disk.prepared, untouched=not disk.touched)

    def _disk(self, name: str) -> _Disk:
        if name not in self._disks:
            raise errors.Refused("is not prepared", disk=name)
        return self._disks[name]

    def _still(self, disk: _Disk, mover: DiskMover | None) -> None:
        """Raise `Refused` if what was asked for before it had its turn has no object any more."""
        if self._disks.get(disk.name) is not disk:
            raise errors.Refused("was closed meanwhile", disk=disk.name)
        if disk.mover is not mover:
            raise errors.Refused("is open already" if mover is None else "was closed meanwhile", disk=disk.name)

    def _opened(self, name: str) -> tuple[_Disk, DiskMover]:
        disk = self._disk(name)
        if disk.mover is None:
            raise errors.Refused("is not open", disk=name)
        return disk, disk.mover


def _guest(domain: protocol.Domain | None) -> Guest | None:
    return None if domain is None else Guest(domain.name, domain.uuid)


def failure(error: Exception) -> protocol.Failure:
    """The answer that tells the coordinator of `error`."""
    what = error.what if isinstance(error, errors.BlkmigError) else f"{type(error).__name__}: {error}"
    disk = error.disk if isinstance(error, errors.BlkmigError) else None
    match error:
        case Cancelled():
            return protocol.Failure("cancelled", "cancelled")
        case errors.SourceReadError():
            return protocol.Failure("source-read", what, disk, error.offset)
        case errors.ConnectionLost():
            return protocol.Failure("source-lost", what, disk)
        case errors.DestinationWriteError():
            return protocol.Failure("destination-write", what, disk, error.offset, error.errno)
        case errors.Refused():
            return protocol.Failure("refused", what, disk, advice=error.advice)
    _log.error("internal error", exc_info=error)
    return protocol.Failure("internal", what, disk)


def mismatch(host: str, coordinator: tuple[str, int], agent: tuple[str, int]) -> str:
    """What to say of two sides, each a version and a protocol, that do not understand each other."""
    older, version = (host, coordinator[0]) if agent[1] < coordinator[1] else ("the source host", agent[0])
    return (
        f"the coordinator ({coordinator[0]}) speaks protocol {coordinator[1]}, the agent on {host} ({agent[0]}) speaks "
        f"{agent[1]}: install qemu-blkmig {version} on {older}, too"
    )


def _certificates(op: protocol.Certificates) -> protocol.CertificatesReply:
    try:
        return certificates.look(op.directory, server=op.server)
    except OSError as error:
        raise errors.Refused(f"its certificates cannot be looked at: {error}") from error


def _in_use(path: str) -> bool:
    try:
        return locks.in_use(path)
    except OSError as error:
        _log.warning("%s", error)
        return False


def _settings(op: protocol.Open) -> Settings:
    sound = 1 <= op.connections <= protocol.MOST_CONNECTIONS and 1 <= op.requests <= protocol.MOST_REQUESTS
    sound = (
        sound
        and 4096 <= op.request_size <= protocol.LARGEST_REQUEST
        and 512 <= op.zero_unit <= protocol.LARGEST_REQUEST
    )
    if not sound or op.connections * op.requests * op.request_size > protocol.MOST_IN_FLIGHT:
        raise errors.Refused(
            f"{op.connections} connections, {op.requests} requests, {op.request_size} bytes a request, "
            f"zero unit {op.zero_unit}: out of bounds",
            disk=op.disk,
        )
    return Settings(op.source, op.export, op.connections, op.requests, op.request_size, op.zero_unit, op.private_layers)


def _table(op: protocol.Open, image: protocol.Image) -> HashTable | None:
    if op.hash is None:
        return None
    if op.hash_unit not in _HASH_UNITS or op.hash_unit & (op.hash_unit - 1):
        raise errors.Refused(f"a hash unit of {op.hash_unit} bytes: out of bounds", disk=op.disk)
    try:
        path = table_path(image.path)
        if image.identity is not None and not image.compared:
            return HashTable.reopen(path, image.size, op.hash_unit, op.hash)
        # Before anything is recorded anew: what it tells of is of another recording.
        forget(image.path)
        return HashTable(path, image.size, op.hash_unit, op.hash)
    except OSError as error:
        what = f"the hashes of what is written cannot be stored beside {image.path}: {error.strerror}"
        raise errors.DestinationWriteError(what, disk=op.disk, offset=None, errno=error.errno or 0) from error


def _check_limit(op: protocol.Verify | protocol.Arrived) -> None:
    if not 0 < op.limit <= protocol.MOST_READ_BACK:
        raise errors.Refused(f"{op.limit} bytes cannot be read back at once", disk=op.disk)


def _extents(op: protocol.Copy) -> list[Extent]:
    if len(op.extents) > protocol.BATCH_LIMIT:
        raise errors.Refused(f"{len(op.extents)} extents are more than {protocol.BATCH_LIMIT}", disk=op.disk)
    return [Extent(offset, length) for offset, length in op.extents]
