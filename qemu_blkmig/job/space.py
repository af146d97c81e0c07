"""Warns early, while disks are copied, that the destination will not have room for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from qemu_blkmig.destination.protocol import Space
from qemu_blkmig.units import show_bytes


class SpaceWatch:
    """Holds what is still to be written against what is free, file system by file system.

    What is still to be written of a disk is what it occupies at the source, less what its image occupies already.
    """

    def __init__(self, occupied: Mapping[str, int], note: Callable[[str], None]) -> None:
        """`occupied`: bytes at the source, by disk. `note` is told once for each file system, and again if it had got
        better meanwhile."""
        self._occupied = occupied
        self._note = note
        self._last: dict[str, Space] = {}
        self._short: set[int] = set()

    def heard(self, space: Space) -> None:
        """The agent told of a disk's image and its file system."""
        self._last[space.disk] = space
        left = sum(
            max(0, self._occupied.get(disk, 0) - other.allocated)
            for disk, other in self._last.items()
            if other.device == space.device
        )
        if left <= space.free:
            self._short.discard(space.device)
        elif space.device not in self._short:
            self._short.add(space.device)
            self._note(
                f"{Path(space.path).parent} has only {show_bytes(space.free)} free, and about {show_bytes(left)} are "
                "still to be written: make room there, or the copy will fail"
            )
