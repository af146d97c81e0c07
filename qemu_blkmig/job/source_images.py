"""The source's own images: whether they may be migrated from, and what becomes of them after the handover."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import msgspec

from qemu_blkmig.destination import ownership
from qemu_blkmig.destination.files import file_id
from qemu_blkmig.qmp.disks import Disk, plain_filename

OVERRIDE = "--ignore-ownership overrides"


class SourceImage(msgspec.Struct, frozen=True):
    """The image of `disk` at the source, by absolute path, and `to`: where it goes, in words."""

    disk: str
    path: str
    to: str


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


def mark_moved(images: Sequence[SourceImage], job: str) -> list[str]:
    """Record beside the source's images that their guest has moved; what could not be recorded, in sentences."""
    trouble = []
    for image in images:
        try:
            ownership.move(image.path, job, image.disk, image.to)
        except OSError as error:
            trouble.append(
                f"nothing beside {image.path} tells that its guest has moved to {image.to} ({error}): "
                "never start a guest from it"
            )
    return trouble
