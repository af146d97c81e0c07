"""The record of one job: what was made and who owns the guest, on disk before it is acted upon.

It is what a watchdog, or `qemu-blkmig cleanup`, goes by when the coordinator is no more. So every fact is saved (and
synced, with its directory) *before* the step that makes it true.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from qemu_blkmig.destination.basecache import Identity
from qemu_blkmig.destination.files import boot_id
from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.destination.protocol import Created
from qemu_blkmig.engine.outlast import only_wait
from qemu_blkmig.errors import RecordFailed, Refused
from qemu_blkmig.job.durable import DurableFile
from qemu_blkmig.job.history import archive
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import Afterwards, CopyOptions, MigrateOptions
from qemu_blkmig.job.place import Place
from qemu_blkmig.job.source_images import SourceImage
from qemu_blkmig.places import STATE_VARIABLE, state_directory
from qemu_blkmig.qmp.throttle import Throttled
from qemu_blkmig.time_limit import time_limit

RECORD = "record.json"
LOOKS, LOOK = 100, 0.01
"""How often, and how long (seconds) each time, it is waited for who only looks whether a job is alive."""


class Owner(enum.Enum):
    """Which side is the truth. UNDECIDED: handed over, and it is not yet known whether it was taken."""

    SOURCE = "source"
    UNDECIDED = "undecided"
    DESTINATION = "destination"


class Managed(msgspec.Struct, frozen=True):
    """A domain that libvirt manages: its `uuid`, its names at the source and there, and what was asked for.

    `number`: its id at the source, as long as it runs there; once it was started anew it has another one, but ids begin
    again when the host is `booted` anew (`files.boot_id`).
    """

    options: ManagedOptions
    uuid: str
    name: str
    name_there: str
    number: int | None = None
    booted: str = ""

    @classmethod
    def of(cls, options: ManagedOptions, uuid: str, name: str, number: int | None = None) -> Managed:
        """What is known of a domain that was asked for. By a number it could be another one, or none, when the job is
        resumed: the id of a running domain is a new one each time.
        """
        lasting = replace(options, domain=uuid) if options.domain.isdecimal() else options
        return cls(lasting, uuid, name, options.dname or name, number, boot_id())


class Volume(msgspec.Struct, frozen=True):
    """An image that libvirt's storage API made for the job: pool, name in it, and path."""

    pool: str
    name: str
    path: str


class Steered(msgspec.Struct, frozen=True):
    """What may be changed while a job runs: bytes a second (None: no limit), seconds."""

    bandwidth: int | None
    downtime: float


