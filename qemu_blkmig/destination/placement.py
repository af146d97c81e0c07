"""Where in a qcow2 image's own file its data lies, by `qemu-img map`: to be read past the server that writes it.

So what is proven is what a QEMU will find that opens the image anew; and a byte that is read back costs a third of the
CPU that it costs through a socket (docs/decisions/017-verified-as-written.md).
"""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qemu_blkmig.destination.qemu_nbd import opens_direct
from qemu_blkmig.engine.extents import Extent

WORTH = 16 << 20
"""Bytes to be read from which on a qemu-img, which takes some 15 ms, is worth while."""
SPAN = 4 << 30
"""Bytes of the disk among which they may lie: of more, qemu-img would read too many tables."""
_PATIENCE = 60.0
_HEADER = struct.Struct(">4sI64xQ")
_MAGIC, _WITHOUT_FEATURES, _DATA_FILE = b"QFI\xfb", 2, 1 << 2
"""QEMU's docs/interop/qcow2.txt: magic, version, incompatible features; one of these is an external data file."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """`extent` of the disk, and where in the image's file that lies; None: not told."""

    extent: Extent
    place: int | None


class Placement:
    """Of some of a disk's extents: where in the image's file they lie."""

    def __init__(self, entries: Sequence[tuple[Extent, int]] = ()) -> None:
        """`entries`, ascending: an extent of the disk, and its place."""
        self._entries = entries
        self._starts = [extent.offset for extent, _ in entries]

    def places(self, extents: Iterable[Extent]) -> list[Extent]:
        """Of extents of the disk, what is told of, as extents of the image's file."""
        parts = (part for extent in extents for part in self.parts(extent.offset, extent.length))
        return [Extent(part.place, part.extent.length) for part in parts if part.place is not None]

    def parts(self, offset: int, length: int) -> Iterator[Part]:
        """The parts of a range of the disk, ascending."""
        end = offset + length
        number = max(0, bisect_right(self._starts, offset) - 1)
        while offset < end:
            while number < len(self._entries) and self._entries[number][0].end <= offset:
                number += 1
            extent, place = self._entries[number] if number < len(self._entries) else (Extent(end, 0), 0)
            if offset < extent.offset:
                until = min(end, extent.offset)
                yield Part(Extent(offset, until - offset), None)
            else:
                until = min(end, extent.end)
                yield Part(Extent(offset, until - offset), place + offset - extent.offset)
            offset = until


class Placements:
    """Tells of one image, as long as qemu-img does."""

    def __init__(self, descriptor: int, image_format: str) -> None:
        """The image's file is open on `descriptor`."""
        self._descriptor = descriptor
        self._direct = opens_direct(f"/proc/self/fd/{descriptor}")
        self._are_told = image_format == "qcow2" and _holds_its_data(descriptor)

    def of(self, extents: Sequence[Extent]) -> Placement:
        """Where the extents lie, which are stable and stay as they are; nothing where that is not worth a qemu-img."""
        if not self._are_told or sum(extent.length for extent in extents) < WORTH:
            return Placement()
        start, end = min(extent.offset for extent in extents), max(extent.end for extent in extents)
        if end - start > SPAN:
            return Placement()
        try:
            return Placement(self._entries(Extent(start, end - start)))
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            _log.info("where the data lies in the image's file is not told: %s", error)
            self._are_told = False
            return Placement()

    def _entries(self, span: Extent) -> list[tuple[Extent, int]]:
        file = {"driver": "file", "filename": f"/proc/self/fd/{self._descriptor}", "cache": {"direct": self._direct}}
        command = ["qemu-img", "map", "--force-share", "--output=json"]
        command += [f"--start-offset={span.offset}", f"--max-length={span.length}"]
        command.append(f"json:{json.dumps({'driver': 'qcow2', 'file': file, 'backing': None})}")
        done = subprocess.run(command, capture_output=True, check=True, timeout=_PATIENCE, pass_fds=[self._descriptor])
        return [
            (Extent(each["start"], each["length"]), each["offset"])
            for each in json.loads(done.stdout)
            if each["data"] and "offset" in each
        ]


def _holds_its_data(descriptor: int) -> bool:
    """Whether the data of a qcow2 image lies in its own file."""
    try:
        magic, version, features = _HEADER.unpack(os.pread(descriptor, _HEADER.size, 0))
    except (OSError, struct.error):
        return False
    return bool(magic == _MAGIC and (version == _WITHOUT_FEATURES or not features & _DATA_FILE))
