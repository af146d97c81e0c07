"""Watches the guest, the destination QEMU and the watchdog while disks are copied: what ends the job, what is noted."""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn

from qemu_blkmig.errors import (
    BlkmigError,
    ConnectionLost,
    DestinationFailed,
    GuestStateError,
    MigrationError,
    WatchdogGone,
)
from qemu_blkmig.job.record import Job
from qemu_blkmig.job.target import TargetQemu
from qemu_blkmig.job.watchdog_client import Watchdog
from qemu_blkmig.qmp.guest import MIGRATED, run_state
from qemu_blkmig.qmp.monitor import CommandFailed, Event, Monitor
from qemu_blkmig.virt.connection import LibvirtGone

log = logging.getLogger(__name__)

EVENTS = ("SHUTDOWN", "GUEST_PANICKED", "STOP", "RESUME")
STOPPED_BY_OTHERS = ("paused", "io-error", "suspended", "watchdog")
ENDED = {"shutdown": "was shut down", "guest-panicked": "crashed", "internal-error": "met an internal error of QEMU"}


class Guard:
    """Cancels `work` when the guest shuts down or crashes, or a QEMU or the watchdog ends; `error` then tells why.

    Keeps the record's `was_running` true to what the guest does by itself or at an admin's hand.
    """

    def __init__(
        self, job: Job, source: Monitor, target: TargetQemu | None, watchdog: Watchdog, work: asyncio.Task[object]
    ) -> None:
        self._job = job
        self._source = source
        self._target = target
        self._watchdog = watchdog
        self._work: asyncio.Task[object] | None = work
        self._pauses_are_ours = False
        self._ends_on_io_error = False
        self.resumes_are_libvirts = False
        """libvirt resumes a guest that ran when it began to move it, and that it has not moved, whoever has paused it
        meanwhile; an admin's resume it does not let in before (9.0). So who left it paused still wants it so.
        """
        self.error: BlkmigError | None = None
        self._task = asyncio.create_task(self._watch())

    def ignore_pauses(self) -> None:
        """From now on a pause is ours."""
        self._pauses_are_ours = True

    async def libvirt_has_ended(self) -> None:
        """From now on who resumes the guest wants it to run; and so it is to, if it runs now, whoever has resumed it.

        That it does not may be libvirt's doing still. A QEMU that does not tell is for the watch to judge. Raises
        `RecordFailed`.
        """
        self.resumes_are_libvirts = False
        try:
            runs = await run_state(self._source) == "running"
        except BlkmigError:
            return
        if runs and not self._pauses_are_ours:
            await self._note(running=True)

    async def end_on_io_error(self) -> None:
        """From now on an I/O error that stops the guest ends the work, too. Raises `GuestStateError` where one has."""
        self._ends_on_io_error = True
        self._judge(await run_state(self._source))

    def end(self, error: BlkmigError) -> None:
        """End the work for `error`."""
        self.error = error
        if self._work is not None:
            self._work.cancel()

    async def stand_down(self) -> None:
        """Watch no longer: from the handover on, the end of a QEMU is for `settle` to judge."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def explain(self, error: BlkmigError) -> BlkmigError:
        """The reason behind `error`, if a QEMU's end is, and comes to be known within a moment.

        The work has failed then: from now on it is not cancelled any more.
        """
        self._work = None
        if isinstance(error, ConnectionLost | DestinationFailed | CommandFailed):
            await asyncio.wait({self._task}, timeout=0.5)
        return self.error or error

    async def _watch(self) -> None:
        watches = [asyncio.create_task(self._watch_source()), asyncio.create_task(self._watch_watchdog())]
        if self._target is not None:
            watches.append(asyncio.create_task(self._watch_target(self._target)))
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            for watch in done:
                self.end(_as_ours(watch.exception()))
        finally:
            for watch in watches:
                watch.cancel()

    async def _watch_source(self) -> NoReturn:
        with self._source.events(*EVENTS) as events:
            try:
                await self._look()
                while True:
                    await self._consider(await events.get())
            except LibvirtGone:
                # The QEMU that it manages goes on.
                raise
            except ConnectionLost as error:
                raise GuestStateError("the source QEMU ended during the migration") from error

    async def _look(self) -> None:
        """How the guest is when the watch begins."""
        state = await run_state(self._source)
        if state in ENDED:
            raise GuestStateError(f"the guest {ENDED[state]} (run state {state})")
        if not self._pauses_are_ours and (state == "running" or state in STOPPED_BY_OTHERS):
            await self._note(running=state == "running")

    async def _consider(self, event: Event) -> None:
        if event.name == "SHUTDOWN":
            reason = event.data.get("reason", "unknown reason")
            raise GuestStateError(f"the guest was shut down during the migration ({reason})")
        if event.name == "GUEST_PANICKED":
            raise GuestStateError(f"the guest crashed during the migration (action {event.data.get('action')})")
        if not self._pauses_are_ours and not (self.resumes_are_libvirts and event.name == "RESUME"):
            await self._note_run_state(event.name)

    async def _note_run_state(self, event: str) -> None:
        if event == "RESUME":
            await self._note(running=True)
            return
        state = await run_state(self._source)
        if state in MIGRATED and not self._job.record.migrating:
            raise GuestStateError(f"somebody else migrates the guest away (run state {state})")
        self._judge(state)
        if state in STOPPED_BY_OTHERS:
            await self._note(running=False)

    def _judge(self, state: str) -> None:
        if self._ends_on_io_error and state == "io-error":
            raise GuestStateError("the guest was stopped by an I/O error, which ends it (--abort-on-error)")

    async def _note(self, *, running: bool) -> None:
        if self._job.record.was_running is not running:
            self._job.record.was_running = running
            await self._job.save()

    async def _watch_target(self, target: TargetQemu) -> NoReturn:
        await target.monitor.wait_lost()
        raise await target.describe(DestinationFailed("the destination QEMU ended before it had the guest"))

    async def _watch_watchdog(self) -> NoReturn:
        status = await self._watchdog.wait_ended()
        raise WatchdogGone(f"the watchdog of this job ended unexpectedly (status {status})")


def _as_ours(error: BaseException | None) -> BlkmigError:
    if isinstance(error, BlkmigError):
        return error
    log.error("defect", exc_info=error)
    return MigrationError(f"the guest could not be watched any more: {type(error).__name__}: {error}")
