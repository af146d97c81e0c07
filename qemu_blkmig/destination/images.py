"""Images at the destination: found fit or not, created, removed; never by name alone, never over what is there."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msgspec import structs

from qemu_blkmig import errors
from qemu_blkmig.destination import devices, hashtable, locks, ownership
from qemu_blkmig.destination.files import FileId, file_id
from qemu_blkmig.destination.holders import claimant
from qemu_blkmig.destination.programs import SERVING, USUAL_LIMIT, image_info, missing, qemu_img
from qemu_blkmig.destination.protocol import Backing, Created, Image, Problem, Room, Space
from qemu_blkmig.stable import sync_entry

WRITABLE_FORMATS = frozenset({"raw", "qcow2", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels"})

_CLUSTERED = frozenset({"qcow2", "qed", "parallels"})
"""Formats of which `qemu-img create` takes the size of clusters; `qemu-img info` tells it of others, too."""
_PREALLOCATION = {"raw": ("off", "falloc", "full"), "qcow2": ("off", "metadata", "falloc", "full")}
_CHECK_TIMEOUT = 1800.0
_PREDECESSOR = 30.0
"""Seconds in which an agent that was lost must have let go of an image."""
_LAST_LOOK = 10.0
"""The same, where it is only waited for to remove what it leaves; who asks waits for `job.peers.ANSWER` at most."""

_ZEROES = bytes(1 << 20)
_BEGINNINGS = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx", b"QED\0": "qed", b"LUKS\xba\xbe": "luks"}
"""First bytes of images that are not raw."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image that is ours to write: `descriptor` is open for it and holds the job lock.

    `created` is None where the image was there before. `job`: whose ownership record it has.
    """

    image: Image
    descriptor: int
    created: Created | None
    job: str | None = None

    @property
    def keep_allocated(self) -> bool:
        """Whether zeroes that are written are to make no holes."""
        return self.image.preallocation != "off"

    @property
    def reads_as_zero(self) -> bool:
        """Whether every byte that we have not written is zero."""
        vouched = self.image.known_zero and self.image.identity is None
        return self.image.backing is None and (vouched or self.created is not None)

    @property
    def identity(self) -> Created:
        """Which file it is."""
        return _identity(self.image.path, os.fstat(self.descriptor))


def inspect(images: Sequence[Image], job: str | None = None) -> tuple[list[Problem], list[Room]]:
    """Everything that `prepare` would fail on, and the room where images are to be created.

    `job`: who asks, None: nobody who could go on with an image.
    """
    lacking = missing(SERVING) if any(image.format != "raw" for image in images) else []
    problems = [Problem(None, what) for what in lacking]
    problems += [
        Problem(image.disk, what)
        for image in images
        if image.format == "raw" or not lacking
        for what in _faults(image, job)
    ]
    problems += [
        Problem(image.disk, f"{image.path} {why}")
        for image in images
        if image.identity is not None and (why := _of_another(image.path, job)) is not None
    ]
    seen: dict[str | FileId, str] = {}
    for image in images:
        place = file_id(image.path) or os.path.realpath(image.path)
        if place in seen:
            problems.append(Problem(image.disk, f"{image.path} is the destination of disk {seen[place]} too"))
        seen[place] = image.disk
    return problems, [room for image in images if _is_to_be_made(image) for room in _room(image)]


def prepare(images: Sequence[Image], job: str | None = None, guest: ownership.Guest | None = None) -> list[Prepared]:
    """Check, create and lock the images, all or none, and record that they are `job`'s, for `guest`.

    Raises `Refused` naming every fault, or `DestinationWriteError` where creating fails; what was created until then
    is removed again.
    """
    problems, _rooms = inspect(images, job)
    if problems:
        disk = problems[0].disk if len({problem.disk for problem in problems}) == 1 else None
        raise errors.Refused("; ".join(problem.what for problem in problems), disk=disk)
    prepared: list[Prepared] = []
    try:
        for image in images:
            prepared.append(_prepare(image, job, guest))
    except BaseException:
        for each in prepared:
            give_up(each, untouched=True)
        raise
    return prepared


def wait_for_predecessor(path: str, seconds: float = _PREDECESSOR) -> None:
    """Wait until no agent holds the image: one that has lost its coordinator drains its writes before it lets go."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while locks.in_use_by_job(path) and time.monotonic() < deadline:
            time.sleep(0.05)


