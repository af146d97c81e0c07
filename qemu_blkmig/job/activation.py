"""Whether a destination QEMU whose guest stays paused has taken its disks: the proof of success without a `cont`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from qemu_blkmig.errors import DestinationFailed, RequestError
from qemu_blkmig.qmp.features import probe
from qemu_blkmig.qmp.monitor import Monitor

Idle = Callable[[Sequence[str]], Awaitable[Sequence[str]]]
"""Tells, at the destination host, which of these images no QEMU holds for writing."""


async def activate(destination: Monitor, idle: Idle, images: Sequence[str]) -> None:
    """See to it that a paused destination, its migration completed, holds `images` for writing.

    QEMU 7.2 takes its disks at the migration's end, 10.0 leaves that to `cont` and must be told (both seen). Raises
    `DestinationFailed` when it does not take them, `ConnectionLost`.
    """
    if (await probe(destination)).set_active:
        try:
            await destination.execute("blockdev-set-active", {"active": True})
        except RequestError as error:
            raise DestinationFailed(f"the destination QEMU could not activate its disks: {error}") from error
    if left := await idle(images):
        raise DestinationFailed(f"the destination QEMU did not activate its disks: it does not hold {', '.join(left)}")
