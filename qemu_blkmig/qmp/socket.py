"""One QMP connection: commands, events, file descriptors, and knowing when the QEMU at the other end is gone.

It stands on `qemu.qmp.QMPClient` and adds what a migration needs: our exceptions, errors that tell a user what is
wrong with the socket, a time limit for each command, waits for events that end when the connection does, and passing
of file descriptors.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import (
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from qemu_blkmig.errors import ConnectionLost, Refused
from qemu_blkmig.qmp.monitor import CommandFailed, EventStream, NoAnswer, NotSent
from qemu_blkmig.time_limit import time_limit

log = logging.getLogger(__name__)

_UNIX_PATH_LIMIT = 107
_CONNECT_RETRY = 0.05
_IN_USE = "a QMP socket serves one client at a time: close the other one, or give QEMU a second -qmp"
_NOT_QMP = "give the path of QEMU's -qmp unix:PATH,server=on,wait=off"


class _Client(QMPClient):
    """The library's, without its log of all messages: it writes each of them out for that, even if nobody wants it
    (a tenth of a second for a reply of query-qmp-schema)."""

    def _cb_outbound(self, msg: Message) -> Message:
        return super()._cb_outbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg

    def _cb_inbound(self, msg: Message) -> Message:
        return super()._cb_inbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg


class SocketMonitor:
    """Implements `qmp.monitor.Monitor` over QEMU's QMP socket."""

    def __init__(self, client: QMPClient, rights: socket.socket, who: str) -> None:
        """Take over a connected `client`; `rights` is a duplicate of its socket, to pass descriptors over."""
        self.who = who
        self._client = client
        self._rights = rights
        # Asked after the connection's end it would be no answer but an error.
        credentials = rights.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self._peer_pid: int | None = struct.unpack("3i", credentials)[0] or None
        self._passing = asyncio.Lock()
        self._closing = asyncio.Event()
        self._lost: asyncio.Future[ConnectionLost] = asyncio.get_running_loop().create_future()
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {who}")

    @classmethod
    async def connect(cls, path: str, *, who: str, timeout: float = 5.0) -> SocketMonitor:  # noqa: ASYNC109
        """Connect to the QMP socket at `path`; `who` names the peer in messages ("source QEMU").

        Raises `Refused`, with what is wrong with the socket and what to do about it.
        """
        try:
            async with time_limit(timeout) as limit:
                sock = await _open_socket(path, who)
                try:
                    await _await_greeting(sock, path, who)
                    rights = sock.dup()
                except BaseException:
                    sock.close()
                    raise
                return cls(await _negotiate(sock, rights, path, who), rights, who)
        except TimeoutError:
            if not limit.expired():
                raise
            raise Refused(
                f"{who}: {path} is already in use by another client, or does not speak QMP: "
                f"no greeting within {timeout:g} s",
                advice=_IN_USE,
            ) from None

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float = 30,  # noqa: ASYNC109
    ) -> Any:
        """See `Monitor.execute`."""
        try:
            async with time_limit(timeout):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise CommandFailed(self.who, command, error.error_class, str(error)) from error
        except TimeoutError:
            raise NoAnswer(f"{self.who} did not answer {command} within {timeout:g} s") from None
        except StateError as error:
            raise NotSent(f"{self.who} is gone ({command} was not sent)") from error
        except ExecInterruptedError as error:
            raise ConnectionLost(f"{self.who} is gone ({command} was under way)") from error
        except QMPError as error:
            raise ConnectionLost(f"{self.who} sent something that is not QMP in reply to {command}") from error

    async def pass_fd(self, fd: int, name: str) -> None:
        """See `Monitor.pass_fd`."""
        # getfd takes the last descriptor that arrived, so two of them must not come close together.
        async with self._passing:
            try:
                await self._send_rights(fd)
            except OSError as error:
                raise ConnectionLost(f"{self.who} is gone (a file descriptor was being passed)") from error
            await self.execute("getfd", {"fdname": name})

    async def _send_rights(self, fd: int) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        while True:
            try:
                # Blanks between two JSON documents are ignored.
                self._rights.sendmsg([b" "], ancillary)
                return
            except BlockingIOError:
                await asyncio.sleep(_CONNECT_RETRY)

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventStream]:
        """See `Monitor.events`."""
        stream = EventStream(names, self._lost)
        self._client.register_listener(stream)
        try:
            yield stream
        finally:
            stream.close()
            self._client.remove_listener(stream)

    @property
    def peer_pid(self) -> int | None:
        """QEMU's process, which made the QMP socket (unix(7), SO_PEERCRED); None if it is in another namespace."""
        return self._peer_pid

    @property
    def lost(self) -> bool:
        """Whether the connection is gone, closed by us or by QEMU."""
        return self._lost.done()

    async def wait_lost(self) -> None:
        """Return when the connection is gone, closed by us or by QEMU."""
        await asyncio.wait([self._lost])

    async def close(self) -> None:
        """Close the connection; idempotent."""
        self._closing.set()
        await asyncio.wait([self._watcher])

    async def _watch(self) -> None:
        """Disconnect, once, when QEMU hangs up or `close` asks for it (`QMPClient.disconnect` is not reentrant)."""
        hung_up = asyncio.ensure_future(self._hung_up())
        closing = asyncio.ensure_future(self._closing.wait())
        reason = "the connection was closed"
        try:
            await asyncio.wait((hung_up, closing), return_when=asyncio.FIRST_COMPLETED)
            if not self._closing.is_set():
                reason = "it hung up"
            await self._client.disconnect()
        except Exception as error:
            # disconnect() raises whatever ended the library's reader or writer task.
            reason = str(error) or reason
        finally:
            hung_up.cancel()
            closing.cancel()
            self._rights.close()
            log.debug("%s: connection ended: %s", self.who, reason)
            self._lost.set_result(ConnectionLost(f"{self.who} is gone ({reason})"))

    async def _hung_up(self) -> None:
        while self._client.runstate == Runstate.RUNNING:
            await self._client.runstate_changed()