def give_up(prepared: Prepared, *, untouched: bool = False) -> None:
    """Let go of the image, and remove it if it was made here. `untouched`: nothing was written to it."""
    if prepared.created is not None and _is_still(prepared.created):
        Path(prepared.created.path).unlink()
    if prepared.job is not None and (untouched or prepared.created is not None):
        _withdraw(prepared.image.path, prepared.job)
    with contextlib.suppress(OSError):
        os.close(prepared.descriptor)


def discard(
    images: Sequence[Created], given_up: Sequence[str] = (), job: str | None = None, *, unless_written: bool = False
) -> tuple[list[str], list[str]]:
    """Remove the images that still are those that were made and that nobody uses; (removed, left with the reason).

    `given_up`, `unless_written`: see `protocol.Discard`. `job`: whose they are; what another one has filled since
    is that one's.
    """
    removed, left = [], []
    deadline = time.monotonic() + _LAST_LOOK
    for image in images:
        try:
            if not os.path.lexists(image.path):
                _forget(image.path)
                continue
            wait_for_predecessor(image.path, max(0.0, deadline - time.monotonic()))
            reason = _reason_to_keep(image) or _of_another(image.path, job)
            if reason is None and unless_written and hashtable.is_written_since(image.path):
                reason = "somebody else may have written to it since this job did"
            if reason is None:
                Path(image.path).unlink()
                removed.append(image.path)
                _forget(image.path)
                continue
        except OSError as error:
            reason = str(error)
        left.append(f"{image.path}: {reason}")
    for path in given_up:
        with contextlib.suppress(OSError):
            if _of_another(path, job) is None:
                hashtable.forget(path)
    return removed, left


def _forget(path: str) -> None:
    ownership.withdraw(path)
    hashtable.forget(path)


def mark(images: Sequence[str], job: str, state: str, guest: ownership.Guest | None = None) -> None:
    """Bring ownership records of `job` to `state` (see `protocol.Mark`). Raises `Refused`."""
    for path in images:
        try:
            # First, so that the record finds room where a disk is full.
            if _of_another(path, job) is None:
                hashtable.forget(path)
            if state == "complete":
                ownership.complete(path, job, guest)
            else:
                ownership.withdraw(path, job)
        except (OSError, ownership.Damaged) as error:
            raise errors.Refused(f"the ownership record of {path} cannot be written: {error}") from error


def size_of(path: str, image_format: str) -> int:
    """The virtual size of an existing image. Raises `Refused` where it is no such image, `OSError`."""
    if image_format == "raw":
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.lseek(descriptor, 0, os.SEEK_END)
        finally:
            os.close(descriptor)
    return int(image_info(path, image_format)["virtual-size"])


def chain(path: str, image_format: str, *, alone: bool = False) -> tuple[int, list[str]]:
    """The virtual size of an image, and the files that its content comes from: backing files, and external data files.

    `alone`: its backing file left aside. Raises `Refused`.
    """
    layers = [image_info(path, image_format)] if alone else _chain_info(path, image_format)
    files = []
    for layer in layers:
        files.append(layer["filename"])
        data = layer.get("format-specific", {}).get("data", {}).get("data-file")
        # QEMU takes a relative one from its working directory, not from beside the image.
        files += [] if data is None else [str(Path(data).absolute())]
    return int(layers[0]["virtual-size"]), files


def recognized(path: str) -> str:
    """The format that qemu-img takes an existing image for. Raises `Refused`."""
    return str(image_info(path, None)["format"])


def allocated(descriptor: int) -> int:
    """Bytes that the image occupies; a block device occupies all it has."""
    status = os.fstat(descriptor)
    return os.lseek(descriptor, 0, os.SEEK_END) if stat.S_ISBLK(status.st_mode) else status.st_blocks * 512


def space(prepared: Prepared) -> Space | None:
    """What the image occupies and has left to grow; None for a block device, which does not. Raises `OSError`."""
    status = os.fstat(prepared.descriptor)
    if not stat.S_ISREG(status.st_mode):
        return None
    room = os.fstatvfs(prepared.descriptor)
    image = prepared.image
    return Space(image.disk, image.path, status.st_dev, room.f_bavail * room.f_frsize, status.st_blocks * 512)


def incomplete(paths: Sequence[str]) -> list[str]:
    """In words, which of these images some job has left incomplete."""
    told = []
    for path in paths:
        with contextlib.suppress(OSError, ownership.Damaged):
            record = ownership.read(path)
            if record is not None and record.state == "incoming":
                told.append(record.tell())
    return told


