"""QMP through libvirt: commands and events of a domain's QEMU, whose own monitor libvirt keeps to itself.

Commands pass during a migration job of libvirt's, too (FACTS.md). libvirt marks the domain as tainted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from qemu_blkmig.errors import ConnectionLost
from qemu_blkmig.qmp.monitor import CommandFailed, Event, EventStream, NoAnswer, NotSent
from qemu_blkmig.virt.connection import Connection, LibvirtError, LibvirtGone, libvirt


class PassthroughMonitor:
    """Implements `qmp.monitor.Monitor` for the QEMU of a running domain. `who` names it in messages."""

    def __init__(self, connection: Connection, domain: Any, who: str) -> None:
        self.who = who
        self._connection = connection
        self._domain = domain
        self._loop = asyncio.get_running_loop()
        self._lost: asyncio.Future[ConnectionLost] = self._loop.create_future()
        self._streams: list[EventStream] = []
        self._registered: list[tuple[str, int]] = []

    @classmethod
    async def connect(cls, connection: Connection, domain: Any, who: str) -> PassthroughMonitor:
        """Listen to the events of the domain's QEMU and of its end. Raises what `Connection.call` does."""
        monitor = cls(connection, domain, who)
        handle, extra, module = connection.handle, libvirt("libvirt_qemu"), libvirt()
        number = await connection.call(extra.qemuMonitorEventRegister, handle, domain, None, monitor._on_event, None, 0)
        monitor._registered.append(("qemu", number))
        number = await connection.call(
            handle.domainEventRegisterAny, domain, module.VIR_DOMAIN_EVENT_ID_LIFECYCLE, monitor._on_lifecycle, None
        )
        monitor._registered.append(("domain", number))
        handle.registerCloseCallback(monitor._on_close, None)
        return monitor

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float = 30,  # noqa: ASYNC109
    ) -> Any:
        """See `Monitor.execute`."""
        return await self._execute(command, arguments, [], timeout)

    async def pass_fd(self, fd: int, name: str) -> None:
        """See `Monitor.pass_fd`."""
        await self._execute("getfd", {"fdname": name}, [fd], 30)

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventStream]:
        """See `Monitor.events`."""
        stream = EventStream(names, self._lost)
        self._streams.append(stream)
        try:
            yield stream
        finally:
            stream.close()
            self._streams.remove(stream)

    @property
    def peer_pid(self) -> int | None:
        """libvirt does not tell: None."""
        return None

    @property
    def lost(self) -> bool:
        """Whether libvirt, or the domain's QEMU, is gone."""
        return self._lost.done()

    async def wait_lost(self) -> None:
        """Return when libvirt, or the domain's QEMU, is gone."""
        await asyncio.wait([self._lost])

    async def close(self) -> None:
        """Stop listening; idempotent. The connection is the caller's."""
        registered, self._registered = self._registered, []
        extra, handle = libvirt("libvirt_qemu"), self._connection.handle
        for kind, number in registered:
            with contextlib.suppress(LibvirtError, ConnectionLost):
                if kind == "qemu":
                    await self._connection.call(extra.qemuMonitorEventDeregister, handle, number)
                else:
                    await self._connection.call(handle.domainEventDeregisterAny, number)
        self._lose("the connection was closed")

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None, files: list[int], limit: float
    ) -> Any:
        if self.lost:
            raise NotSent(f"{self.who} is gone ({command} was not sent)")
        text = json.dumps({"execute": command, "arguments": dict(arguments or {})})
        answering = asyncio.ensure_future(self._ask(text, files))
        answering.add_done_callback(lambda late: late.cancelled() or late.exception())
        # A call of libvirt's cannot be taken back: it goes on in its thread, and the order of commands is kept.
        both: list[asyncio.Future[Any]] = [answering, self._lost]
        await asyncio.wait(both, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            if self.lost:
                raise ConnectionLost(f"{self.who} is gone ({command} was under way)")
            raise NoAnswer(f"{self.who} did not answer {command} within {limit:g} s")
        try:
            answer = json.loads(answering.result())
        except LibvirtError as error:
            module = libvirt()
            if error.code in (module.VIR_ERR_NO_DOMAIN, module.VIR_ERR_OPERATION_INVALID):
                self._lose(str(error))
                raise ConnectionLost(f"{self.who} is gone ({command} was under way): {error}") from error
            raise
        if "error" in answer:
            raise CommandFailed(self.who, command, answer["error"]["class"], answer["error"]["desc"])
        return answer["return"]

    async def _ask(self, text: str, files: list[int]) -> str:
        extra = libvirt("libvirt_qemu")
        if not files:
            reply: str = await self._connection.call(extra.qemuMonitorCommand, self._domain, text, 0)
            return reply
        reply, returned = await self._connection.call(extra.qemuMonitorCommandWithFiles, self._domain, text, files, 0)
        for descriptor in returned or []:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        return reply

    def _on_event(
        self, _handle: Any, _domain: Any, name: str, seconds: int, micros: int, details: str | None, _opaque: Any
    ) -> None:
        event = Event(name, json.loads(details) if details else {}, seconds + micros / 1e6)
        self._loop.call_soon_threadsafe(self._deliver, event)

    def _deliver(self, event: Event) -> None:
        for stream in self._streams:
            stream.deliver(event)

    def _on_lifecycle(self, _handle: Any, _domain: Any, event: int, _detail: int, _opaque: Any) -> None:
        if event == libvirt().VIR_DOMAIN_EVENT_STOPPED:
            self._loop.call_soon_threadsafe(self._lose, "the domain's QEMU has ended")

    def _on_close(self, _handle: Any, _reason: int, _opaque: Any) -> None:
        self._loop.call_soon_threadsafe(self._lose, "it hung up", LibvirtGone)

    def _lose(self, why: str, kind: type[ConnectionLost] = ConnectionLost) -> None:
        if not self._lost.done():
            who = self._connection.who if kind is LibvirtGone else self.who
            self._lost.set_result(kind(f"{who} is gone ({why})"))
