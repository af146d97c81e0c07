"""Completion: the last pass, with the guest paused; when it ends, both sides are equal and stable."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from qemu_blkmig.engine.carrier import Carrier
from qemu_blkmig.engine.device import Device
from qemu_blkmig.engine.dirty import DirtyRounds
from qemu_blkmig.engine.outlast import together
from qemu_blkmig.engine.ports import Guest, Mover
from qemu_blkmig.errors import MigrationError

LAST_ROUNDS = 3
"""A paused guest leaves nothing dirty after one round. Who still finds dirt after so many sees another writer."""


class Completion:
    """Brings over what is left, and checks what the switchover stands on instead of assuming it."""

    def __init__(
        self,
        devices: Sequence[Device],
        mover: Mover,
        guest: Guest,
        carrier: Carrier,
        rounds: DirtyRounds,
    ) -> None:
        self._devices = devices
        self._mover = mover
        self._guest = guest
        self._carrier = carrier
        self._rounds = rounds

    async def run(self, beside: Callable[[], Awaitable[None]]) -> None:
        """Copy until nothing is dirty, flush every disk, and find all as it was, while `beside` is done.

        What was seen to be dirty last, perhaps before the pause, tells whether to begin with a round; what is asked for
        after the last round, all reads being over, tells whether this was the end.

        Raises MigrationError when the guest is not paused or its disks are still written to, TopologyChanged, and
        what the ports raise. The bandwidth limit stays off, also after an error.
        """
        await together(self._check_guest(), self._mover.set_bandwidth(None))
        for _ in range(LAST_ROUNDS):
            if self._dirty():
                await self._rounds.run()
            for device in self._devices:
                await self._carrier.flush(device)
            await together(self._check(), beside())
            dirty = self._dirty()
            if not dirty:
                return
        raise MigrationError(f"the disks are written to though the guest is paused: {dirty} bytes are dirty")

    async def _check_guest(self) -> None:
        if not await self._guest.is_paused():
            raise MigrationError("switchover refused: the guest is not paused")

    async def _check(self) -> None:
        await self._check_guest()
        await self._rounds.verify()

    def _dirty(self) -> int:
        return sum(device.to_harvest for device in self._devices)