def _faults(image: Image, job: str | None) -> Iterator[str]:
    if image.format not in WRITABLE_FORMATS:
        yield f"format {image.format!r} cannot be written; possible are {', '.join(sorted(WRITABLE_FORMATS))}"
        return
    if not Path(image.path).is_absolute():
        yield f"{image.path} is not an absolute path"
        return
    if not 0 < image.size < 1 << 63 or image.size % 512:
        yield f"a size of {image.size} bytes is not a positive multiple of 512 below 8 EiB"
    try:
        yield from _faults_to_create(image) if _is_to_be_made(image) else _faults_as_it_is(image, job)
    except errors.Refused as error:
        yield error.what
    except OSError as error:
        yield f"{image.path}: {error.strerror}"


def _is_to_be_made(image: Image) -> bool:
    return image.create and image.identity is None and not os.path.lexists(image.path)


def _faults_to_create(image: Image) -> Iterator[str]:
    if image.preallocation != "off" and image.backing is not None:
        yield "an overlay upon a shared base is never preallocated"
    elif image.preallocation not in _PREALLOCATION.get(image.format, ("off",)):
        possible = ", ".join(_PREALLOCATION.get(image.format, ("off",)))
        yield f"format {image.format} knows no preallocation {image.preallocation!r}; possible are {possible}"
    directory = Path(image.path).parent
    if not os.path.lexists(directory):
        yield f"{image.path} cannot be made: there is no directory {directory}"
    elif not directory.is_dir():
        yield f"{directory} is not a directory"
    elif not os.access(directory, os.W_OK | os.X_OK):
        yield f"{directory} cannot be written"
    if image.backing is not None:
        yield from _faults_of_backing(image, directory)


def _faults_of_backing(image: Image, directory: Path) -> Iterator[str]:
    backing = image.backing
    if backing is None:
        return
    if image.format not in {"qcow2", "qed", "vmdk"}:
        yield f"an image of format {image.format} cannot have a backing file"
    elif backing.format not in WRITABLE_FORMATS:
        yield f"format {backing.format!r} of the backing file {backing.path} is not known"
    elif not (directory / backing.path).exists():
        yield f"the backing file {directory / backing.path} is missing"
    else:
        size_of(str(directory / backing.path), backing.format)


def _faults_as_it_is(image: Image, job: str | None) -> Iterator[str]:
    if image.identity is not None and not _leads_there(image.identity):
        yield f"{image.path} is not the {_was(image.identity)} that was being filled: it was replaced, or removed"
        return
    descriptor = _open_for_writing(image.path)
    try:
        kind = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            yield f"{image.path} is neither a file nor a block device"
            return
    finally:
        os.close(descriptor)
    size = size_of(image.path, image.format)
    if size != image.size:
        resized = ": one of them was resized since the job began" if image.identity is not None else ""
        yield f"{image.path} holds {size} bytes, the disk has {image.size}{resized or _told_otherwise(image)}"
    if image.backing is not None and not _stands_on(image, image.backing):
        yield f"{image.path} is there already, but not upon the backing file {image.backing.path}"
    elif image.backing is not None and not (image.compared or image.identity) and _holds_data(image):
        yield (
            f"{image.path} is there already and holds data of its own, which would stay wherever the source's overlay "
            "has none; it must be a new overlay"
        )
    if locks.in_use_by_job(image.path):
        yield _claimed(image, job)
    elif locks.in_use(image.path):
        yield f"{image.path} is open for writing in a QEMU"


def _claimed(image: Image, job: str | None) -> str:
    """In words, who has the image, and what is to be done if that is an agent of `job` itself."""
    holder, filling = claimant(image.path), _filled_by(image.path)
    if job is None or filling != job:
        told = ", ".join([*([f"job {filling}"] if filling else []), *([str(holder)] if holder else [])])
        return f"{image.path} is the destination of another migration{told and f' ({told})'}"
    who = f"{holder} on {socket.gethostname()}" if holder else f"some process on {socket.gethostname()}"
    end = f"end it there (kill -KILL {holder.pid})" if holder else "end it there"
    return (
        f"{image.path} is still held by an agent of this very job that was lost and hangs, {who}, which would write to "
        f"it once it goes on: {end}, and try again"
    )


def _told_otherwise(image: Image) -> str:
    """What a raw file of the wrong size rather is, by its first bytes.

    qemu-img must not guess: for a VMDK it opens whatever files that names, and anybody may have written one.
    """
    if image.format != "raw":
        return ""
    with Path(image.path).open("rb") as file:
        first = file.read(8)
    own = next((name for beginning, name in _BEGINNINGS.items() if first.startswith(beginning)), None)
    return f": it is an image of format {own}, and raw is wanted" if own is not None else ""


