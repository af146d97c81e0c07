"""Watches the guest and the destination QEMU while disks are copied: what ends the job, what only has to be known."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from qemu_blkmig.errors import BlkmigError, ConnectionLost, DestinationFailed, GuestStateError
from qemu_blkmig.job.record import Job
from qemu_blkmig.job.target import TargetQemu
from qemu_blkmig.qmp.guest import run_state
from qemu_blkmig.qmp.monitor import Event, Monitor

EVENTS = ("SHUTDOWN", "GUEST_PANICKED", "STOP", "RESUME")
STOPPED_BY_OTHERS = ("paused", "io-error", "suspended", "watchdog")


class Guard:
    """Cancels `work` when the guest shuts down or crashes, or when a QEMU ends; `error` then tells why.

    Keeps the record's `was_running` true to what the guest does by itself or at an admin's hand.
    """

    def __init__(self, job: Job, source: Monitor, target: TargetQemu | None, work: asyncio.Task[object]) -> None:
        self._job = job
        self._source = source
        self._target = target
        self._work = work
        self._pauses_are_ours = False
        self.error: BlkmigError | None = None
        self._task = asyncio.create_task(self._watch())

    def ignore_pauses(self) -> None:
        """From now on a pause is ours."""
        self._pauses_are_ours = True

    async def stand_down(self) -> None:
        """Watch no longer: from the handover on, the end of a QEMU is for `settle` to judge."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def explain(self, error: BlkmigError) -> BlkmigError:
        """The reason behind `error`, if a QEMU's end is, and comes to be known within a moment."""
        if isinstance(error, ConnectionLost | DestinationFailed) or type(error).__name__ == "CommandFailed":
            await asyncio.wait({self._task}, timeout=0.5)
        return self.error or error

    async def _watch(self) -> None:
        watches = [asyncio.create_task(self._watch_source())]
        if self._target is not None:
            watches.append(asyncio.create_task(self._watch_target(self._target)))
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            for watch in done:
                error = watch.exception()
                if isinstance(error, BlkmigError):
                    self.error = error
                    self._work.cancel()
        finally:
            for watch in watches:
                watch.cancel()

    async def _watch_source(self) -> NoReturn:
        with self._source.events(*EVENTS) as events:
            while True:
                try:
                    await self._consider(await events.get())
                except ConnectionLost as error:
                    raise GuestStateError("the source QEMU ended during the migration") from error

    async def _consider(self, event: Event) -> None:
        if event.name == "SHUTDOWN":
            reason = event.data.get("reason", "unknown reason")
            raise GuestStateError(f"the guest was shut down during the migration ({reason})")
        if event.name == "GUEST_PANICKED":
            raise GuestStateError(f"the guest crashed during the migration (action {event.data.get('action')})")
        if not self._pauses_are_ours:
            await self._note_run_state(event.name)

    async def _note_run_state(self, event: str) -> None:
        running = event == "RESUME"
        if running or await run_state(self._source) in STOPPED_BY_OTHERS:
            self._job.record.was_running = running
            self._job.save()

    async def _watch_target(self, target: TargetQemu) -> NoReturn:
        await target.monitor.wait_lost()
        raise target.describe(DestinationFailed("the destination QEMU ended before it had the guest"))
