"""One attempt of libvirt's to migrate a domain, with our gate in its stream: begun, listened to, ended.

Until its gate is opened it can always be ended, and libvirt gives the guest back at the source by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from qemu_blkmig.destination.protocol import Domain as Named
from qemu_blkmig.destination.protocol import Expect
from qemu_blkmig.errors import BlkmigError, LibvirtFailed
from qemu_blkmig.job.arrangement import Arrangement
from qemu_blkmig.job.ends import Ends
from qemu_blkmig.job.gateway import Gateway, gateway
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.managed_options import ManagedOptions, name_for_tls, with_other_xml
from qemu_blkmig.qmp.guest import is_virtualized
from qemu_blkmig.qmp.monitor import EventStream
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.virt.connection import LibvirtError, libvirt
from qemu_blkmig.virt.gate import Gate
from qemu_blkmig.virt.migration import DomainMigration, Wish
from qemu_blkmig.virt.rehearsal import is_of_xml

BROKEN_OFF = 10.0
"""Seconds in which libvirt must have noticed that the stream was broken off, before it is told to call it off."""
ABORTED = 60.0
"""Seconds in which it must have ended it then."""


class Passage:
    """libvirt's migration under way. Made by `begin`; must be ended by `end`."""

    def __init__(
        self,
        migration: DomainMigration,
        gate: Gate,
        events: EventStream,
        ending: contextlib.AsyncExitStack,
        other_xml: str | None = None,
        *,
        found_running: bool = True,
    ) -> None:
        """`other_xml`: what to do where libvirt refuses the domain's XML; None: the next attempt has it made anew.

        `found_running`: whether the guest ran when it began. libvirt has it run at its end if so, whoever has paused it
        meanwhile, at the destination and when it gives it back (seen on 9.0).
        """
        self.migration = migration
        self.other_xml = other_xml
        self.found_running = found_running
        self.gate = gate
        self._events = events
        self._ending = ending

    @classmethod
    async def begin(
        cls,
        life: Lifecycle,
        options: ManagedOptions,
        ends: Ends,
        arrangement: Arrangement,
        attempt: int,
        *,
        live: bool,
    ) -> Passage:
        """Have libvirt begin, with the gate closed and nothing but the stream's first bytes let through.

        `attempt`: counts from 1; 0 is one that is begun beforehand. Without `live` libvirt pauses the guest at once.
        Raises `BlkmigError`.
        """
        name = options.dname or ends.domain.name
        expected = Expect(Named(name, ends.domain.uuid), dict(arrangement.paths), socket.gethostname())
        await life.agent.request(expected)
        async with contextlib.AsyncExitStack() as stack:
            way = await gateway(options, life.host, life.job.record.job, attempt)
            stack.callback(way.close)
            wish = await _wish(life, options, arrangement, way, live=live)
            events = stack.enter_context(life.source.events("MIGRATION"))
            gate = Gate(way.listener, way.connect)
            stack.push_async_callback(asyncio.to_thread, gate.close)
            found_running = life.job.record.was_running
            migration = await DomainMigration.begin(ends.source, ends.handle, ends.target, wish)
            other_xml = None if options.xml is None else with_other_xml(life.job.record.job)
            return cls(migration, gate, events, stack.pop_all(), other_xml, found_running=found_running)

    async def status(self) -> str:
        """What QEMU says next of its migration. Raises `LibvirtFailed` when libvirt has ended it."""
        event = asyncio.create_task(self._events.get())
        ended = asyncio.create_task(self.migration.failed())
        try:
            await asyncio.wait({event, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise not_migrated(ended.result(), self.other_xml)
            return str(event.result().data["status"])
        finally:
            for task in (event, ended):
                task.cancel()
                # Where both have come to an end nobody asks for the other's error.
                task.add_done_callback(lambda task: task.cancelled() or task.exception())

    @property
    def fit(self) -> bool:
        """Whether it goes on, as far as is known."""
        return not self.migration.ended and self.gate.failure is None

    async def end(self) -> None:
        """Unless libvirt has ended it, break its stream off, and wait until it has, though not for ever.

        Whether it has in the end is `migration.ended`.
        """
        if not self.migration.ended:
            self.gate.drop()
            with contextlib.suppress(TimeoutError):
                async with time_limit(BROKEN_OFF):
                    await self.migration.failed()
            if not self.migration.ended:
                with contextlib.suppress(TimeoutError):
                    async with time_limit(ABORTED):
                        await self.migration.abort()
                        await self.migration.failed()
        await self._ending.aclose()


def not_migrated(why: BlkmigError | None, other_xml: str | None) -> LibvirtFailed:
    """The error that tells that libvirt did not migrate the guest, with the advice `other_xml` if it refused that."""
    if isinstance(why, LibvirtError):
        failed = LibvirtFailed(f"libvirt, here or at the destination, could not migrate the guest: {why.words.strip()}")
        failed.aborted = why.code == libvirt().VIR_ERR_OPERATION_ABORTED
        failed.busy = why.code == libvirt().VIR_ERR_OPERATION_TIMEOUT
        if is_of_xml(why):
            failed.advice, failed.lasting = other_xml, True
        return failed
    return LibvirtFailed(f"libvirt could not migrate the guest: {why or 'it says that it has, too early'}")


async def _wish(life: Lifecycle, options: ManagedOptions, there: Arrangement, way: Gateway, *, live: bool) -> Wish:
    limit = life.steering.rate
    if limit is not None and not await is_virtualized(life.source):
        life.reporter.note("--bandwidth does not limit RAM here: QEMU may damage an emulated (TCG) guest that way")
        limit = None
    return Wish(
        uri=way.uri,
        xml=there.xml,
        persistent_xml=there.persistent_xml,
        name=options.dname,
        live=live,
        peer_to_peer=options.peer_to_peer,
        persistent=options.persistent,
        undefine_source=options.undefine_source,
        suspend=options.suspend,
        abort_on_error=options.abort_on_error,
        auto_converge=options.auto_converge,
        auto_converge_initial=options.auto_converge_initial,
        auto_converge_increment=options.auto_converge_increment,
        graphics_uri=options.graphics_uri,
        tls=options.tls,
        tls_destination=name_for_tls(options) if options.tls else None,
        listen_address=options.listen_address,
        bandwidth=limit,
    )
