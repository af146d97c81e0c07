"""The dirty phase: rounds that take what the guest wrote out of the recording and bring it to the destination."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from qemu_blkmig.engine.carrier import Carrier
from qemu_blkmig.engine.convergence import Pace
from qemu_blkmig.engine.device import Device
from qemu_blkmig.engine.extents import Batcher, Extent, Remainder, clip
from qemu_blkmig.engine.forecast import Forecasts
from qemu_blkmig.engine.heat import Sieve
from qemu_blkmig.engine.outlast import outlast, undo
from qemu_blkmig.engine.ports import Clock, CopyKind, DirtyLog, Round
from qemu_blkmig.errors import MigrationError


class DirtyRounds:
    """Runs rounds: harvest, copy, flush, retire, in this order, each the condition of the next.

    A harvested round is owed until it is retired. Whatever goes wrong before that, a cancellation included, merges
    it back into the recording. `unrestored` tells that this failed: then what is owed is known to nobody but the
    log, and the migration must not go on. `begun` counts rounds; `on_change` is called as figures change.

    A round may put off what is hot (`engine.heat`): always a part of what it has harvested itself. Then it is kept,
    not retired, until the next one has brought over, or has harvested again and put off itself, all that this one put
    off. So there is at most one, and whoever finds it left behind merges it back like any other. `again`: the part of
    what is put off that the guest is seen to have written anew by the next round. `forecasts`: of what is dirty when a
    round ends.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        log: DirtyLog,
        carrier: Carrier,
        clock: Clock,
        pace: Pace,
        *,
        batch: int,
        volume: int,
        on_change: Callable[[], None],
    ) -> None:
        self._devices = devices
        self._log = log
        self._carrier = carrier
        self._clock = clock
        self._pace = pace
        self._batch = batch
        self._volume = volume
        self._on_change = on_change
        self._looked_at = clock.now()
        self._kept: Sequence[Round] = ()
        self._leaving: list[Round] = []
        self._seen: Sequence[int] = ()
        self.begun = 0
        self.unrestored = False
        self.again = 0.0
        self.forecasts = Forecasts()

    async def start(self) -> None:
        """Start the recording; if that fails, or the caller is cancelled, stop it again and raise what went wrong."""
        try:
            started = await outlast(self._log.start())
            started.result()
            started.raise_cancellation()
        except BaseException as error:
            await undo(self._log.stop(), error, "stopping the recording")
            raise
        self._looked_at = self._clock.now()

    async def reattach(self) -> None:
        """Go on with the recording of one who is gone. Whatever it raises, that recording goes on."""
        attached = await outlast(self._log.reattach())
        attached.result()
        attached.raise_cancellation()
        self._looked_at = self._clock.now()

    async def look(self) -> None:
        """Ask the log what is dirty now; may be called while a round is under way. Raises what the log raises."""
        rounds = self.begun
        pending = await self._log.pending()
        if rounds == self.begun:  # else a harvest came in between, and this is what was dirty before it
            self._saw(pending)

    async def verify(self) -> None:
        """`look`, while no round is under way, and raise TopologyChanged unless the disks are as they were."""
        self._saw(await self._log.verify_topology())

    def _saw(self, pending: Mapping[str, int]) -> None:
        self._measure_dirtying(pending)
        for device in self._devices:
            device.recorded = pending[device.name]
        if not any(device.owed for device in self._devices):
            self.forecasts.came(sum(pending.values()))
        self._on_change()

    async def run(self, room: int = 0) -> int:
        """One round over all disks, which may put off `room` bytes; returns the bytes harvested.

        Raises what the log and the mover raise, with a note if the round could not be restored.
        """
        began = self._clock.now()
        harvest = await outlast(self._log.harvest())
        round_ = harvest.result()
        try:
            self._take(round_)
            harvest.raise_cancellation()
            carrying = await self._carry(round_, room)
            retirement = await outlast(self._retire(round_))
            retirement.result()
        except BaseException as error:
            await self._give_back(round_, error)
            raise
        harvested = sum(device.owed + sum(extent.length for extent in device.mending) for device in self._devices)
        for device in self._devices:
            device.retired()
        self._pace.overhead.add(self._clock.now() - began - carrying)
        self._on_change()
        retirement.raise_cancellation()
        return harvested

    async def _retire(self, round_: Round) -> None:
        """All that is owed is copied and flushed, but for what is put off now, which is in `round_`."""
        keep = any(device.putting_off for device in self._devices)
        self._leaving = [*self._kept, *(() if keep else (round_,))]
        while self._leaving:
            await self._leaving[0].retire()
            self._leaving.pop(0)
        self._kept = (round_,) if keep else ()

    def _take(self, round_: Round) -> None:
        self.begun += 1
        self._measure_dirtying(round_.dirty)
        for device in self._devices:
            device.harvested(round_.dirty[device.name])
        self.forecasts.expect(self._pace.dirtied_in_round(sum(round_.dirty.values()), len(self._devices)))
        self._on_change()

    def _measure_dirtying(self, dirty: Mapping[str, int]) -> None:
        """What is recorded more than at the last look; the same place written twice counts once, here as in a copy."""
        growth = sum(dirty[device.name] - device.recorded for device in self._devices)
        now = self._clock.now()
        self._pace.dirtying.add(max(0, growth), now - self._looked_at)
        self._looked_at = now

    async def _carry(self, round_: Round, room: int) -> float:
        """Copy and flush all of the round that is not put off; returns the seconds that took."""
        concerned = [device for device in self._devices if device.owed or device.mending or device.put_off]
        sieve = Sieve(room, self._seen)
        seconds = 0.0
        anew: list[float] = []
        for device in concerned:
            cooled = Remainder(device.put_off)
            seconds += await self._copy(device, round_, sieve, cooled)
            seconds += await self._bring(device, cooled.rest())
            seconds += await self._bring(device, device.mending)
            if device.put_off:
                anew.append(1 - sum(extent.length for extent in cooled.rest()) / device.left_off)
        for device in concerned:
            cost = await self._carrier.flush(device)
            self._pace.flush.add(cost)
            seconds += cost
        self._seen = sieve.seen
        if anew:
            self.again = min(anew)
        return seconds

    async def _copy(self, device: Device, round_: Round, sieve: Sieve, cooled: Remainder) -> float:
        """Copy what the round holds of `device`, with one group and one batch of its extents in memory at a time.

        But for what `sieve` puts off. What is in the round is taken out of `cooled`.
        """
        batcher = self._batcher(device)
        seconds, held, end = 0.0, 0, 0
        async with _closing(round_.extents(device.name)) as groups:
            async for group in groups:
                extents = list(clip(group, device.size))
                cooled.take_out(extents)
                for batch in batcher.feed(sieve.sift(device.heat, extents, device.putting_off)):
                    seconds += await self._carrier.copy(device, batch, CopyKind.DIRTY)
                held += sum(extent.length for extent in extents)
                end = extents[-1].end if extents else end
        if rest := batcher.rest():
            seconds += await self._carrier.copy(device, rest, CopyKind.DIRTY)
        _check_whole(device, held, end)
        return seconds

    async def _bring(self, device: Device, extents: Sequence[Extent]) -> float:
        """Copy these, too, though some of them may have been in the round: that is rare and does no harm."""
        batcher = self._batcher(device)
        seconds = 0.0
        for batch in (*batcher.feed(extents), batcher.rest()):
            if batch:
                seconds += await self._carrier.copy(device, batch, CopyKind.DIRTY)
        return seconds

    def _batcher(self, device: Device) -> Batcher:
        return Batcher(most=self._batch, volume=self._volume, size=device.size, unit=device.unit)

    async def _give_back(self, round_: Round, error: BaseException) -> None:
        """Merge the round back into the recording; that failing is noted on `error`.

        With it the one that was kept, if it was being retired: what that has left of it is not known.
        """
        for device in self._devices:
            device.unmended()
        self.unrestored = True
        await undo(self._restore(round_), error, "putting the round back into the recording")

    async def _restore(self, round_: Round) -> None:
        await round_.restore()
        for device in self._devices:
            device.restored()
        if self._leaving:
            for kept in self._kept:
                if kept in self._leaving:
                    await kept.restore()
            for device in self._devices:
                device.recorded_again()
            self._kept, self._leaving = (), []
        self.unrestored = False


def _check_whole(device: Device, held: int, end: int) -> None:
    """Hold the extents, `held` bytes up to `end`, against what the round counts: a stream cut short is no round done.

    The count may exceed them where the last granule of the bitmap reaches beyond the disk's end.
    """
    if held < device.owed and end < device.size:
        raise MigrationError(f"the round holds {device.owed} dirty bytes, but extents of only {held}", disk=device.name)


@asynccontextmanager
async def _closing(groups: AsyncIterator[Sequence[Extent]]) -> AsyncIterator[AsyncIterator[Sequence[Extent]]]:
    """Close a generator at once, not when it is collected: it may hold what a restore needs to be free."""
    try:
        yield groups
    finally:
        if isinstance(groups, AsyncGenerator):
            await groups.aclose()
