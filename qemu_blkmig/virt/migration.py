"""libvirt's own migration of a domain, one call (virDomainMigrate3), made in a thread; it knows nothing of disks.

The domain's QEMU is told to send its stream to `uri`, where a gate listens; the destination's listens behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from qemu_blkmig.engine.outlast import only_wait
from qemu_blkmig.errors import BlkmigError, ConnectionLost
from qemu_blkmig.virt.connection import Connection, LibvirtError, libvirt


@dataclass(frozen=True)
class Wish:
    """How a domain is to be migrated, in the terms of `virsh migrate`.

    `uri`: where the source's QEMU connects to, and, but for its host, where the destination's listens. `bandwidth`:
    of RAM, bytes a second (None: no limit). `tls_destination`: the name in the destination's certificate. `offline`:
    the domain does not run, and is defined there as `xml` says (libvirt 9.0 takes no heed of `persistent_xml` then).
    """

    uri: str | None
    xml: str
    persistent_xml: str | None = None
    name: str | None = None
    live: bool = True
    offline: bool = False
    peer_to_peer: bool = False
    persistent: bool = False
    undefine_source: bool = False
    suspend: bool = False
    auto_converge: bool = False
    auto_converge_initial: int | None = None
    auto_converge_increment: int | None = None
    graphics_uri: str | None = None
    abort_on_error: bool = False
    tls: bool = False
    tls_destination: str | None = None
    listen_address: str | None = None
    bandwidth: int | None = None

    def flags(self) -> int:
        """virDomainMigrateFlags. The disks are ours, which libvirt can't know: hence UNSAFE."""
        module = libvirt()
        chosen = {
            module.VIR_MIGRATE_LIVE: self.live and not self.offline,
            module.VIR_MIGRATE_OFFLINE: self.offline,
            module.VIR_MIGRATE_PEER2PEER: self.peer_to_peer,
            module.VIR_MIGRATE_PERSIST_DEST: self.persistent,
            module.VIR_MIGRATE_UNDEFINE_SOURCE: self.undefine_source,
            module.VIR_MIGRATE_PAUSED: self.suspend,
            module.VIR_MIGRATE_AUTO_CONVERGE: self.auto_converge,
            module.VIR_MIGRATE_TLS: self.tls,
            module.VIR_MIGRATE_ABORT_ON_ERROR: self.abort_on_error,
            module.VIR_MIGRATE_CHANGE_PROTECTION: not self.offline,
            module.VIR_MIGRATE_UNSAFE: True,
        }
        return sum(flag for flag, wanted in chosen.items() if wanted)

    def parameters(self) -> dict[str, Any]:
        """Typed parameters of virDomainMigrate3."""
        module = libvirt()
        chosen = {
            module.VIR_MIGRATE_PARAM_URI: self.uri,
            module.VIR_MIGRATE_PARAM_DEST_XML: self.xml,
            module.VIR_MIGRATE_PARAM_PERSIST_XML: self.persistent_xml,
            module.VIR_MIGRATE_PARAM_DEST_NAME: self.name,
            module.VIR_MIGRATE_PARAM_LISTEN_ADDRESS: self.listen_address,
            module.VIR_MIGRATE_PARAM_AUTO_CONVERGE_INITIAL: self.auto_converge_initial,
            module.VIR_MIGRATE_PARAM_AUTO_CONVERGE_INCREMENT: self.auto_converge_increment,
            module.VIR_MIGRATE_PARAM_GRAPHICS_URI: self.graphics_uri,
            module.VIR_MIGRATE_PARAM_TLS_DESTINATION: self.tls_destination,
            # MiB a second; 0 would be no limit.
            module.VIR_MIGRATE_PARAM_BANDWIDTH: None if self.bandwidth is None else max(1, self.bandwidth >> 20),
        }
        return {name: value for name, value in chosen.items() if value is not None}


