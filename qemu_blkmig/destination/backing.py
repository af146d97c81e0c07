"""The backing files of qcow2 images, read off their headers alone: quick enough for those of all domains of a host.

Read: QEMU's docs/interop/qcow2.txt. A name that is no plain file, and a layer whose format its overlay's header does
not say, are not gone into, as by libvirt.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable

_MAGIC = 0x514649FB
_FORMAT = 0xE2792ACA
"""The header extension that names the backing file's format."""
_LONGEST = 1023
"""Bytes of a backing file's name."""
_LAYERS = 200


def backing_files(path: str, permitted: Callable[[str], bool]) -> tuple[list[str], bool]:
    """All files below the qcow2 image at `path`, as far as they can be told; only `permitted` ones are opened.

    And whether that is all there are.
    """
    found: list[str] = []
    while len(found) < _LAYERS and permitted(path):
        try:
            name, image_format = _below(path)
        except (OSError, struct.error, UnicodeDecodeError, ValueError):
            break
        head, colon, _ = name.partition(":")
        if not name:
            return found, True
        if "\0" in name or (colon and "/" not in head):
            break
        path = os.path.join(os.path.dirname(path), name)  # noqa: PTH118, PTH120 - a string like the rest
        found.append(path)
        if image_format != "qcow2":
            return found, image_format == "raw"
    return found, False


def _below(path: str) -> tuple[str, str]:
    """Name, "" where there is none, and format of an image's backing file. Raises what reading and parsing do."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        kind = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            return "", ""
        head = os.pread(descriptor, 1 << 16, 0)
    finally:
        os.close(descriptor)
    magic, version, offset, size = struct.unpack_from(">IIQI", head)
    if magic != _MAGIC or not 0 < size <= _LONGEST or offset + size > len(head):
        return "", ""
    at = struct.unpack_from(">I", head, 100)[0] if version >= 3 else 72
    return head[offset : offset + size].decode(), _format(head, at)


def _format(head: bytes, at: int) -> str:
    while True:
        kind, length = struct.unpack_from(">II", head, at)
        if kind == _FORMAT:
            return head[at + 8 : at + 8 + length].decode()
        if kind == 0:
            return ""
        at += 8 + (length + 7) // 8 * 8