async def _open_socket(path: str, who: str) -> socket.socket:
    if len(os.fsencode(path)) > _UNIX_PATH_LIMIT:
        raise Refused(
            f"{who}: the path of the QMP socket is {len(os.fsencode(path))} bytes long, more than the "
            f"{_UNIX_PATH_LIMIT} that a unix socket's address can hold: {path}",
            advice="use a shorter path, or a symbolic link to its directory",
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        await _connect(sock, path)
    except FileNotFoundError as error:
        sock.close()
        raise Refused(f"{who}: there is no QMP socket at {path}", advice=_NOT_QMP) from error
    except ConnectionRefusedError as error:
        sock.close()
        what = "no process listens at" if _is_socket(path) else "not a socket:"
        raise Refused(f"{who}: {what} {path}", advice=f"is that QEMU still running? {_NOT_QMP}") from error
    except PermissionError as error:
        sock.close()
        raise Refused(
            f"{who}: no permission to connect to {path}", advice="run as the user that QEMU runs as, or as root"
        ) from error
    except OSError as error:
        sock.close()
        raise Refused(f"{who}: cannot connect to {path}: {error.strerror}", advice=_NOT_QMP) from error
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect(sock: socket.socket, path: str) -> None:
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            # The listener's backlog is full (unix sockets know no connection in progress), so asyncio's own
            # sock_connect would take it for connected.
            await asyncio.sleep(_CONNECT_RETRY)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(Path(path).stat().st_mode)
    except OSError:
        return False


async def _await_greeting(sock: socket.socket, path: str, who: str) -> None:
    """Wait for the first byte and leave it there: a server that says something else must not look like a busy one."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)
    try:
        first = sock.recv(1, socket.MSG_PEEK)
    except OSError as error:
        raise Refused(f"{who}: {path} broke the connection: {error.strerror}", advice=_NOT_QMP) from error
    if not first:
        raise Refused(f"{who}: {path} closed the connection without a greeting", advice=_NOT_QMP)
    if first != b"{":
        raise Refused(f"{who}: {path} does not speak QMP", advice=_NOT_QMP)


async def _negotiate(sock: socket.socket, rights: socket.socket, path: str, who: str) -> QMPClient:
    client = _Client(who)
    # The library's own listener, and its history, would hold every event of the connection's life.
    client.events.event_filter = lambda _event: False
    try:
        await client.connect(sock)
    except QMPError as error:
        rights.close()
        raise Refused(f"{who}: {path} does not speak QMP: {error}", advice=_NOT_QMP) from error
    except BaseException:
        rights.close()
        raise
    return client
