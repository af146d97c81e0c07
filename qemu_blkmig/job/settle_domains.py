"""A domain of libvirt's is brought to rest, by the job's record and by what libvirt says of it on both hosts.

What makes it safe: while the gate is closed nothing can start the guest at the destination, and libvirt gives it back
at the source when the stream breaks off. Once it was opened, libvirt's own protocol decides (docs/decisions/024): the
destination has the guest when libvirt there has finished; a domain there that still waits for that is destroyed before
the guest may run at the source.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from qemu_blkmig.destination import migration_sockets
from qemu_blkmig.destination.files import boot_id
from qemu_blkmig.errors import BlkmigError, ConnectionLost, Refused
from qemu_blkmig.job.peers import HostUnreachable, Unreachable, until
from qemu_blkmig.job.record import Job, Managed, Owner
from qemu_blkmig.job.settlement import Settlement, clean_source, give_back_limits
from qemu_blkmig.job.volumes import forget_volumes
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.virt.connection import Connection, LibvirtError, libvirt, virsh
from qemu_blkmig.virt.migration import is_migrated
from qemu_blkmig.virt.monitor import PassthroughMonitor
from qemu_blkmig.virt.storage import refresh_pools

log = logging.getLogger(__name__)

SETTLE = 20.0
"""Seconds in which libvirt's own migration must come to an end, one way or the other."""
AGAIN = 0.5
"""Seconds between two attempts to reach it."""
REACH = 15.0
"""Seconds in which a libvirt must answer."""


class _State:
    """What libvirt says of a domain: virDomainState and its reason; None where it does not run there."""

    def __init__(self, told: tuple[int, int] | None) -> None:
        module = libvirt()
        state, reason = told or (None, None)
        self.known = told is not None
        self.active = self.known and state != module.VIR_DOMAIN_SHUTOFF
        self.moved_away = told == (module.VIR_DOMAIN_SHUTOFF, module.VIR_DOMAIN_SHUTOFF_MIGRATED)
        self.forgotten = told in (None, (module.VIR_DOMAIN_SHUTOFF, module.VIR_DOMAIN_SHUTOFF_UNKNOWN))
        """Whether libvirt does not know why it is off, as after a restart of its own, or not even the domain."""
        self.crashed = state == module.VIR_DOMAIN_CRASHED
        """Its QEMU is still there, with all its disks (on_crash), if only until libvirt has ended it, or reset it."""
        self.paused = state == module.VIR_DOMAIN_PAUSED
        self.by_migration = self.paused and reason == module.VIR_DOMAIN_PAUSED_MIGRATION
        self.runs = self.active and not self.paused and not self.crashed
        self.let_go_on = told == (module.VIR_DOMAIN_RUNNING, module.VIR_DOMAIN_RUNNING_MIGRATION_CANCELED)
        """Whether libvirt itself has it run since a migration of it came to nothing, and nobody has told it to."""

    @property
    def arrived(self) -> bool:
        """At the destination: whether libvirt has finished with its migration, so that the guest is there."""
        return self.active and not self.by_migration


