"""The migration of RAM and device state, which QEMU does itself; ours is when it may switch over.

With pause-before-switchover QEMU stops in `pre-switchover`, the guest paused and its disks still active, until
`migrate-continue` (FACTS.md, "Plain QEMU").
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from qemu_blkmig.errors import BlkmigError, ConnectionLost, DestinationFailed, MigrationError, RequestError
from qemu_blkmig.qmp.channel import Channel, SocketPair
from qemu_blkmig.qmp.foreign_bitmaps import Carried
from qemu_blkmig.qmp.guest import UNDER_WAY, run_state
from qemu_blkmig.qmp.monitor import CommandFailed, Event, EventStream, Monitor
from qemu_blkmig.time_limit import time_limit

log = logging.getLogger(__name__)

_CAPABILITIES = {"pause-before-switchover": True, "events": True, "return-path": True}
_BITMAPS, _MAPPING = "dirty-bitmaps", "block-bitmap-mapping"
_UNFIT = {
    "multifd": "it needs several connections",
    "postcopy-ram": "with postcopy neither side has the whole guest for a while, so no failure could be undone",
    "postcopy-preempt": "with postcopy neither side has the whole guest for a while, so no failure could be undone",
    "mapped-ram": "it writes into files only",
    "rdma-pin-all": "there is no RDMA",
    "background-snapshot": "it saves the guest of a past moment, whose disks are not those of the switchover",
    "x-ignore-shared": "it leaves out RAM that is shared, as if both QEMUs had the same",
    "x-colo": "with it two QEMUs run the guest",
    "block": "with it QEMU copies the disks, too",
    "zero-copy-send": "it needs a TCP connection of QEMU's own",
}
"""Capabilities of QEMU's migration that cannot be used over the one connection that we make, and why."""
_PARAMETERS = ("downtime-limit", "max-bandwidth")
_UNLIMITED = 1 << 40
"""Bytes a second; QEMU's own default of 128 MiB/s is a limit, and it knows no value for none."""
_POLL = 0.01
_MOMENT = 0.2
_END_LIMIT = 1.0
"""Seconds in which a destination QEMU ends that could not take the guest."""
_CANCEL_LIMIT = 30.0
_RESTORE_LIMIT = 3.0
"""Seconds for each of a user's settings to be put back: a guest may be waiting."""
_ENDED = {"none", "completed", "failed", "cancelled"}


