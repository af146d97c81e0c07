"""Taking away what a migration of ours left in a QEMU, told by its name; nothing else is touched."""

from __future__ import annotations

import logging

from qemu_blkmig.errors import RequestError
from qemu_blkmig.qmp.clients import nobody_of_job_connected
from qemu_blkmig.qmp.exports import remove_export, stop_unused_server
from qemu_blkmig.qmp.monitor import CommandFailed, Monitor
from qemu_blkmig.qmp.tls import remove_objects
from qemu_blkmig.qmp.topology import bitmaps_by_node

log = logging.getLogger(__name__)

_CLIENTS = 15.0
"""Seconds that clients of the NBD server are given; without exports there is nothing for them to stay for."""


async def remove_all(monitor: Monitor, *, prefix: str, nbd_server_is_ours: bool) -> list[str]:
    """Remove every export, bitmap and TLS object whose name begins with `prefix`; return, in words, what was removed.

    The NBD server, which has no name, is stopped if the caller knows that it is ours, and unless others have exports
    on it. Idempotent. Raises `RequestError` when something could not be removed, and what `Monitor.execute` raises.
    """
    removed = await remove_server(monitor, prefix=prefix, nbd_server_is_ours=nbd_server_is_ours)
    return removed + await remove_bitmaps(monitor, prefix)


async def remove_server(monitor: Monitor, *, prefix: str, nbd_server_is_ours: bool) -> list[str]:
    """As `remove_all`, but bitmaps stay, and go on recording."""
    removed = await remove_exports(monitor, prefix)
    if nbd_server_is_ours:
        if not await nobody_of_job_connected(prefix, _CLIENTS):
            raise RequestError(f"{monitor.who}: its NBD server still has a client, and would wait for that if stopped")
        if await stop_unused_server(monitor):
            removed.append("the NBD server")
    removed += [f"the object {name}" for name in await remove_objects(monitor, prefix)]
    return removed


async def remove_exports(monitor: Monitor, prefix: str) -> list[str]:
    """Remove every export whose id begins with `prefix`; return, in words, what was removed."""
    exports = await monitor.execute("query-block-exports")
    names = [export["id"] for export in exports if export["id"].startswith(prefix)]
    return [f"the export {name}" for name in names if await remove_export(monitor, name)]


async def remove_bitmaps(monitor: Monitor, prefix: str) -> list[str]:
    """Remove every bitmap whose name begins with `prefix`, on whatever node; return, in words, what was removed.

    Raises `RequestError`, after all others have been removed, when one is in use.
    """
    removed = []
    for node, name in await _bitmaps(monitor, prefix):
        try:
            await monitor.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
            removed.append(f"the bitmap {name} on node {node}")
        except CommandFailed as error:
            # Its node may have gone meanwhile, and the bitmap with it; what is still there is told below.
            log.debug("%s", error)
    left = await _bitmaps(monitor, prefix)
    if left:
        told = ", ".join(f"{name} on node {node}" for node, name in left)
        raise RequestError(f"{monitor.who}: bitmaps that could not be removed: {told}")
    return removed


async def _bitmaps(monitor: Monitor, prefix: str) -> list[tuple[str, str]]:
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    return [
        (node, name) for node, bitmaps in bitmaps_by_node(nodes).items() for name in bitmaps if name.startswith(prefix)
    ]
