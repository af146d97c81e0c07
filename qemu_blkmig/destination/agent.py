"""The agent's process: the control protocol on stdin and stdout, for `receive` or run as a module."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from typing import NoReturn

import msgspec

from qemu_blkmig.destination import protocol
from qemu_blkmig.destination.confine import NO_BOUNDS, Bounds
from qemu_blkmig.destination.service import Service
from qemu_blkmig.errors import Refused
from qemu_blkmig.hashing import USUAL, hash_function
from qemu_blkmig.nbd.binding import libnbd

EXIT_LEFT = 1
"""Stdin ended, or stdout broke, without `bye`."""
EXIT_GARBAGE = 2
"""A line was no request at all."""

_UNSPOKEN = 600.0
"""Seconds in which the first line must come: who begins an agent early has others to ask, who may ask a person."""
_GRACE = 1.0
"""Seconds in which a line that waits is read."""

_MOST_REQUESTS = 256
"""Under way at once; a coordinator has a few for each disk."""
_NUL = rb"\u0000"
_SENSELESS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What a line raises that is no request."""

_log = logging.getLogger(__name__)


class _Identified(msgspec.Struct):
    id: int


class Agent:
    """Answers requests from `reader` on `writer` until bye, end of file, garbage or `stop`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bounds: Bounds) -> None:
        self._reader = reader
        self._writer = writer
        self._writing = asyncio.Lock()
        self._service = Service(self._send, bounds)
        self._decoder = msgspec.json.Decoder(protocol.Request)
        self._encoder = msgspec.json.Encoder()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._heard = asyncio.get_running_loop().time() + _UNSPOKEN - protocol.SILENCE

    async def serve(self) -> int:
        """The exit status, when all is over: copies drained, servers gone, unclosed creations removed."""
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._listen_for_silence())]
        status = await self._ended
        for task in tasks:
            task.cancel()
        await self._service.end(remove=status != 0)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1)
        return status

    def stop(self, status: int) -> None:
        """End with `status`; the first one counts."""
        if not self._ended.done():
            self._ended.set_result(status)

    async def _listen_for_silence(self) -> None:
        """A network that is gone without a word must not leave images locked for ever."""
        loop = asyncio.get_running_loop()
        while (rest := self._heard + protocol.SILENCE - loop.time()) > 0:
            await asyncio.sleep(min(rest, protocol.SILENCE))
            if self._heard + protocol.SILENCE <= loop.time():
                # If it was us who were stopped, lines are waiting to be read.
                await asyncio.sleep(_GRACE)
        _log.error("nothing was heard from the coordinator for %.0f s", protocol.SILENCE)
        self.stop(EXIT_LEFT)

    async def _read(self) -> None:
        while True:
            try:
                line = await self._reader.readline()
                self._heard = asyncio.get_running_loop().time()
            except ValueError:
                _log.error("a line is longer than %d bytes", protocol.LINE_LIMIT)
                return self.stop(EXIT_GARBAGE)
            if not line.endswith(b"\n"):
                return self.stop(EXIT_LEFT)
            try:
                request = self._understood(line)
            except _SENSELESS as error:
                if not await self._refuse(line, error):
                    return self.stop(EXIT_GARBAGE)
                continue
            task = asyncio.create_task(self._answer(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _understood(self, line: bytes) -> protocol.Request:
        if _NUL in line:
            raise msgspec.DecodeError("no text here holds a NUL")
        if len(self._tasks) >= _MOST_REQUESTS:
            raise msgspec.DecodeError(f"more than {_MOST_REQUESTS} at once")
        return self._decoder.decode(line)

    async def _refuse(self, line: bytes, error: Exception) -> bool:
        try:
            identified = msgspec.json.decode(line, type=_Identified)
        except _SENSELESS:
            _log.error("not a request: %r (%s)", line[:200], error)
            return False
        await self._send(protocol.Reply(identified.id, protocol.Failure("refused", f"not a request: {error}")))
        return True

    async def _answer(self, request: protocol.Request) -> None:
        outcome = await self._service.perform(request.op)
        try:
            await self._send(protocol.Reply(request.id, outcome))
        except UnicodeEncodeError as error:
            what = f"a link here leads to a file whose name is not UTF-8, which cannot be told: {error.object!r}"
            await self._send(protocol.Reply(request.id, protocol.Failure("refused", what)))
        if isinstance(request.op, protocol.Bye):
            self.stop(0)

    async def _send(self, message: protocol.FromAgent) -> None:
        try:
            async with self._writing:
                self._writer.write(self._encoder.encode(message) + b"\n")
                await self._writer.drain()
        except OSError:
            self.stop(EXIT_LEFT)


async def serve(bounds: Bounds = NO_BOUNDS) -> int:
    """Serve the coordinator on stdin and stdout; the exit status in the end. See `Agent`."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=protocol.LINE_LIMIT)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(0, "rb", buffering=0))
    transport, flow = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, _protocol_only_stdout())
    agent = Agent(reader, asyncio.StreamWriter(transport, flow, None, loop), bounds)
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, agent.stop, 128 + number)
    loop.run_in_executor(None, _warm_up)
    return await agent.serve()


def _warm_up() -> None:
    """Load what the first copy needs before it is asked for; what is missing is told then."""
    with contextlib.suppress(Refused):
        libnbd()
        hash_function(USUAL)


def run(bounds: Bounds = NO_BOUNDS) -> int:
    """Be the agent (see `Agent`); the exit status. What belongs to a terminal (Ctrl-C) is the coordinator's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="agent: %(levelname)s: %(message)s")
    return asyncio.run(serve(bounds))


def _protocol_only_stdout() -> object:
    """Stdout for the protocol alone: whatever else prints goes to stderr."""
    mine = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(mine, "wb", buffering=0)


def main(bounds: Bounds = NO_BOUNDS) -> NoReturn:
    """Be the agent (see `Agent`) and exit, even if a thread hangs in its storage."""
    status = run(bounds)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