class RamMigration:
    """One migration of RAM from one QEMU to another that waits with `-incoming defer`.

    In order: start, wait_paused, then proceed and wait_completed, or cancel, which is possible until proceed.
    """

    def __init__(
        self,
        source: Monitor,
        destination: Monitor,
        carried: Sequence[Carried] = (),
        channel: Channel | None = None,
    ) -> None:
        """Nothing happens before `start`. `carried`: dirty bitmaps of others that are to go with it.

        `channel`: the way that it takes; None: both QEMUs are on this host.
        """
        self._carried = carried
        self._channel = channel or SocketPair()
        self._source = source
        self._destination = destination
        self._subscriptions = contextlib.ExitStack()
        self._before: dict[Monitor, tuple[list[dict[str, Any]], dict[str, Any]]] = {}
        self.begun = False
        """Whether a migration may be under way that is ours."""
        self.paused_at: float | None = None
        """When QEMU stopped the guest, by the source's wall clock, seconds; None if it has not, or it was paused."""

    async def start(self, *, downtime: float, bandwidth: int | None) -> None:
        """Start, with QEMU's downtime limit in seconds, and bytes a second at most; None: no limit.

        Raises `RequestError` when one of the QEMUs refuses, `ConnectionLost`.
        """
        self._from_source = self._subscribe(self._source, "MIGRATION", "STOP")
        self._from_destination = self._subscribe(self._destination, "MIGRATION")
        try:
            await self._configure(downtime, bandwidth)
            await self._connect()
        except BaseException:
            await self._restore_settings()
            raise

    async def wait_set_up(self) -> None:
        """Return when RAM is sent, or all is over: until then QEMU wants the bitmaps that it carries for itself alone.

        Raises `ConnectionLost`, `DestinationFailed`. What `wait_paused` waits for is left for it.
        """
        with self._source.events("MIGRATION") as events:
            while await self.status() in ("none", "setup"):
                await self._next(events)

    async def wait_paused(self) -> None:
        """Return when the guest is paused and the switchover waits for `proceed`.

        Raises `MigrationError` when the migration failed or was cancelled, `DestinationFailed`, `ConnectionLost`.
        """
        await self._wait_source("pre-switchover")

    async def adjust(self, *, downtime: float, bandwidth: int | None) -> None:
        """Set QEMU's downtime limit (seconds) and bandwidth (bytes a second; None: no limit) while it migrates."""
        await self._set_parameters(self._source, _limits(downtime, bandwidth))

    async def allow(self, downtime: float) -> None:
        """Set QEMU's downtime limit alone (seconds) while it migrates."""
        await self._set_parameters(self._source, {"downtime-limit": _milliseconds(downtime)})

    async def proceed(self) -> None:
        """Let the switchover go on from where `wait_paused` saw it; it cannot be cancelled any more."""
        await self._source.execute("migrate-continue", {"state": "pre-switchover"})

    async def wait_completed(self) -> None:
        """Return when both QEMUs say that the migration is complete.

        That does not prove that the destination could activate its disks (FACTS.md, "Telling success from failure").
        Raises what `wait_paused` raises.
        """
        await self._wait_source("completed")
        status = await self._migration(self._destination)
        while status.get("status") != "completed":
            if status.get("status") == "failed":
                raise DestinationFailed(f"the destination QEMU could not load the guest: {_reason(status)}")
            await self._next(self._from_destination)
            status = await self._migration(self._destination)
        await self._restore_settings()

    async def cancel(self) -> None:
        """Cancel, and return when the source guest is in its own hands again: running, if it was before.

        Nothing happens unless `start` came as far as to start it: another one is not ours to cancel. Raises
        `RequestError` when it is too late: the migration has completed.
        """
        if not self.begun:
            return
        await cancel_migration(self._source)
        await self._restore_settings()
        if await self.status() == "completed":
            raise RequestError("the migration could not be cancelled: it has completed")

    async def status(self) -> str:
        """QEMU's word for where the migration stands ("none", "active", "pre-switchover", ...), at the source."""
        return str((await self._migration(self._source)).get("status", "none"))

    async def passes(self) -> int:
        """How many times the source QEMU has gone over RAM (query-migrate, dirty-sync-count)."""
        return int((await self._migration(self._source)).get("ram", {}).get("dirty-sync-count", 0))

    def _subscribe(self, monitor: Monitor, *names: str) -> EventStream:
        return self._subscriptions.enter_context(monitor.events(*names))

    async def _configure(self, downtime: float, bandwidth: int | None) -> None:
        for monitor in (self._source, self._destination):
            self._before[monitor] = (
                await monitor.execute("query-migrate-capabilities"),
                await monitor.execute("query-migrate-parameters"),
            )
            switches = _switches(_CAPABILITIES | {_BITMAPS: bool(self._carried)})
            await monitor.execute("migrate-set-capabilities", {"capabilities": switches})
            if self._carried:
                arriving = monitor is self._destination
                mapping = [each.mapping(arriving=arriving) for each in self._carried]
                await self._set_parameters(monitor, {_MAPPING: mapping})
        await self._set_parameters(self._source, _limits(downtime, bandwidth))

    async def _connect(self) -> None:
        uri = await self._channel.open(self._source, self._destination)
        self.begun = True
        try:
            await self._source.execute("migrate", {"uri": uri})
        except CommandFailed:
            self.begun = False
            await self._let_another_pass()
            raise

    async def _let_another_pass(self) -> None:
        """A migration of somebody else's that began between our settings and ours has them, and stops where ours would.

        QEMU takes no capabilities back while it migrates, so it is let go on where it stops.
        """
        capabilities, parameters = self._before[self._source]
        if {"capability": "pause-before-switchover", "state": True} in capabilities:
            return
        await self._set_parameters(self._source, {name: parameters[name] for name in _PARAMETERS})
        log.warning("somebody else migrates the guest away; that has our settings, and is seen to its end")
        while (status := await self.status()) in UNDER_WAY:
            if status == "pre-switchover":
                with contextlib.suppress(CommandFailed):
                    await self._source.execute("migrate-continue", {"state": status})
            await asyncio.sleep(_MOMENT)

    async def _wait_source(self, wanted: str) -> None:
        while True:
            event = await self._next(self._from_source)
            if event.name == "STOP":
                self.paused_at = event.seconds
                continue
            status = event.data["status"]
            if status == wanted:
                return
            if status in _ENDED:
                raise await self._failure(status)

    async def _next(self, stream: EventStream) -> Event:
        """The stream's next event, unless a QEMU is gone before it comes."""
        arrival = asyncio.ensure_future(stream.get())
        loss = asyncio.ensure_future(self._destination.wait_lost())
        try:
            await asyncio.wait((arrival, loss), return_when=asyncio.FIRST_COMPLETED)
            # A destination also ends because the source has: that tells it in a moment.
            await asyncio.wait((arrival,), timeout=_MOMENT)
            if arrival.done():
                return arrival.result()
        finally:
            arrival.cancel()
            loss.cancel()
        raise DestinationFailed("the destination QEMU is gone: it exited, or its QMP connection broke")

    async def _failure(self, status: str) -> BlkmigError:
        reason = _reason(await self._migration(self._source))
        if status == "failed":
            # A destination that cannot take the guest ends over it, and says why; the source sees a broken socket.
            with contextlib.suppress(TimeoutError):
                async with time_limit(_END_LIMIT):
                    await self._destination.wait_lost()
        if self._destination.lost:
            return DestinationFailed(f"the destination QEMU is gone, before all had arrived (source QEMU: {reason})")
        return MigrationError(f"the migration of RAM was ended by the source QEMU ({status}): {reason}")

    async def _migration(self, monitor: Monitor) -> dict[str, Any]:
        return dict(await monitor.execute("query-migrate"))

    async def _set_parameters(self, monitor: Monitor, parameters: dict[str, object]) -> None:
        await monitor.execute("migrate-set-parameters", parameters)

    async def _restore_settings(self) -> None:
        """Put back what users of these QEMUs had set, where that still can be done."""
        self._subscriptions.close()
        for monitor, (capabilities, parameters) in self._before.items():
            ours = {*_CAPABILITIES, _BITMAPS}
            before = {c["capability"]: c["state"] for c in capabilities if c["capability"] in ours}
            try:
                switches = {"capabilities": _switches(before)}
                await monitor.execute("migrate-set-capabilities", switches, timeout=_RESTORE_LIMIT)
                # A mapping cannot be unset: where there was none, ours stays, which names nothing any more.
                names = [name for name in (*_PARAMETERS, _MAPPING) if name in parameters]
                settings = {name: parameters[name] for name in names}
                await monitor.execute("migrate-set-parameters", settings, timeout=_RESTORE_LIMIT)
            except (RequestError, ConnectionLost) as error:
                log.debug("settings not restored: %s", error)
        self._before.clear()