def _stands_on(image: Image, backing: Backing) -> bool:
    info = image_info(image.path, image.format)
    own = info.get("full-backing-filename", info.get("backing-filename"))
    return own is not None and os.path.realpath(own) == os.path.realpath(Path(image.path).parent / backing.path)


def _holds_data(image: Image) -> bool:
    """Whether an overlay has any data or zeroes of its own, its backing file left aside."""
    alone = {"driver": image.format, "file": {"driver": "file", "filename": os.path.realpath(image.path)}}
    told = qemu_img("map", "--force-share", "--output=json", f"json:{json.dumps(alone | {'backing': None})}")
    return any(extent["present"] for extent in json.loads(told))


def _room(image: Image) -> Iterator[Room]:
    """None where that cannot be told."""
    directory = Path(image.path).parent
    with contextlib.suppress(OSError):
        space = os.statvfs(directory)
        yield Room(image.disk, directory.stat().st_dev, space.f_bavail * space.f_frsize)


def _prepare(image: Image, job: str | None, guest: ownership.Guest | None) -> Prepared:
    """The record comes first: no crash leaves an incomplete image that nothing tells of."""
    if image.identity is not None:
        return _take_up(image)
    if job is not None:
        _announce(image, job, guest)
    try:
        return replace(_create(image) if _is_to_be_made(image) else _adopt(image), job=job)
    except BaseException:
        if job is not None:
            _withdraw(image.path, job)
        raise


def _announce(image: Image, job: str, guest: ownership.Guest | None) -> None:
    try:
        ownership.announce(image.path, job, image.disk, image.origin, guest)
    except OSError as error:
        what = f"the ownership record of {image.path} cannot be written: {error.strerror}"
        raise errors.DestinationWriteError(what, disk=image.disk, offset=None, errno=error.errno or 0) from error


def _withdraw(path: str, job: str) -> None:
    try:
        ownership.withdraw(path, job)
    except OSError as error:
        _log.error("the ownership record of %s cannot be removed: %s", path, error)


def _adopt(image: Image) -> Prepared:
    try:
        descriptor = _open_for_writing(image.path)
    except OSError as error:
        raise errors.Refused(f"{image.path}: {error.strerror}", disk=image.disk) from error
    try:
        _claim(descriptor, image)
    except BaseException:
        os.close(descriptor)
        raise
    return Prepared(image, descriptor, None)


def _take_up(image: Image) -> Prepared:
    """Go on with an image that another agent has begun to fill; its ownership record is there already."""
    prepared = _adopt(image)
    try:
        if image.identity is not None and not _is_same(prepared.identity, image.identity):
            raise errors.Refused(f"{image.path} was replaced just now", disk=image.disk)
        _mend(image)
    except BaseException:
        os.close(prepared.descriptor)
        raise
    return prepared


def _mend(image: Image) -> None:
    """What a killed qemu-nbd may leave is clusters that nothing refers to; anything else is damage. Raises `Refused`.

    `qemu-img check` ends with 2 for damage, 3 for leaks that stay, 63 where the format has no checks (its man page).
    """
    if image.format == "raw":
        return
    command = ["qemu-img", "check", "-q", "-f", image.format, *(["-r", "leaks"] if image.format == "qcow2" else [])]
    try:
        done = subprocess.run(
            [*command, image.path], capture_output=True, text=True, errors="backslashreplace", timeout=_CHECK_TIMEOUT,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise errors.Refused(f"qemu-img check: {error}", disk=image.disk) from error
    if done.returncode not in (0, 3, 63):
        what = f"{image.path} is damaged: {(done.stderr or done.stdout).strip()[-1000:]}"
        raise errors.Refused(what, disk=image.disk)


def _create(image: Image) -> Prepared:
    try:
        descriptor = os.open(image.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _cannot_create(image, error) from error
    status = os.fstat(descriptor)
    prepared = Prepared(image, descriptor, Created(image.path, status.st_dev, status.st_ino))
    try:
        _claim(descriptor, image)
        _lay_out(image, descriptor)
        if image.owner is not None:
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, *image.owner)
        os.fsync(descriptor)
        sync_entry(Path(image.path))
    except OSError as error:
        give_up(prepared, untouched=True)
        raise _cannot_create(image, error) from error
    except BaseException:
        give_up(prepared, untouched=True)
        raise
    return prepared


def _lay_out(image: Image, descriptor: int) -> None:
    if image.format == "raw":
        os.ftruncate(descriptor, image.size)
        if image.preallocation != "off":
            # glibc writes to each block itself where the file system cannot allocate.
            os.posix_fallocate(descriptor, 0, image.size)
        if image.preallocation == "full":
            _write_zeroes(descriptor, image.size)
        return
    sized = image.cluster_size is not None and image.format in _CLUSTERED
    options = ["-o", f"cluster_size={image.cluster_size}"] if sized else []
    if image.backing is not None:
        options += ["-b", image.backing.path, "-F", image.backing.format]
    if image.preallocation != "off":
        options += ["-o", f"preallocation={image.preallocation}"]
    limit = None if image.preallocation in ("falloc", "full") else USUAL_LIMIT
    qemu_img("create", "-q", "-f", image.format, *options, image.path, str(image.size), limit=limit)
    size = size_of(image.path, image.format)
    if size != image.size:
        raise errors.Refused(f"format {image.format} made {size} bytes of {image.size}", disk=image.disk)


def _claim(descriptor: int, image: Image) -> None:
    try:
        claimed = locks.lock_job(descriptor)
        if claimed and (image.format != "raw" or locks.lock_as_writer(descriptor)):
            return
    except OSError as error:
        raise errors.Refused(f"{image.path} cannot be locked: {error.strerror}", disk=image.disk) from error
    whose = "open for writing in a QEMU" if claimed else "the destination of another migration"
    raise errors.Refused(f"{image.path} is {whose}", disk=image.disk)


def _open_for_writing(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)


def _cannot_create(image: Image, error: OSError) -> errors.DestinationWriteError:
    what = f"{image.path} cannot be created: {error.strerror}"
    return errors.DestinationWriteError(what, disk=image.disk, offset=None, errno=error.errno or 0)


def _reason_to_keep(image: Created) -> str | None:
    if not _is_still(image):
        return "is not the file that was made"
    if locks.in_use_by_job(image.path):
        return f"is being written by an agent, {claimant(image.path) or 'which one cannot be seen'}"
    if locks.in_use(image.path):
        return "is open for writing in a QEMU"
    return None


def _identity(path: str, status: os.stat_result) -> Created:
    """A block device's node is another one after each boot of the host, and its name may lead to another device."""
    if stat.S_ISBLK(status.st_mode):
        return Created(path, 0, 0, devices.known_as(status.st_rdev))
    return Created(path, status.st_dev, status.st_ino)


def _is_same(found: Created, before: Created) -> bool:
    """Whether it is the same image; what is not known of a device in one of the two is left aside."""
    both = found.known_as and before.known_as
    return found == (before if both else structs.replace(before, known_as=found.known_as))


def _of_another(path: str, job: str | None) -> str | None:
    """In words, that a job other than `job` (None: any) has filled the image since, if one has."""
    by = _filled_by(path)
    return None if by is None or job in (None, by) else f"was filled by job {by} since"


def _filled_by(path: str) -> str | None:
    """The job that has filled, or is filling, the image; None: that is not known."""
    with contextlib.suppress(ownership.Damaged):
        record = ownership.read(path)
        return None if record is None else record.job
    return None


def _was(image: Created) -> str:
    return f"block device ({image.known_as})" if image.known_as else "file"


def _leads_there(image: Created) -> bool:
    """Whether the path leads, perhaps by a link, to the image that it led to."""
    try:
        return _is_same(_identity(image.path, Path(image.path).stat()), image)
    except FileNotFoundError:
        return False


def _is_still(image: Created) -> bool:
    try:
        status = Path(image.path).lstat()
    except FileNotFoundError:
        return False
    return (status.st_dev, status.st_ino) == (image.device, image.inode)


def _write_zeroes(descriptor: int, size: int) -> None:
    for offset in range(0, size, len(_ZEROES)):
        piece = memoryview(_ZEROES)[: size - offset]
        while piece:
            written = os.pwrite(descriptor, piece, offset)
            piece, offset = piece[written:], offset + written


def _chain_info(path: str, image_format: str) -> list[dict[str, Any]]:
    # Opening a pipe, qemu-img would wait for somebody to open its other end.
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise errors.Refused(f"{path} cannot be read: {error.strerror}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise errors.Refused(f"{path} is neither a file nor a block device")
    told = qemu_img(
        "info", "--force-share", "--backing-chain", "--output=json", "-f", image_format, os.path.realpath(path)
    )
    layers: list[dict[str, Any]] = json.loads(told)
    return layers
