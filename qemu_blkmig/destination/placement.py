"""Where in a qcow2 image's own file its data lies, by `qemu-img map`: to be read past the server that writes it.

So what is proven is what a QEMU will find that opens the image anew; and a byte that is read back costs a third of the
CPU that it costs through a socket (docs/decisions/017-verified-as-written.md).
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qemu_blkmig.destination.programs import qemu_img
from qemu_blkmig.destination.qcow2 import header_of
from qemu_blkmig.destination.qemu_nbd import opens_direct
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import Refused

WORTH = 16 << 20
"""Bytes to be read from which on a qemu-img, which takes some 15 ms, is worth while."""
SPAN = 4 << 30
"""Bytes of the disk among which they may lie: of more, qemu-img would read too many tables."""
MOST_TOLD = 1 << 16
"""Clusters, or their parts that are mapped each, that this may be: of an image in pieces as many entries are told, at
0.5 s of a processor; for 0.2 s of it the agent does nothing else."""
PATIENCE = 3.0
"""Seconds that a qemu-img may take: the guest may be paused, and may have to wait for it."""

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
        self._span = _most_at_once(descriptor) if image_format == "qcow2" else 0

    def of(self, extents: Sequence[Extent]) -> Placement:
        """Where the extents lie, which are stable and stay as they are; nothing where that is not worth a qemu-img."""
        if not self._span or sum(extent.length for extent in extents) < WORTH:
            return Placement()
        start, end = min(extent.offset for extent in extents), max(extent.end for extent in extents)
        if end - start > self._span:
            return Placement()
        try:
            return Placement(self._entries(Extent(start, end - start)))
        except (Refused, ValueError, KeyError) as error:
            _log.info("where the data lies in the image's file is not told: %s", error)
            self._span = 0
            return Placement()

    def _entries(self, span: Extent) -> list[tuple[Extent, int]]:
        file = {"driver": "file", "filename": f"/proc/self/fd/{self._descriptor}", "cache": {"direct": self._direct}}
        image = f"json:{json.dumps({'driver': 'qcow2', 'file': file, 'backing': None})}"
        within = (f"--start-offset={span.offset}", f"--max-length={span.length}")
        told = qemu_img(
            "map", "--force-share", "--output=json", *within, image, limit=PATIENCE, descriptors=[self._descriptor]
        )
        return [
            (Extent(each["start"], each["length"]), each["offset"])
            for each in json.loads(told)
            if each["data"] and "offset" in each
        ]


def _most_at_once(descriptor: int) -> int:
    """Bytes of a qcow2 image's disk that may be asked for at once; 0 where its data lies in a file of its own."""
    try:
        header = header_of(descriptor)
    except (OSError, ValueError):
        return 0
    return 0 if header is None or header.data_apart else min(SPAN, MOST_TOLD << header.mapped_bits)
