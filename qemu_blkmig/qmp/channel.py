"""The way that RAM takes from the source QEMU to the one that waits for it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from qemu_blkmig.errors import DestinationFailed
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.time_limit import time_limit

_NAME = "blkmig-ram"
_CONNECT = 10.0
"""Seconds in which a destination QEMU that listens must take the connection."""


class Channel(Protocol):
    """A way for one migration."""

    async def open(self, source: Monitor, destination: Monitor) -> str:
        """Have the destination listen; the URI for the source's `migrate`.

        Raises `RequestError` when one of the QEMUs refuses, `ConnectionLost`, `DestinationFailed`.
        """


class SocketPair:
    """Between two QEMUs of this host: each gets an end of a socket pair, so no port and no path is used."""

    async def open(self, source: Monitor, destination: Monitor) -> str:
        """See `Channel`."""
        here, there = socket.socketpair()
        with here, there:
            await destination.pass_fd(there.fileno(), _NAME)
            await destination.execute("migrate-incoming", {"uri": f"fd:{_NAME}"})
            await source.pass_fd(here.fileno(), _NAME)
        return f"fd:{_NAME}"


@dataclass(frozen=True)
class Forwarded:
    """Through the connection to the destination's host: QEMU listens at the path `there`, in a private directory.

    `reach` tells where that path is reached from here.
    """

    there: str
    reach: Callable[[str], Awaitable[str]]

    async def open(self, source: Monitor, destination: Monitor) -> str:
        """See `Channel`. The source QEMU gets the connected socket, whatever user it runs as."""
        await destination.execute("migrate-incoming", {"uri": f"unix:{self.there}"})
        path = await self.reach(self.there)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as here:
            here.setblocking(False)
            try:
                async with time_limit(_CONNECT):
                    await asyncio.get_running_loop().sock_connect(here, path)
            except (OSError, TimeoutError) as error:
                raise DestinationFailed(f"the way for RAM to the destination cannot be opened: {error}") from error
            await source.pass_fd(here.fileno(), _NAME)
        return f"fd:{_NAME}"


@dataclass(frozen=True)
class Direct:
    """From QEMU to QEMU, as the user says: `uri` is for both."""

    uri: str

    async def open(self, source: Monitor, destination: Monitor) -> str:
        """See `Channel`."""
        await destination.execute("migrate-incoming", {"uri": self.uri})
        return self.uri
