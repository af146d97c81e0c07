"""The agent's process: the control protocol on stdin and stdout, `python -m qemu_blkmig.destination.agent`."""

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
from qemu_blkmig.destination.service import Service

EXIT_LEFT = 1
"""Stdin ended, or stdout broke, without `bye`."""
EXIT_GARBAGE = 2
"""A line was no request at all."""

_log = logging.getLogger(__name__)


class _Identified(msgspec.Struct):
    id: int


class Agent:
    """Answers requests from `reader` on `writer` until bye, end of file, garbage or `stop`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._writing = asyncio.Lock()
        self._service = Service(self._send)
        self._decoder = msgspec.json.Decoder(protocol.Request)
        self._encoder = msgspec.json.Encoder()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def serve(self) -> int:
        """The exit status, when all is over: copies drained, servers gone, unclosed creations removed."""
        reading = asyncio.create_task(self._read())
        status = await self._ended
        reading.cancel()
        await self._service.end(remove=status != 0)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1)
        return status

    def stop(self, status: int) -> None:
        """End with `status`; the first one counts."""
        if not self._ended.done():
            self._ended.set_result(status)

    async def _read(self) -> None:
        while True:
            try:
                line = await self._reader.readline()
            except ValueError:
                _log.error("a line is longer than %d bytes", protocol.LINE_LIMIT)
                return self.stop(EXIT_GARBAGE)
            if not line.endswith(b"\n"):
                return self.stop(EXIT_LEFT)
            try:
                request = self._decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                if not await self._refuse(line, error):
                    return self.stop(EXIT_GARBAGE)
                continue
            task = asyncio.create_task(self._answer(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _refuse(self, line: bytes, error: Exception) -> bool:
        try:
            identified = msgspec.json.decode(line, type=_Identified)
        except (msgspec.DecodeError, UnicodeDecodeError):
            _log.error("not a request: %r (%s)", line[:200], error)
            return False
        await self._send(protocol.Reply(identified.id, protocol.Failure("refused", f"not a request: {error}")))
        return True

    async def _answer(self, request: protocol.Request) -> None:
        outcome = await self._service.perform(request.op)
        await self._send(protocol.Reply(request.id, outcome))
        if isinstance(request.op, protocol.Bye):
            self.stop(0)

    async def _send(self, message: protocol.FromAgent) -> None:
        try:
            async with self._writing:
                self._writer.write(self._encoder.encode(message) + b"\n")
                await self._writer.drain()
        except OSError:
            self.stop(EXIT_LEFT)


async def serve() -> int:
    """Serve the coordinator on stdin and stdout; the exit status in the end."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=protocol.LINE_LIMIT)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(0, "rb", buffering=0))
    transport, flow = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, _protocol_only_stdout())
    agent = Agent(reader, asyncio.StreamWriter(transport, flow, None, loop))
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, agent.stop, 128 + number)
    return await agent.serve()


def run() -> int:
    """Be the agent; the exit status. What belongs to a terminal (Ctrl-C) is the coordinator's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="agent: %(levelname)s: %(message)s")
    return asyncio.run(serve())


def _protocol_only_stdout() -> object:
    """Stdout for the protocol alone: whatever else prints goes to stderr."""
    mine = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(mine, "wb", buffering=0)


def main() -> NoReturn:
    """Be the agent and exit, even if a thread hangs in its storage."""
    status = run()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
