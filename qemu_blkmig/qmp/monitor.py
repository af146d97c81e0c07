"""What the tool needs of a connection to one QEMU: commands, events, file descriptors, and knowing when it is gone.

`qmp.socket.SocketMonitor` is one over QEMU's own QMP socket, `virt.monitor.PassthroughMonitor` one through libvirt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from qemu.qmp import EventListener, Message

from qemu_blkmig.errors import ConnectionLost, RequestError
from qemu_blkmig.time_limit import time_limit


class CommandFailed(RequestError):
    """QEMU refused `command`, with `error_class` (qapi's QapiErrorClass) and `description` in its own words."""

    def __init__(self, who: str, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{who} refused {command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class NoAnswer(ConnectionLost):
    """QEMU did not answer in time: whether the command was carried out, or will be, cannot be known.

    The connection is kept. QEMU carries out commands in order, so a later query's answer tells what became of it.
    """


class NotSent(ConnectionLost):
    """QEMU was known to be gone before the command was sent: it was not carried out."""


@dataclass(frozen=True, slots=True)
class Event:
    """A QMP event; `seconds` is QEMU's own wall clock, since the epoch."""

    name: str
    data: Mapping[str, Any]
    seconds: float


class EventStream(EventListener):
    """The events of one subscription, oldest first; none is lost between its opening and its end.

    Unlike qemu.qmp's own listeners it ends with the connection, and it keeps no history.
    """

    def __init__(self, names: tuple[str, ...], lost: asyncio.Future[ConnectionLost]) -> None:
        super().__init__(names)
        self._names = names
        self._events: asyncio.Queue[Event | ConnectionLost] = asyncio.Queue()
        lost.add_done_callback(self._end)
        self._lost = lost

    def _end(self, lost: asyncio.Future[ConnectionLost]) -> None:
        self._events.put_nowait(lost.result())

    async def put(self, event: Message) -> None:
        """Take an event from qemu.qmp."""
        if self.accept(event):
            fields: dict[str, Any] = dict(event)
            time = fields["timestamp"]
            seconds = time["seconds"] + time["microseconds"] / 1e6
            self.deliver(Event(fields["event"], fields.get("data", {}), seconds))

    def deliver(self, event: Event) -> None:
        """Take an event, if it is one of those that were asked for."""
        if event.name in self._names:
            self._events.put_nowait(event)

    # The library's get() returns its own Message and knows no end.
    async def get(self, timeout: float | None = None) -> Event:  # type: ignore[override]  # noqa: ASYNC109
        """Return the next event.

        Raises `TimeoutError` after `timeout` seconds, and `ConnectionLost`, for ever, once QEMU is gone and what
        came before has been delivered.
        """
        async with time_limit(timeout):
            item = await self._events.get()
        if isinstance(item, Event):
            return item
        self._events.put_nowait(item)
        raise type(item)(item.what)

    def close(self) -> None:
        """End the subscription."""
        self._lost.remove_done_callback(self._end)


class Monitor(Protocol):
    """A connection to one QEMU. Commands may be sent concurrently; QEMU carries them out in the order sent."""

    who: str
    """The peer's name in messages ("source QEMU")."""

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float = 30,  # noqa: ASYNC109
    ) -> Any:
        """Execute a command and return its value.

        Raises `CommandFailed` when QEMU refuses it, `NotSent` when QEMU is gone already, `NoAnswer` after `timeout`
        seconds, `ConnectionLost` when QEMU goes meanwhile; after the last two, and after a cancellation, whether it was
        carried out cannot be known from here.
        """

    async def pass_fd(self, fd: int, name: str) -> None:
        """Give QEMU a duplicate of `fd`, to be used once as `name` (QMP getfd). `fd` stays open here.

        Raises what `execute` raises.
        """

    def events(self, *names: str) -> AbstractContextManager[EventStream]:
        """Subscribe to the events of these names, from now to the end of the block."""

    @property
    def peer_pid(self) -> int | None:
        """QEMU's process; None where it cannot be told."""

    @property
    def lost(self) -> bool:
        """Whether the connection is gone, closed by us or by QEMU."""

    async def wait_lost(self) -> None:
        """Return when the connection is gone, closed by us or by QEMU."""

    async def close(self) -> None:
        """Close the connection; idempotent."""
