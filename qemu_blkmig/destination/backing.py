"""The backing files of qcow2 images, read off their headers alone: quick enough for those of all domains of a host.

Read: QEMU's docs/interop/qcow2.txt. A name that is no plain file, and a layer whose format its overlay's header does
not say, are not gone into, as by libvirt.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass

_MAGIC = 0x514649FB
_FORMAT = 0xE2792ACA
"""The header extension that names the backing file's format."""
_DATA_FILE = 0x44415441
"""That which names the file that has the image's data."""
_LONGEST = 1023
"""Bytes of a backing file's name."""
_LAYERS = 200


def backing_files(path: str, permitted: Callable[[str], bool]) -> tuple[list[str], bool]:
    """All files below the qcow2 image at `path`, and those with the data of it and of them, as far as they can be told.

    And whether that is all there are. Only `permitted` ones are opened.
    """
    found: list[str] = []
    while len(found) < _LAYERS and permitted(path):
        try:
            told = _told(path)
        except (OSError, struct.error, UnicodeDecodeError, ValueError):
            break
        names = [_plain(name) for name in (told.data_file, told.backing)]
        data, below = (os.path.join(os.path.dirname(path), name) if name else None for name in names)  # noqa: PTH118, PTH120 - strings like the rest
        found += [each for each in (data, below) if each is not None]
        if told.data_file and data is None:
            break
        if not told.backing:
            return found, True
        if below is None:
            break
        if told.format != "qcow2":
            return found, told.format == "raw"
        path = below
    return found, False


@dataclass(frozen=True)
class _Told:
    """What an image's header says of others: names, "" where there is none, and the backing file's format."""

    backing: str = ""
    format: str = ""
    data_file: str = ""


def _told(path: str) -> _Told:
    """Raises what reading and parsing do."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        kind = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            return _Told()
        head = os.pread(descriptor, 1 << 16, 0)
    finally:
        os.close(descriptor)
    magic, version, offset, size = struct.unpack_from(">IIQI", head)
    if magic != _MAGIC:
        return _Told()
    named = 0 < size <= _LONGEST and offset + size <= len(head)
    extensions = _extensions(head, struct.unpack_from(">I", head, 100)[0] if version >= 3 else 72)
    return _Told(
        head[offset : offset + size].decode() if named else "",
        extensions.get(_FORMAT, b"").decode(),
        extensions.get(_DATA_FILE, b"").decode(),
    )


def _extensions(head: bytes, at: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while True:
        kind, length = struct.unpack_from(">II", head, at)
        if kind == 0:
            return found
        found[kind] = head[at + 8 : at + 8 + length]
        at += 8 + (length + 7) // 8 * 8


def _plain(name: str) -> str | None:
    """The path of a file; None where there is none, or it is no plain file."""
    name = name.removeprefix("file:")
    head, colon, _ = name.partition(":")
    return None if not name or "\0" in name or (colon and "/" not in head) else name