class Record(msgspec.Struct):
    """What must be known to bring both sides to rest.

    `run_state_taken`: we paused the guest, or are about to. `was_running`: it ran before that, so it has to again.
    `told_to_pause`: we told libvirt to pause it, or are about to, which that may do when its migration has failed, too.
    `migrating`: QEMU's migration of the source is ours, or about to be; without it, one that is seen is another's.
    `nbd_server`: the source QEMU's NBD server is ours, or about to be. `images`: what the destination QEMU uses.
    `created`: those of them that we made. `filling`: something may have been written to
    them. `frozen_by`: the guest agent's socket while file systems are frozen.
    `target_place`: where the images are; None until that is known.
    `taken_back`: a handover was undone, or is about to be.
    `started_there`: the destination was told to run the guest, or is about to be: it may have written there.
    `unfenced`: it has the guest's state, or may have; the guest is the source's, and it is still to be ended.
    `moving`: the source's own images. `source_images`: what becomes of them.
    `marked`: the ownership records at the destination say that it has the guest.
    `identities`: the files that `images` are. `migrate`, `copy`: what was asked for, so that it can be resumed.
    `steered`: what of that holds now.
    `chains`: nodes and files of the disks that they record on, topmost first, by disk.
    `recording`: our bitmaps record on the source what the destination, which holds a part, has not got; image files
    that are copied nobody writes to, which `untouched` tells: their files by disk, where anything does.
    `suspended`: the guest is at rest at the source, and the job can be resumed.
    `throttled`: disks whose writes we slow, or are about to, with the limits that they had.
    `managed`: both QEMUs are libvirt's, and only libvirt pauses, resumes and ends the guest. `offline`: a domain that
    does not run, whose images are copied.
    `volumes`: those of `images` that libvirt made at the destination; its pools are to forget them with the files.
    """

    job: str
    runtime: str
    source_qmp: str | None = None
    source_process: ProcessId | None = None
    owner: Owner = Owner.SOURCE
    was_running: bool = True
    run_state_taken: bool = False
    told_to_pause: bool = False
    migrating: bool = False
    nbd_server: bool = False
    keep_source: bool = False
    target_qmp: str | None = None
    target_process: ProcessId | None = None
    target_launched: bool = False
    images: list[str] = []
    created: list[Created] = []
    filling: bool = False
    frozen_by: str | None = None
    taken_back: bool = False
    started_there: bool = False
    unfenced: bool = False
    target_place: Place | None = None
    moving: list[SourceImage] = []
    source_images: Afterwards = Afterwards.KEEP
    marked: bool = False
    settler: ProcessId | None = None
    identities: list[Created] = []
    migrate: MigrateOptions | None = None
    copy: CopyOptions | None = None
    steered: Steered | None = None
    recording: bool = False
    chains: dict[str, list[tuple[str, str]]] = {}
    untouched: dict[str, Identity] = {}
    suspended: bool = False
    throttled: list[Throttled] = []
    managed: Managed | None = None
    offline: Managed | None = None
    volumes: list[Volume] = []

    @property
    def options(self) -> MigrateOptions | CopyOptions | ManagedOptions | None:
        """What was asked for, as far as it is known."""
        domain = self.managed or self.offline
        return self.migrate or self.copy or (domain.options if domain is not None else None)

    @property
    def untouched_guest(self) -> str:
        """What to say of the guest as long as no QEMU and no running domain is found yet, or none is concerned."""
        image = self.copy is not None and self.copy.image is not None
        return "no guest is concerned" if image or self.offline is not None else "nothing was done to a guest"

    def rest(self, *, target_ended: bool) -> None:
        """Forget what is gone now that the job is suspended: all that was made but images and bitmaps."""
        if self.target_launched and target_ended:
            self.target_qmp = self.target_process = None
            self.target_launched = False
        self.run_state_taken = self.told_to_pause = self.migrating = self.nbd_server = False
        self.frozen_by = self.settler = None
        self.suspended = True

    @property
    def prefix(self) -> str:
        """What the names of all that we make on the source begin with."""
        return f"blkmig-{self.job}"


