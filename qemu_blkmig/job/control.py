"""The control socket of a running job: other terminals look, set limits, cancel, and say when the guest may move.

A unix socket in the job's private run-time directory, of mode 0600; JSON lines, a request and its answer. Whatever a
client sends, or does not read, harms nobody but itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from qemu_blkmig.errors import BlkmigError, ConnectionLost, Refused
from qemu_blkmig.job.status import Status
from qemu_blkmig.time_limit import time_limit

log = logging.getLogger(__name__)

SOCKET = "control"
LINE = 1 << 20
"""Bytes of a line at most, in either direction."""
REQUEST = 4 << 10
"""Bytes of a request at most."""
CLIENTS = 16
"""Clients at once."""
PATIENCE = 5.0
"""Seconds in which a client must take what it is sent, and a job answer."""
FOLLOW = 1.0
"""Seconds between two looks of a client that follows."""
FAREWELL = 1.0
"""Seconds that a job which is over waits for its clients to take the outcome."""


class Look(msgspec.Struct, frozen=True, tag="status"):
    """Answered by `Status`; with `follow` by one a second, and `Ended` in the end."""

    follow: bool = False


class Change(msgspec.Struct, frozen=True, tag="set"):
    """New limits: bytes a second (null: none), seconds; what is left out stays."""

    bandwidth: int | msgspec.UnsetType | None = msgspec.UNSET
    downtime: float | msgspec.UnsetType = msgspec.UNSET


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Like Ctrl-C. Answered by `Done` or `Refusal`, and then in either case, when the job is over, by `Ended`."""


class SwitchOver(msgspec.Struct, frozen=True, tag="switchover"):
    """The guest may move."""


Request = Look | Change | Cancel | SwitchOver


class Done(msgspec.Struct, frozen=True, tag="done", tag_field="event"):
    """It is done, or has begun: in words."""

    text: str


class Refusal(msgspec.Struct, frozen=True, tag="refusal", tag_field="event"):
    """It cannot be done."""

    what: str
    advice: str | None = None


class Ended(msgspec.Struct, frozen=True, tag="ended", tag_field="event"):
    """The job is over: exit code, what was told, how things stand."""

    exit_code: int
    text: str
    guest: str | None = None


Answer = Status | Done | Refusal | Ended


class Actions(Protocol):
    """What a job does for its clients. Every method may raise a `BlkmigError`, which is the client's answer."""

    def status(self) -> Status:
        """How the job stands."""

    async def change(self, wanted: Change) -> str:
        """Bring new limits into effect; what holds now, in words."""

    def cancel(self) -> str:
        """Begin to cancel; what was begun, in words."""

    def switch_over(self) -> str:
        """Let the guest move; what follows, in words."""


class ControlServer:
    """The job's end of the socket."""

    def __init__(self, path: Path, actions: Actions) -> None:
        self._path = path
        self._actions = actions
        self._clients: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises `OSError`."""
        self._server = await asyncio.start_unix_server(self._welcome, self._path, limit=REQUEST)
        self._path.chmod(0o600)

    async def end(self, outcome: Ended) -> None:
        """The job is over: tell those who wait for it, and listen no more. Safe to call twice."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self._ended.set_result(outcome)
        if self._clients:
            await asyncio.wait(self._clients, timeout=FAREWELL)
        for client in self._clients:
            client.cancel()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._clients) >= CLIENTS:
            writer.transport.abort()
            return
        self._clients.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, TimeoutError, ValueError) as error:
            log.debug("a client of the control socket was given up: %s", error)
        finally:
            self._clients.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await self._next(reader):
            try:
                request = msgspec.json.decode(line, type=Request)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                await _send(writer, Refusal(f"not a request: {error}"))
                return
            await _send(writer, await self._perform(request))
            if isinstance(request, Look) and request.follow:
                await self._follow(writer)
            if isinstance(request, Cancel):
                await asyncio.wait({self._ended})
            if self._ended.done():
                await _send(writer, self._ended.result())
                writer.write_eof()
                return

    async def _next(self, reader: asyncio.StreamReader) -> bytes:
        """The next line; empty when there is none, or the job ends first."""
        reading = asyncio.ensure_future(reader.readline())
        try:
            waiting: set[asyncio.Future[Any]] = {reading, self._ended}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else b""
        finally:
            reading.cancel()

    async def _follow(self, writer: asyncio.StreamWriter) -> None:
        while not self._ended.done():
            await asyncio.wait({self._ended}, timeout=FOLLOW)
            if not self._ended.done():
                await _send(writer, self._actions.status())

    async def _perform(self, request: Request) -> Answer:
        try:
            match request:
                case Look():
                    return self._actions.status()
                case Change():
                    return Done(await self._actions.change(request))
                case Cancel():
                    return Done(self._actions.cancel())
                case SwitchOver():
                    return Done(self._actions.switch_over())
        except BlkmigError as error:
            return Refusal(str(error), error.advice)


async def _send(writer: asyncio.StreamWriter, answer: Answer) -> None:
    writer.write(msgspec.json.encode(answer) + b"\n")
    async with time_limit(PATIENCE):
        await writer.drain()


class ControlClient:
    """A client's end of the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, runtime: str) -> AsyncIterator[ControlClient]:
        """Connect to the job whose run-time directory is `runtime`. Raises `ConnectionLost`: nobody listens."""
        try:
            reader, writer = await asyncio.open_unix_connection(Path(runtime) / SOCKET, limit=LINE)
        except OSError as error:
            raise ConnectionLost(f"the job does not answer: {error}") from error
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()

    async def request(self, request: Request) -> Answer:
        """Ask, and get the first answer. Raises `Refused` for a refusal, `ConnectionLost`."""
        try:
            self._writer.write(msgspec.json.encode(request) + b"\n")
            async with time_limit(PATIENCE):
                answer = await self.next()
        except TimeoutError as error:
            raise ConnectionLost(f"the job does not answer within {PATIENCE:.0f} s") from error
        if isinstance(answer, Refusal):
            raise Refused(answer.what, advice=answer.advice)
        return answer

    async def next(self) -> Answer:
        """The next answer to a request that has several. Raises `ConnectionLost` when the job is gone."""
        try:
            line = await self._reader.readline()
            if line.endswith(b"\n"):
                answer: Answer = msgspec.json.decode(line, type=Answer)
                return answer
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise ConnectionLost(f"the job does not answer: {error}") from error
        raise ConnectionLost("the job ended without a word")
