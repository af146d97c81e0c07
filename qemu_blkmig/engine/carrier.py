"""The engine's one way to the mover: every copy is timed, its report checked, and counted only then."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qemu_blkmig.engine.convergence import Pace
from qemu_blkmig.engine.device import Device
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.ports import Clock, CopyKind, CopyReport, Mover
from qemu_blkmig.errors import MigrationError


class Carrier:
    """Copies and flushes; `on_settled` is called after every batch that has been counted.

    Of two copies that are in flight together the chunks differ: those of the bulk pass are of neighbouring ranges, and
    in a round one is awaited before the next (ENGINE.md, "Dirty" 2).
    """

    def __init__(self, mover: Mover, clock: Clock, pace: Pace, on_settled: Callable[[], None]) -> None:
        self._mover = mover
        self._clock = clock
        self._pace = pace
        self._on_settled = on_settled
        self.halted = False

    def halt(self) -> None:
        """Refuse every further copy, so that what is under way ends with the batch that is in flight."""
        self.halted = True

    def check_halted(self, device: Device) -> None:
        """Raise MigrationError when halted."""
        if self.halted:
            raise MigrationError("the migration is being cancelled", disk=device.name)

    async def copy(self, device: Device, extents: Sequence[Extent], kind: CopyKind) -> float:
        """Copy one batch; returns the seconds it took.

        Raises MigrationError when halted or when the report does not account for every byte, and what the mover
        raises.
        """
        began = self._clock.now()
        report = await self.bring(device, extents, kind)
        seconds = self._clock.now() - began
        self.settle(device, extents, kind, report, seconds)
        return seconds

    async def bring(self, device: Device, extents: Sequence[Extent], kind: CopyKind) -> CopyReport:
        """Copy one batch that `settle` is to count; raises as `copy` does."""
        self.check_halted(device)
        report = await self._mover.copy(device.name, extents, kind)
        _check(device, extents, kind, report)
        return report

    def settle(
        self, device: Device, extents: Sequence[Extent], kind: CopyKind, report: CopyReport, seconds: float
    ) -> None:
        """Count a batch that took `seconds`, or came so long after the one before it."""
        device.settle(extents, kind, report)
        self._pace.copied(kind, report, seconds)
        self._on_settled()

    def now(self) -> float:
        """Monotonic seconds."""
        return self._clock.now()

    def compared(self, device: Device, extent: Extent, equal: int) -> None:
        """Count a range of the bulk pass whose differences have been copied; `equal` bytes of it needed no copy."""
        device.compared(extent, equal)
        self._on_settled()

    async def flush(self, device: Device) -> float:
        """Make stable what was copied to `device`; returns the seconds it took. Raises what the mover raises."""
        began = self._clock.now()
        await self._mover.flush(device.name)
        return self._clock.now() - began


def _check(device: Device, extents: Sequence[Extent], kind: CopyKind, report: CopyReport) -> None:
    asked = sum(extent.length for extent in extents)
    settled = report.copied + report.zeroed + report.skipped
    if settled != asked:
        raise MigrationError(f"the mover accounts for {settled} of {asked} bytes", disk=device.name)
    if kind is CopyKind.DIRTY and report.skipped:
        raise MigrationError(f"the mover skipped {report.skipped} bytes that the guest wrote", disk=device.name)
