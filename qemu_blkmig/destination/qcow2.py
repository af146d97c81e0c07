"""What a qcow2 image's header says: read at once, so that those of all domains of a host can be.

Read: QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

_MAGIC, _FIELDS = b"QFI\xfb", struct.Struct(">4sIQII")
"""Magic, version, where the backing file's name is, how long it is, a cluster's bits."""
_LONGEST = 1023
"""Bytes of a backing file's name."""
_SINCE_VERSION_3 = struct.Struct(">Q20xI")
"""Incompatible features, the header's length; before that it has neither, and ends where they would begin."""
_DATA_APART, _SUBCLUSTERS, _SUBCLUSTER_BITS = 1 << 2, 1 << 4, 5
"""Features: an external data file; extended L2 entries, by which 32 parts of a cluster are mapped each."""
_FORMAT, _DATA_FILE = 0xE2792ACA, 0x44415441
"""Extensions that name the backing file's format, and the external data file."""


@dataclass(frozen=True)
class Header:
    """Names are "" where there is none. `mapped_bits`: of what is mapped at once, a cluster or a part of it."""

    backing: str
    format: str
    data_file: str
    data_apart: bool
    mapped_bits: int


def header_of(descriptor: int) -> Header | None:
    """None: it is no qcow2 image. Raises `OSError`, and `ValueError` where it makes no sense."""
    head = os.pread(descriptor, 1 << 16, 0)
    if not head.startswith(_MAGIC):
        return None
    try:
        return _parsed(head)
    except struct.error as error:
        raise ValueError(f"the header of a qcow2 image ends early: {error}") from error


def _parsed(head: bytes) -> Header:
    _, version, offset, size, bits = _FIELDS.unpack_from(head)
    features, length = _SINCE_VERSION_3.unpack_from(head, 72) if version >= 3 else (0, 72)
    named = 0 < size <= _LONGEST and offset + size <= len(head)
    # They end there, too: what wrote no formats put the name of the backing file right after the header.
    extensions = _extensions(head, length, offset or len(head))
    return Header(
        backing=head[offset : offset + size].decode() if named else "",
        format=extensions.get(_FORMAT, b"").decode(),
        data_file=extensions.get(_DATA_FILE, b"").decode(),
        data_apart=bool(features & _DATA_APART),
        mapped_bits=bits - _SUBCLUSTER_BITS if features & _SUBCLUSTERS else bits,
    )


def _extensions(head: bytes, at: int, end: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while at < end:
        kind, length = struct.unpack_from(">II", head, at)
        if kind == 0:
            break
        found[kind] = head[at + 8 : at + 8 + length]
        at += 8 + (length + 7) // 8 * 8
    return found
