"""What the engine needs of the world: small protocols and the facts that cross them.

All offsets and lengths are bytes, all times seconds. A disk is named by the string that the user knows it by.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qemu_blkmig.engine.extents import Extent


class CopyKind(enum.Enum):
    """How the mover treats the extents of one batch.

    BULK: ranges of the first pass. The mover looks up their allocation itself, just ahead of the copy. With a shared
    base, what the private layers do not allocate is skipped; where the destination is known to be zero, zeroes are
    not written.
    DIRTY: ranges that the guest wrote. Nothing is skipped: data is copied, and a range that was dirtied *to zero*
    becomes zero at the destination (FACTS.md, "Shared-base rule").
    """

    BULK = "bulk"
    DIRTY = "dirty"


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What became of one batch; `copied + zeroed + skipped` is the sum of its extents' lengths.

    `copied`: data read and written. `zeroed`: zero at the destination now, by whatever means, without payload.
    `skipped`: left to the shared base. `seconds`: how long the batch took.
    """

    copied: int
    zeroed: int
    skipped: int
    seconds: float


class Round(Protocol):
    """What one harvest took out of the recording: owed to the destination until `retire` or `restore`."""

    @property
    def dirty(self) -> Mapping[str, int]:
        """Bytes harvested, by disk; every disk is listed.

        Never more than the extents hold, save that the last granule may be counted beyond the disk's end: the engine
        takes fewer bytes for a stream cut short.
        """

    def extents(self, disk: str) -> AsyncIterator[Sequence[Extent]]:
        """The harvested extents of `disk`, ascending, disjoint, clipped to its size, in batches of bounded length.

        May be iterated anew after a failure, until `retire` or `restore`.
        """

    async def retire(self) -> None:
        """Forget the round: all of it has been copied *and flushed*."""

    async def restore(self) -> None:
        """Merge the round back into the recording: nothing of it is known to have arrived.

        Also called after a `retire` that failed, and then merges back what that has left.
        """


class DirtyLog(Protocol):
    """The record of what the guest writes."""

    async def start(self) -> None:
        """Start recording, on all disks in the same instant, before the first byte is read."""

    async def reattach(self) -> None:
        """Go on with a recording that was started, for the same disks, by one who is gone.

        Rounds that it had harvested and not retired are recorded again. Raises `Refused` where some disk's recording
        is not there, or not known to have been there all the time; may be called again after any error.
        """

    async def pending(self) -> Mapping[str, int]:
        """Bytes recorded and not yet harvested, by disk; every disk is listed."""

    async def harvest(self) -> Round:
        """Take all that is recorded, on all disks in the same instant, and go on recording from empty.

        Raises `TopologyChanged` when the disks are no longer those that recording started on. Whatever it raises, it
        has taken nothing. The engine lets it run to its end even when cancelled, as it does `start`, `reattach`,
        `stop`, `retire` and `restore`.
        """

    async def stand_ready(self) -> None:
        """Do beforehand what can be for a harvest that comes at any moment and must be quick; often called in vain."""

    async def verify_topology(self) -> Mapping[str, int]:
        """What `pending` tells. Raises `TopologyChanged` when these are not the disks any more that recording began on.

        Both are asked for after the call.
        """

    async def stop(self) -> None:
        """Stop recording and drop every trace of it. Safe to call at any time, also twice."""


class Mover(Protocol):
    """What carries bytes to the destination. Every call names the disk it is for.

    A writer that dies may take along what was not flushed. So it is never replaced in silence: at least one call for
    the disk fails before another writer serves it.
    """

    async def copy(self, disk: str, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        """Copy the extents (ascending, disjoint). On an error or when cancelled, any part may have arrived.

        Only returns or raises once nothing of this call is in flight any more: an older copy can never land after a
        newer one. Where the engine was told to keep the way full (`Tuning.room`), copies of neighbouring BULK ranges
        are asked for in their order while earlier ones are under way; when one fails the others of the disk may, too.
        """

    async def flush(self, disk: str) -> None:
        """Make all that `copy` has reported so far stable at the destination; what it reports meanwhile may be, too.

        When it raises, nothing reported since the last flush that succeeded is known to be there, nor what is under
        way. Only called during a copy where copies are (see there).
        """

    async def set_bandwidth(self, rate: int | None) -> None:
        """Limit payload to `rate` bytes a second over all disks; None: no limit. Zeroes cost nothing."""


class Comparer(Protocol):
    """Tells what the destination already holds, so that the bulk pass need not send it."""

    async def differing(self, disk: str, extent: Extent) -> Sequence[Extent]:
        """The parts of `extent` in which the two sides may differ, ascending, disjoint, within it.

        Both sides are read after the call, and nothing of it goes on once it has returned or raised. The destination
        is seen with all that `Mover.copy` has reported. Fails like a call of the mover when a writer died.
        """


class Guest(Protocol):
    """What the engine has to know of the guest."""

    async def is_paused(self) -> bool:
        """Whether no vCPU runs and the guest's requests are drained."""


class Clock(Protocol):
    """Time, so that tests and simulations can bring their own."""

    def now(self) -> float:
        """Monotonic seconds."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""
