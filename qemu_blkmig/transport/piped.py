"""A process that we speak with through pipes. It may have been started before there was an event loop."""

from __future__ import annotations

import asyncio
import subprocess
from typing import IO

from qemu_blkmig.destination.exits import ended


class Piped:
    """What an event loop sees of a process of `transport.starting.start`; it lives on when the loop is closed."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        stdin: asyncio.StreamWriter,
        stdout: tuple[asyncio.StreamReader, asyncio.BaseTransport],
        stderr: tuple[asyncio.StreamReader, asyncio.BaseTransport],
    ) -> None:
        self._process = process
        self.stdin = stdin
        self.stdout, out = stdout
        self.stderr, complaints = stderr
        self._transports = (out, complaints)

    @classmethod
    async def of(cls, process: subprocess.Popen[bytes], limit: int) -> Piped:
        """Take over `process`, all of whose pipes are ours; `limit`: the longest line of its stdout."""
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise ValueError("a process without pipes")
        return cls(
            process, await _writer(process.stdin), await _reader(process.stdout, limit), await _reader(process.stderr)
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status; None as long as it runs."""
        return self._process.poll()

    async def wait(self) -> int:
        """Return, with its exit status, when it has ended."""
        return await ended(self._process)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def close(self) -> None:
        """Let go of its pipes, whatever it still says."""
        self.stdin.close()
        for transport in self._transports:
            transport.close()


async def _reader(pipe: IO[bytes], limit: int = 1 << 16) -> tuple[asyncio.StreamReader, asyncio.BaseTransport]:
    reader = asyncio.StreamReader(limit=limit)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader, transport


async def _writer(pipe: IO[bytes]) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), pipe
    )
    return asyncio.StreamWriter(transport, protocol, None, loop)