class Domains:
    """See `Sides`. `is_off`: a person says that the destination host is, or that the guest runs there no more.
    `long_after`: see `settle`.

    `lent`: connections to both libvirts that are known to be sound, and stay; without them they are reached anew.
    """

    def __init__(
        self,
        job: Job,
        managed: Managed,
        *,
        is_off: bool,
        long_after: bool = False,
        lent: tuple[Connection, Connection] | None = None,
    ) -> None:
        self._job = job
        self._managed = managed
        self._is_off = is_off
        self._long_after = long_after
        self._lent: tuple[Connection, ...] = lent or ()
        self._near_end: Connection | None = lent[0] if lent else None
        self._far_end: Connection | None = lent[1] if lent else None

    async def decide(self, settlement: Settlement) -> Owner:
        """See `Sides`."""
        try:
            far = await self._far()
        except HostUnreachable:
            if self._is_off and (await self._state(await self._near())).active:
                return Owner.SOURCE
            raise
        near = await self._near()
        await self._let_migration_end(near)

        async def known() -> bool:
            return not (await self._state(far)).by_migration

        await until(known, SETTLE)
        there = await self._state(far)
        if there.arrived:
            return Owner.DESTINATION
        if not (await self._state(near)).active:
            # libvirt ends it here only once it is finished there.
            return Owner.DESTINATION
        if there.active and not await self._destroy(far):
            settlement.facts.append("the domain at the destination waits for its migration and could not be destroyed")
            settlement.unreachable = self._by_hand()
            return Owner.UNDECIDED
        return Owner.SOURCE

    async def return_to_source(self, settlement: Settlement) -> None:
        """See `Sides`."""
        near, ended = await self._near(), True
        if self._job.record.migrating:
            ended = await self._let_migration_end(near)
            await self._destroy_what_waits()
        state = await self._state(near)
        if not state.active:
            settlement.suspended = False
            settlement.facts.append("the domain does not run at the source any more")
            settlement.moved = state.forgotten and self._long_after
            unsure = state.forgotten and self._job.left and not settlement.moved
            settlement.taken = state.moved_away or unsure or (await self._state(await self._far())).known
            if settlement.taken:
                settlement.facts.append("somebody else may have moved it away: then what it wrote since is there alone")
            elif not settlement.moved:
                settlement.facts.append("its disks hold all that it wrote")
            return
        record = self._job.record
        ours = state.by_migration or (state.paused and record.told_to_pause)
        if record.run_state_taken and record.was_running and ours:
            await near.call((await self._domain(near)).resume)
            state = await self._state(near)
        elif record.migrating and not record.was_running and state.let_go_on and not self._long_after:
            # Somebody had paused it (see `Guard`).
            await near.call((await self._domain(near)).suspend)
            state = await self._state(near)
        elif not ended and not record.was_running and state.paused:
            settlement.decided = False
            settlement.facts.append("libvirt has not ended its migration, and may let the paused guest go on then")
        how = "runs at the source" if state.runs else f"is at the source, {'paused' if state.paused else 'crashed'}"
        settlement.facts.append(f"the guest {how}")
        monitor = await PassthroughMonitor.connect(near, await self._domain(near), "source QEMU")
        try:
            await give_back_limits(self._job, monitor, settlement)
            await clean_source(self._job, monitor, settlement)
        finally:
            await monitor.close()

    async def leave_to_destination(self, settlement: Settlement) -> None:
        """See `Sides`."""
        unreachable = None
        state = _State(None)
        try:
            state = await self._state(await self._far())
            settlement.ended = not state.active
        except HostUnreachable as error:
            settlement.decided, settlement.left_there = False, True
            unreachable = f"{error}; the records of its images, and our sockets, are still to be put in order there"
        if settlement.ended:
            settlement.facts.append("the guest was handed over, and its domain has ended there since")
        else:
            how = "is paused" if state.paused else "has crashed" if state.crashed else "runs"
            settlement.facts.append(f"the guest {how} at the destination")
        settlement.facts += [unreachable] if unreachable else []
        await self._end_at_source(settlement)

    async def _end_at_source(self, settlement: Settlement) -> None:
        """libvirt has ended it here, unless its client died just then: then it is left paused."""
        near = await self._near()
        state = await self._state(near)
        if not state.active:
            return
        ours = await self._is_as_it_was(near)
        if settlement.ended and not ours:
            settlement.returned = True
            settlement.facts.append("it was started at the source again, or came back, since: it was left alone")
            return
        if state.paused and ours and await self._destroy(near):
            if self._managed.options.undefine_source:
                await near.call((await self._domain(near)).undefine)
            return
        settlement.decided = settlement.left_there = False
        settlement.facts.append("the domain is still there at the source; never resume it: it would run twice")
        settlement.unreachable = self._by_hand()

    async def _is_as_it_was(self, near: Connection) -> bool:
        """Whether the domain that is active here is the one that was handed over, not started anew since."""
        known = self._managed
        if known.number is None:
            return True
        return known.booted == boot_id() and known.number == await near.call((await self._domain(near)).ID)

    async def images_are_gone(self, settlement: Settlement) -> None:
        """See `Sides`."""
        if self._job.record.volumes:
            settlement.facts += await forget_volumes(await self._far(), self._job)

    async def source_images_went(self, settlement: Settlement) -> None:
        """See `Sides`."""
        try:
            await refresh_pools(await self._near(), [image.path for image in self._job.record.moving])
        except BlkmigError as error:
            settlement.facts.append(f"the source's pools may still list the images (virsh pool-refresh): {error}")

    async def source_is_over(self) -> bool:
        """See `Sides`."""
        return not (await self._state(await self._near())).active

    async def close(self) -> None:
        """See `Sides`."""
        migration_sockets.remove(self._job.record.job)
        for connection in (self._near_end, self._far_end):
            if connection is not None and connection not in self._lent:
                await connection.close()

    async def _near(self) -> Connection:
        if self._near_end is None:
            try:
                self._near_end = await _open(self._managed.options.source_uri, "the source's libvirt")
            except BlkmigError as error:
                raise Unreachable(str(error)) from error
        return self._near_end

    async def _far(self) -> Connection:
        """Raises `HostUnreachable`."""
        if self._far_end is None:
            try:
                self._far_end = await _open(self._managed.options.target_uri, "the destination's libvirt")
            except BlkmigError as error:
                raise HostUnreachable(str(error)) from error
        return self._far_end

    async def _domain(self, connection: Connection) -> Any:
        return await connection.call(connection.handle.lookupByUUIDString, self._managed.uuid)

    async def _state(self, connection: Connection) -> _State:
        """Raises `Unreachable`, of the destination `HostUnreachable`: libvirt answers nobody who asks for a domain that
        a hook keeps from starting (seen on 9.0), and its calls come one after another.
        """
        try:
            async with time_limit(REACH):
                state, reason = await connection.call((await self._domain(connection)).state)
        except TimeoutError:
            silent = f"{connection.who} did not tell within {REACH:.0f} s how the domain is"
            if connection is self._far_end:
                self._far_end = None
                raise HostUnreachable(silent) from None
            self._near_end = None
            raise Unreachable(silent) from None
        except LibvirtError as error:
            if error.code == libvirt().VIR_ERR_NO_DOMAIN:
                return _State(None)
            raise
        return _State((state, reason))

    async def _let_migration_end(self, near: Connection) -> bool:
        """Wait until libvirt has ended its migration here; one that does not end is called off. Whether it has."""

        async def ended() -> bool:
            try:
                return not await is_migrated(near, await self._domain(near))
            except LibvirtError:
                # It has gone with the domain.
                return True

        if await until(ended, SETTLE):
            return True
        try:
            await near.call((await self._domain(near)).abortJob)
        except LibvirtError as error:
            log.warning("%s", error)
        return await until(ended, SETTLE)

    async def _destroy_what_waits(self) -> None:
        """A domain at the destination that still waits for a stream which has broken off; libvirt does it, too."""
        try:
            far = await self._far()
            if (await self._state(far)).by_migration:
                await self._destroy(far)
        except BlkmigError as error:
            log.warning("%s", error)

    async def _destroy(self, connection: Connection) -> bool:
        """True when it is gone."""
        try:
            await connection.call((await self._domain(connection)).destroy)
        except LibvirtError as error:
            log.warning("%s", error)

        async def gone() -> bool:
            return not (await self._state(connection)).active

        return await until(gone, SETTLE)

    def _by_hand(self) -> str:
        options, managed = self._managed.options, self._managed
        here = virsh(options.source_uri, "domstate", managed.name, "--reason")
        there = virsh(options.target_uri, "domstate", managed.name_there, "--reason")
        return (
            f"look at both: {here}; {there}; destroy the one that is not to have the guest, then run: "
            f"qemu-blkmig cleanup {self._job.record.job}"
        )


async def _open(uri: str | None, who: str) -> Connection:
    """Connect; a daemon that is just being restarted is waited for. Raises `BlkmigError`."""
    refused: BlkmigError = Refused(f"{who} did not answer within {REACH:.0f} s")
    try:
        async with time_limit(REACH):
            while True:
                try:
                    return await Connection.open(uri, who)
                except (Refused, ConnectionLost) as error:
                    refused = error
                await asyncio.sleep(AGAIN)
    except TimeoutError:
        raise refused from None
