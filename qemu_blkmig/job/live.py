"""What a running job does for whoever controls it from another terminal."""

from __future__ import annotations

import msgspec

from qemu_blkmig.errors import Refused
from qemu_blkmig.job.control import Change
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.options import check_bandwidth, check_downtime
from qemu_blkmig.job.record import Record
from qemu_blkmig.job.reporting import STANDBY
from qemu_blkmig.job.status import Status, live
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.job.telling import Telling
from qemu_blkmig.units import show_rate, show_seconds


class Live:
    """Implements `job.control.Actions`."""

    def __init__(self, record: Record, telling: Telling, steering: Steering, interrupts: Interrupts) -> None:
        self._record = record
        self._telling = telling
        self._steering = steering
        self._interrupts = interrupts

    def status(self) -> Status:
        """How the job stands."""
        return live(self._record, self._telling, self._steering)

    async def change(self, wanted: Change) -> str:
        """Bring new limits into effect. Raises `UsageError`, and what bringing them into effect raises."""
        steering = self._steering
        bandwidth = steering.bandwidth if wanted.bandwidth is msgspec.UNSET else wanted.bandwidth
        downtime = steering.downtime if wanted.downtime is msgspec.UNSET else wanted.downtime
        check_bandwidth(bandwidth)
        check_downtime(downtime)
        steering.bandwidth, steering.downtime = bandwidth, downtime
        await steering.changed()
        rate = "no limit" if steering.rate is None else show_rate(steering.rate)
        text = f"bandwidth: {rate}, downtime: {show_seconds(steering.downtime)}"
        self._telling.note(f"set from another terminal: {text}")
        return text

    def cancel(self) -> str:
        """Cancel like the first Ctrl-C. Raises `Refused` when it is too late."""
        self._interrupts.cancel()
        return "cancelling"

    def switch_over(self) -> str:
        """Let the guest move. Raises `Refused` when the job does not wait for that."""
        if not self._steering.may_wait:
            raise Refused(
                "this job does not wait to be told when to switch over", advice="that is migrate --switchover manual"
            )
        self._steering.switchover.set()
        if self._telling.phase == STANDBY:
            return "the guest moves as soon as the last round fits the downtime"
        return "the guest will move without waiting any more, as soon as its disks are across"