async def asked_for(source: Connection, domain: Any, target: Connection, wish: Wish) -> None:
    """libvirt's call, to its end: by this process's connection to `target`, or by one that the source's libvirt makes
    itself. Raises as `Connection.call` does.
    """
    flags, parameters = wish.flags(), wish.parameters()
    if wish.peer_to_peer:
        await source.call(domain.migrateToURI3, target.uri, parameters, flags)
    else:
        await source.call(domain.migrate3, target.handle, parameters, flags)


async def is_migrated(source: Connection, domain: Any) -> bool:
    """Whether a migration away is what libvirt does with it now, and not a backup, say. Raises as `call` does."""
    module = libvirt()
    told = await source.call(domain.jobStats)
    under_way = told.get("type", module.VIR_DOMAIN_JOB_NONE) != module.VIR_DOMAIN_JOB_NONE
    operation = told.get(module.VIR_DOMAIN_JOB_OPERATION)
    return bool(under_way and operation == module.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)


class DomainMigration:
    """A migration of `domain` under way; libvirt's two daemons do it, or undo it, together."""

    def __init__(self, source: Connection, domain: Any, work: Coroutine[Any, Any, None]) -> None:
        """Use `begin`."""
        self._source = source
        self._domain = domain
        self._task: asyncio.Task[None] = asyncio.create_task(work)
        # Whoever waits for it is told; nobody may.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    @classmethod
    async def begin(cls, source: Connection, domain: Any, target: Connection, wish: Wish) -> DomainMigration:
        """Begin it, over a connection of its own to the source's libvirt. Raises `Refused`, and as `call` does."""
        own = await Connection.open(source.uri, source.who)
        try:
            same = await own.domain(domain.UUIDString())
        except BaseException:
            await own.close()
            raise
        return cls(source, domain, _migrate(own, same, target, wish))

    @property
    def ended(self) -> bool:
        """Whether libvirt has come to an end with it, either way."""
        return self._task.done()

    async def wait(self) -> None:
        """Return when the guest is the destination's; cancelled, only the wait ends. Raises as `call` does."""
        await only_wait(self._task)

    async def failed(self) -> BlkmigError | None:
        """Wait for its end; why it failed, or None when the guest is the destination's."""
        try:
            await self.wait()
        except (LibvirtError, ConnectionLost) as error:
            return error
        return None

    async def abort(self) -> None:
        """Tell libvirt to call it off; `failed` tells what came of it.

        One that has to wait until a backup is over, half a minute at most, does not have that aborted.
        """
        if not self.ended:
            with contextlib.suppress(LibvirtError, ConnectionLost):
                if await is_migrated(self._source, self._domain):
                    await self._source.call(self._domain.abortJob)

    async def passes(self) -> int:
        """How often RAM has been passed over."""
        with contextlib.suppress(LibvirtError):
            statistics = await self._source.call(self._domain.jobStats)
            return int(statistics.get(libvirt().VIR_DOMAIN_JOB_MEMORY_ITERATION, 0))
        return 0


async def _migrate(own: Connection, domain: Any, target: Connection, wish: Wish) -> None:
    try:
        await asked_for(own, domain, target, wish)
    finally:
        await own.close()


@contextlib.asynccontextmanager
async def starts_of(
    connection: Connection, uuid: str, now: Callable[[], float]
) -> AsyncIterator[Callable[[], float | None]]:
    """Listen for the domain of this UUID to start to run; what is given tells when, by `now`, or None."""
    module, loop = libvirt(), asyncio.get_running_loop()
    started: list[float] = []

    def on_event(_handle: Any, domain: Any, event: int, _detail: int, _opaque: Any) -> None:
        if event == module.VIR_DOMAIN_EVENT_RESUMED and domain.UUIDString() == uuid:
            loop.call_soon_threadsafe(lambda: started.append(now()))

    number = await connection.call(
        connection.handle.domainEventRegisterAny, None, module.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_event, None
    )
    try:
        yield lambda: started[0] if started else None
    finally:
        with contextlib.suppress(LibvirtError, ConnectionLost):
            await connection.call(connection.handle.domainEventDeregisterAny, number)