class Job:
    """A job's directory: the record, and a lock that lives as long as any process of the job (it is inherited)."""

    def __init__(self, directory: Path, record: Record, lock: int) -> None:
        self.directory = directory
        self.record = record
        self.lock = lock
        self._file = DurableFile(directory / RECORD)
        self.starts_over = False
        """What was recorded is of no use any more: both sides are compared."""
        self.left = False
        """It was begun by others, who may have left it long ago."""

    @classmethod
    def create(cls) -> Job:
        """A new job with its private run-time directory (sockets). Raises `Refused` when the place can't be written."""
        name = secrets.token_hex(4)
        directory = state_directory() / name
        job = cls(directory, Record(job=name, runtime=""), -1)
        try:
            directory.mkdir(mode=0o700, parents=True)
            job.record.runtime = tempfile.mkdtemp(prefix=f"blkmig-{name}-")
            job.lock = _lock(directory)
            job.save_blocking()
        except OSError as error:
            job.remove()
            raise Refused(
                f"cannot make the job's directory {directory}: {error.strerror or error}",
                advice=f"make {state_directory()} and the directory for temporary files writable, or name another "
                f"place by {STATE_VARIABLE} and TMPDIR",
            ) from error
        return job

    @classmethod
    def load(cls, name: str) -> Job:
        """A job that was left behind. Raises `Refused` if there is none, it lives, or its record is damaged."""
        directory = state_directory() / name
        if not (directory / RECORD).exists():
            raise Refused(f"there is no job {name!r} in {state_directory()}", advice="qemu-blkmig jobs lists them")
        try:
            lock = _lock(directory)
        except FileNotFoundError:
            raise Refused(f"job {name} was settled by its watchdog in this moment") from None
        except BlockingIOError:
            raise Refused(
                f"job {name} is still being worked on by its own processes",
                advice="interrupt the qemu-blkmig that runs it (Ctrl-C there); if that was killed, its watchdog is at "
                "work and takes up to a minute or so: try again",
            ) from None
        try:
            job = cls(directory, read_record(directory), lock)
            job.left = True
            return job
        except (OSError, msgspec.DecodeError) as error:
            os.close(lock)
            raise Refused(
                f"the record of job {name} cannot be read: {error}", advice=f"look at {directory / 'record.json'}"
            ) from error

    async def undecided(self, within: float) -> None:
        """From now on the destination may take the guest, which stands still: `within` so many seconds.

        Raises `RecordFailed`; the guest is the source's then.
        """
        self.record.owner = Owner.UNDECIDED
        try:
            await self.save(within=within)
        except RecordFailed:
            self.record.owner = Owner.SOURCE
            raise

    async def wake(self) -> None:
        """Go on with a suspended job. Raises `Refused`, and has let go of it then."""
        self.record.suspended = False
        try:
            await self.save()
        except RecordFailed as error:
            self.record.suspended = True
            self.release()
            raise Refused(f"job {self.record.job} cannot be resumed: {error}", advice=error.advice) from error

    async def rest(self, *, target_ended: bool = True) -> None:
        """Suspend the job: its record says so, and its sockets are gone. Raises `RecordFailed`."""
        self.record.rest(target_ended=target_ended)
        await self.save()
        shutil.rmtree(self.record.runtime, ignore_errors=True)

    @property
    def runtime(self) -> Path:
        """The private directory for sockets; made anew where the job was suspended, or this host has been restarted."""
        if not Path(self.record.runtime).is_dir():
            self.record.runtime = tempfile.mkdtemp(prefix=f"blkmig-{self.record.job}-")
        return Path(self.record.runtime)

    async def save(self, *, synced: bool = True, within: float | None = None) -> None:
        """Make the record as it is now durable; one save after the other, in the order in which they were asked for.

        The event loop goes on meanwhile: where a guest stands still until it is done, it must be `within` so many
        seconds. Asked for once, it is tried, whether it is waited for or not. Not `synced` it outlives any process, and
        this host soon after. Raises `RecordFailed`.
        """
        writing = asyncio.wrap_future(self._file.write(self._encoded(), synced=synced))
        try:
            async with time_limit(within):
                await only_wait(writing)
        except OSError as error:
            late = isinstance(error, TimeoutError) and error.errno is None
            why = f"its storage did not take it within {within:g} s" if late else error.strerror
            raise RecordFailed(
                f"the job's record cannot be written: {why or error}", advice=f"see to {self.directory}, where it lies"
            ) from error

    def save_blocking(self, within: float | None = None) -> None:
        """`save` where no event loop runs, or none is to go on. Raises `OSError`, also after `within` seconds."""
        self._file.write(self._encoded(), synced=True).result(within)

    def finish_saving(self) -> None:
        """Return when every save that was asked for has been tried; the record may be another process's to write."""
        self._file.finish()

    def _encoded(self) -> bytes:
        try:
            return msgspec.json.format(msgspec.json.encode(self.record))
        except UnicodeEncodeError as error:
            raise Refused(f"neither QEMU nor a job's record can name what is not UTF-8: {error.object!r}") from error

    def remove(self) -> None:
        """Forget the job: nothing of it is left anywhere, but for its journal in the history."""
        self.finish_saving()
        if self.record.runtime:
            shutil.rmtree(self.record.runtime, ignore_errors=True)
        archive(self.directory)
        shutil.rmtree(self.directory, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let go of the lock and leave the record."""
        self.finish_saving()
        if self.record.suspended:
            shutil.rmtree(self.record.runtime, ignore_errors=True)
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


def read_record(directory: Path) -> Record:
    """The record in a job's directory. Raises `OSError`, `msgspec.DecodeError`."""
    return msgspec.json.decode((directory / RECORD).read_bytes(), type=Record)


def left_behind() -> Iterator[Record]:
    """Records of the jobs that are in the state directory, alive or not."""
    for path in sorted(state_directory().glob(f"*/{RECORD}")):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            yield read_record(path.parent)


def _lock(directory: Path) -> int:
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for _ in range(LOOKS):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            # Who only looks (`others.is_alive`) shares it, for a moment; a process of the job does not.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(lock, fcntl.LOCK_UN)
            time.sleep(LOOK)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock
