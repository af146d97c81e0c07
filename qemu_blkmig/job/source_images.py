"""The source's own images: whether they may be migrated from, and what becomes of them after the handover."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Sequence

import msgspec

from qemu_blkmig.destination import locks, ownership
from qemu_blkmig.destination.files import file_id
from qemu_blkmig.job.options import Afterwards
from qemu_blkmig.qmp.disks import Disk, plain_filename

OVERRIDE = "--ignore-ownership overrides"


class SourceImage(msgspec.Struct, frozen=True):
    """The image of `disk` at the source, by absolute path, and `to`: where it goes, in words.

    `domain`, `uuid`: libvirt's name and UUID of the guest, for the ownership record. `data_file`: where a qcow2 image
    has its data, by absolute path, if not in itself.
    """

    disk: str
    path: str
    to: str
    domain: str | None = None
    uuid: str | None = None
    data_file: str | None = None

    @property
    def guest(self) -> ownership.Guest | None:
        """For the ownership record."""
        return None if self.domain is None else ownership.Guest(self.domain, self.uuid or "")


def absolute(name: str, process: int | None) -> str:
    """A file's name as `process` (None: ours) uses it, made absolute; "" where it is no file or block device."""
    directory = "."
    if process is not None:
        try:
            directory = os.readlink(f"/proc/{process}/cwd")  # noqa: PTH115 - it may say more than a path
        except OSError:
            directory = "/"
    path = os.path.abspath(os.path.join(directory, plain_filename(name)))  # noqa: PTH100, PTH118 - links stay
    return path if name and file_id(path) is not None else ""


def origin(disk: Disk, process: int | None) -> str:
    """Where the disk comes from, in words."""
    return f"{socket.gethostname()}:{absolute(disk.filename, process) or disk.filename}"


def troubles(disk: Disk, process: int | None) -> list[str]:
    """Why its ownership records forbid to migrate the disk from here."""
    names = [layer.filename for layer in disk.layers if not layer.filter] or [disk.filename]
    if disk.filename and disk.filename not in names:
        names.insert(0, disk.filename)
    found: list[str] = []
    for number, path in enumerate(dict.fromkeys(absolute(name, process) for name in names)):
        try:
            told = ownership.read(path) if path else None
        except (OSError, ownership.Damaged) as error:
            found.append(f"disk {disk.name}: {error}; {OVERRIDE}")
            continue
        # The image of a guest that has moved may still be the base of others.
        if told is not None and told.state in (("incoming",) if number else ("incoming", "moved")):
            found.append(
                f"disk {disk.name}: {told.tell()}; if you know better, remove {ownership.path_of(path)}, or {OVERRIDE}"
            )
    return found


def leave_behind(images: Sequence[SourceImage], job: str, afterwards: Afterwards) -> list[str]:
    """Record beside the source's images that their guest has moved, or put the images away; the rest in sentences.

    Only the image that the guest wrote to is ever put away, never what lies below it; and none that somebody uses.
    Safe to repeat.
    """
    told: list[str] = []
    for image in images:
        try:
            if afterwards is not Afterwards.KEEP:
                told += _put_away(image, job, afterwards)
            # A link to what was put away would be told to be an image that has moved, and so would the next one there.
            if os.path.exists(image.path) or afterwards is Afterwards.KEEP:  # noqa: PTH110 - a string like the rest
                ownership.move(image.path, job, image.disk, image.to, image.guest)
        except OSError as error:
            told.append(
                f"nothing beside {image.path} tells that its guest has moved to {image.to} ({error}): "
                "never start a guest from it"
            )
    return told


def _put_away(image: SourceImage, job: str, afterwards: Afterwards) -> list[str]:
    path = os.path.realpath(image.path)
    new = f"{path}.moved-{job}"
    try:
        if os.path.lexists(path):
            if (why := _why_kept(path)) is not None:
                return [f"{path} was kept: {why}"]
            if afterwards is Afterwards.DELETE:
                os.unlink(path)  # noqa: PTH108 - a string like the rest
            else:
                if os.path.lexists(new):
                    return [f"{path} was kept: {new} is there already"]
                # The record first: no crash leaves the renamed image without one.
                ownership.move(new, job, image.disk, image.to, image.guest)
                os.rename(path, new)  # noqa: PTH104 - a string like the rest
        ownership.remove(path)
    except OSError as error:
        return [f"{path} was kept: {error.strerror}"]
    return _delete_data(image.data_file) if image.data_file and afterwards is Afterwards.DELETE else []


def _delete_data(name: str) -> list[str]:
    """Its image, which is gone, had its data in this file. A renamed image still has."""
    path = os.path.realpath(name)
    try:
        if os.path.lexists(path):
            if (why := _why_kept(path)) is not None:
                return [f"{path} was kept: {why}"]
            os.unlink(path)  # noqa: PTH108 - a string like the rest
    except OSError as error:
        return [f"{path} was kept: {error.strerror}"]
    return []


def _why_kept(path: str) -> str | None:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return "it is no file"
    if locks.used(path):
        return "somebody has it open"
    return None