async def unfit_capabilities(monitor: Monitor) -> list[str]:
    """Capabilities that somebody has set and that make RAM's migration over our connection impossible, in words."""
    capabilities = await monitor.execute("query-migrate-capabilities")
    names = [each["capability"] for each in capabilities if each["state"] and each["capability"] in _UNFIT]
    return [
        f"{monitor.who}: the migration capability {name} is set: {_UNFIT[name]}; switch it off "
        "(QMP command migrate-set-capabilities)"
        for name in names
    ]


async def cancel_migration(monitor: Monitor) -> None:
    """Cancel whatever migration a source QEMU has under way; return when its guest is its own again.

    Safe to call when there is none. Raises `RequestError` when that takes more than half a minute.
    """
    await monitor.execute("migrate_cancel")
    try:
        async with time_limit(_CANCEL_LIMIT):
            # No event tells when the guest is its own again.
            while await _is_cancelling(monitor):  # noqa: ASYNC110
                await asyncio.sleep(_POLL)
    except TimeoutError:
        raise RequestError(f"{monitor.who} did not cancel the migration within {_CANCEL_LIMIT:g} s") from None


async def _is_cancelling(monitor: Monitor) -> bool:
    status = (await monitor.execute("query-migrate")).get("status", "none")
    paused = await run_state(monitor) == "finish-migrate"
    if status == "cancelling" and paused:
        # A cancellation that comes just before pre-switchover leaves QEMU's migration thread waiting there, and the
        # guest paused for ever (seen on 7.2.22): wake it, in the very state that it is in.
        with contextlib.suppress(CommandFailed):
            await monitor.execute("migrate-continue", {"state": "cancelling"})
    return paused or status not in _ENDED


def _switches(states: dict[str, bool]) -> list[dict[str, object]]:
    return [{"capability": name, "state": state} for name, state in states.items()]


def _limits(downtime: float, bandwidth: int | None) -> dict[str, object]:
    return {"downtime-limit": _milliseconds(downtime), "max-bandwidth": bandwidth or _UNLIMITED}


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _reason(migration: dict[str, Any]) -> str:
    return str(migration.get("error-desc", "it gave no reason"))
