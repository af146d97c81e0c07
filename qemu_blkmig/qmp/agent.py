"""The guest agent's client: freezing and thawing the guest's file systems (QEMU's qga/qapi-schema.json).

An agent may hang, be away, or answer an earlier client's request. So each exchange begins with guest-sync-delimited,
and a freeze that is given up on has a thaw queued right behind it: should it happen late, it does not last.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import secrets
from typing import Any

from qemu_blkmig.errors import ConnectionLost, RequestError
from qemu_blkmig.time_limit import time_limit

log = logging.getLogger(__name__)

_SENTINEL = b"\xff"
_LINE_LIMIT = 1 << 20
_CONNECT_LIMIT = 5.0
_PING_LIMIT = 5.0


class GuestAgent:
    """A connection to one guest's agent, for one request at a time."""

    def __init__(self, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Use `connect`."""
        self._path = path
        self._reader = reader
        self._writer = writer
        # Other clients' left-over answers must not pass for ours.
        self._ids = itertools.count(secrets.randbits(30))

    @classmethod
    async def connect(cls, path: str) -> GuestAgent:
        """Connect to the socket of the agent's channel; nothing is said yet. Raises `RequestError`."""
        try:
            async with time_limit(_CONNECT_LIMIT):
                streams = await asyncio.open_unix_connection(path, limit=_LINE_LIMIT)
        except (OSError, TimeoutError) as error:
            why = error.strerror or "it does not accept"
            raise RequestError(f"the guest agent's socket {path} cannot be connected to: {why}") from error
        return cls(path, *streams)

    async def ping(self, timeout: float = _PING_LIMIT) -> None:  # noqa: ASYNC109
        """Return when the agent has answered. Raises `RequestError` when it does not, `ConnectionLost`."""
        await self._exchange("guest-ping", timeout)

    async def status(self, timeout: float = _PING_LIMIT) -> str:  # noqa: ASYNC109
        """Return "frozen" or "thawed". Raises what `ping` raises."""
        return str(await self._exchange("guest-fsfreeze-status", timeout))

    async def freeze(self, timeout: float) -> int:  # noqa: ASYNC109
        """Freeze the guest's file systems within `timeout` seconds; return how many.

        Raises what `ping` raises; in that case, and when it is cancelled, nothing stays frozen.
        """
        await self.ping(min(timeout, _PING_LIMIT))
        try:
            return int(await self._exchange("guest-fsfreeze-freeze", timeout))
        except BaseException:
            with contextlib.suppress(ConnectionLost):
                self._send("guest-fsfreeze-thaw")
            raise

    async def thaw(self, timeout: float) -> int:  # noqa: ASYNC109
        """Thaw the guest's file systems; return how many. Raises what `ping` raises; the request stays queued."""
        return int(await self._exchange("guest-fsfreeze-thaw", timeout))

    async def close(self) -> None:
        """Close the connection; what was sent will still be carried out."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _exchange(self, command: str, timeout: float) -> Any:  # noqa: ASYNC109
        """Send a synchronisation and a command, both at once, and return the command's answer."""
        identity = next(self._ids)
        self._writer.write(_SENTINEL)
        self._send("guest-sync-delimited", {"id": identity})
        self._send(command)
        try:
            async with time_limit(timeout):
                while await self._synchronised() != identity:
                    pass
                answer = await self._answer()
        except TimeoutError:
            raise RequestError(f"the guest agent did not answer {command} within {timeout:g} s") from None
        if "error" in answer:
            raise RequestError(f"the guest agent refused {command}: {answer['error'].get('desc', answer['error'])}")
        return answer.get("return")

    def _send(self, command: str, arguments: dict[str, object] | None = None) -> None:
        if self._writer.is_closing():
            raise ConnectionLost(f"the guest agent's channel {self._path} is closed")
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        self._writer.write(json.dumps(request).encode() + b"\n")

    async def _synchronised(self) -> object:
        """The id in the next answer to a synchronisation; what stands before its sentinel is somebody else's."""
        try:
            await self._reader.readuntil(_SENTINEL)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ConnectionLost(f"the guest agent's channel {self._path} was closed") from error
        except asyncio.LimitOverrunError as error:
            raise RequestError("the guest agent's channel is full of something else") from error
        return (await self._answer()).get("return")

    async def _answer(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
        except (ValueError, OSError) as error:
            raise ConnectionLost(f"the guest agent's channel {self._path} is of no use: {error}") from error
        if not line:
            raise ConnectionLost(f"the guest agent's channel {self._path} was closed")
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise RequestError(f"the guest agent's answer is not JSON: {line[:80]!r}") from error
        return dict(answer) if isinstance(answer, dict) else {}
