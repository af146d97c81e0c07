"""The NBD exports through which the source's disks are read.

A QEMU has one NBD server, without a name: libvirt's backups and storage migrations use it too, and stopping it drops
everybody's exports. So one that already runs is not ours, and ours is stopped only when no other export is left.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec

from qemu_blkmig.errors import Refused, RequestError
from qemu_blkmig.nbd.address import Address, TcpAddress, UnixAddress, address_of
from qemu_blkmig.qmp.clients import nobody_connected
from qemu_blkmig.qmp.features import probe
from qemu_blkmig.qmp.monitor import CommandFailed, Monitor
from qemu_blkmig.qmp.tls import remove_objects

log = logging.getLogger(__name__)

_BACKLOG = 64
_MOMENT = 0.2
_DELETION_LIMIT = 30.0
_SOCKET_NAME = "blkmig-nbd"


class ExportServer:
    """The NBD server of one QEMU, on a socket that we make, and our exports on it."""

    def __init__(self, monitor: Monitor, where: str | Path | Address, credentials: str | None = None) -> None:
        """`where` clients connect: the path of a unix socket, or a TCP address, of which port 0 means any that is free.

        The path must not exist, and its directory must be private (mode 0700). `credentials`: the QEMU's object that
        TLS is done with (`qmp.tls`); it is removed with the server.
        """
        self.address = address_of(where)
        self._credentials = credentials
        self._monitor = monitor
        self._started = False
        self._allow_inactive = False
        self._ours: set[str] = set()

    async def start(self) -> None:
        """Make the listening socket and start the server on it.

        QEMU gets the socket itself, so a confined one needs no access to the path (FACTS.md). Raises `Refused` when
        an NBD server runs already, or when the socket cannot be made.
        """
        self._allow_inactive = (await probe(self._monitor)).allow_inactive
        with self._listen() as listener:
            try:
                await self._monitor.pass_fd(listener.fileno(), _SOCKET_NAME)
                await self._start_server()
                self._started = True
            except BaseException:
                self._unlink()
                raise

    def _listen(self) -> socket.socket:
        address = self.address
        listener = socket.socket(_family(address), socket.SOCK_STREAM)
        if isinstance(address, TcpAddress):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # The port that a firewall lets in is used for one job after the other.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address.path if isinstance(address, UnixAddress) else (address.host, address.port))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise Refused(f"cannot listen on {address}: {error.strerror or error}") from error
        if isinstance(address, TcpAddress):
            self.address = msgspec.structs.replace(address, port=listener.getsockname()[1])
        return listener

    def _unlink(self) -> None:
        if isinstance(self.address, UnixAddress):
            Path(self.address.path).unlink(missing_ok=True)

    async def _start_server(self) -> None:
        arguments: dict[str, object] = {"addr": {"type": "fd", "data": {"str": _SOCKET_NAME}}}
        if self._credentials is not None:
            arguments["tls-creds"] = self._credentials
        try:
            await self._monitor.execute("nbd-server-start", arguments)
        except CommandFailed as error:
            await self._forget_descriptor()
            raise Refused(
                f"{self._monitor.who}: {error.description}: a QEMU has only one, and this one is somebody else's "
                "(a backup or a storage migration by libvirt, perhaps)",
                advice="wait until that has ended; if nothing uses it any more, stop it with the QMP command "
                "nbd-server-stop",
            ) from error

    async def _forget_descriptor(self) -> None:
        try:
            await self._monitor.execute("closefd", {"fdname": _SOCKET_NAME})
        except CommandFailed:
            log.debug("%s had already closed the passed socket", self._monitor.who)

    async def add(
        self,
        name: str,
        node: str,
        *,
        bitmaps: Sequence[str] = (),
        recording: str | None = None,
        allocation_depth: bool = False,
    ) -> None:
        """Export `node`, read-only, as `name`, which is also the export's id.

        The contents of `bitmaps` are shown, and of one of the node's that records, where QEMU has the feature `watch`;
        the allocation depth on request. Raises what `Monitor.execute` raises.
        """
        arguments: dict[str, object] = {"type": "nbd", "id": name, "name": name, "node-name": node, "writable": False}
        arguments["allocation-depth"] = allocation_depth
        if bitmaps or recording is not None:
            shown: list[object] = list(bitmaps)
            arguments["bitmaps"] = [*shown, *([] if recording is None else [{"node": node, "name": recording}])]
        elif self._allow_inactive:
            # An inactive node serves reads, but no block status (FACTS.md): not for exports that show a bitmap.
            arguments["allow-inactive"] = True
        self._ours.add(name)
        await self._monitor.execute("block-export-add", arguments)

    async def remove(self, name: str) -> None:
        """Remove our export `name`, clients or none, and return when it is gone; it need not exist."""
        await remove_export(self._monitor, name)
        self._ours.discard(name)

    async def stop(self) -> None:
        """Remove all our exports; stop the server unless others have come to use it. Safe to call twice.

        The guest may stand still meanwhile: a client that stays a moment longer is not waited for, and the server,
        which serves nothing any more, stays with it (`remove_all` tries again).
        """
        for name in sorted(self._ours):
            await self.remove(name)
        if self._started:
            if not await nobody_connected(self.address, _MOMENT):
                log.warning("the NBD server of %s still has a client, and is not stopped", self._monitor.who)
                return
            await stop_unused_server(self._monitor)
            self._started = False
            self._unlink()
        if self._credentials is not None:
            await remove_objects(self._monitor, self._credentials)


def _family(address: Address) -> socket.AddressFamily:
    if isinstance(address, UnixAddress):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET


async def remove_export(monitor: Monitor, name: str) -> bool:
    """Remove an export, clients or none, and return when it is gone; False: there was none.

    Raises `RequestError` when QEMU does not finish within half a minute, and what `Monitor.execute` raises.
    """
    with monitor.events("BLOCK_EXPORT_DELETED") as events:
        try:
            await monitor.execute("block-export-del", {"id": name, "mode": "hard"})
        except CommandFailed:
            # It was not there, or is on its way out already.
            if name not in {export["id"] for export in await monitor.execute("query-block-exports")}:
                return False
        try:
            while (await events.get(_DELETION_LIMIT)).data["id"] != name:
                pass
        except TimeoutError:
            raise RequestError(f"{monitor.who} did not end the export {name} within {_DELETION_LIMIT:g} s") from None
    return True


async def stop_unused_server(monitor: Monitor) -> bool:
    """Stop the NBD server unless it has exports; False: it has, or it did not run."""
    exports = await monitor.execute("query-block-exports")
    if any(export["type"] == "nbd" for export in exports):
        return False
    try:
        await monitor.execute("nbd-server-stop")
    except CommandFailed:
        return False
    return True
