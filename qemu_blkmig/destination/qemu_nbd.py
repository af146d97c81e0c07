"""Our own `qemu-nbd`, which writes the formats that we do not: started, reached, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from qemu_blkmig import errors
from qemu_blkmig.destination.exits import ended
from qemu_blkmig.nbd.connection import Connection, connect
from qemu_blkmig.nbd.plan import ALLOCATION
from qemu_blkmig.time_limit import time_limit

_START_TIMEOUT = 20.0
_EXIT_TIMEOUT = 120.0
_EXPORT = "image"
KEEPING_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(64 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
"""mallopt(3): the memory of a request's buffer is kept for the next one. Given back, it is faulted in again each time:
a third of qemu-nbd's CPU and more."""


class Spare(NamedTuple):
    """Connections beside those for writing: what is flushed on one holds for all, and what was written can be read."""

    flusher: Connection
    reader: Connection


class QemuNbd:
    """A running server; made by `start`. It dies with the thread that started it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        complaints: IO[bytes],
        connections: Sequence[Connection],
        spare: Spare | None,
    ) -> None:
        """`spare`: None where the server does not promise that connections agree (NBD_FLAG_CAN_MULTI_CONN)."""
        self._process = process
        self._complaints = complaints
        self.connections = connections
        self.spare = spare

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    async def stop(self) -> None:
        """End the server and wait until it has exited; flush and disconnect before.

        Raises `DestinationFailed` with its last words when it failed, or had to be killed.
        """
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            async with time_limit(_EXIT_TIMEOUT):
                status = await ended(self._process)
        except TimeoutError:
            self.kill()
            raise errors.DestinationFailed(f"qemu-nbd did not exit within {_EXIT_TIMEOUT:.0f} s") from None
        finally:
            words = _last_words(self._complaints)
        if status:
            raise errors.DestinationFailed(f"qemu-nbd ended with status {status}: {words}")

    def kill(self) -> None:
        """End the server at once, whatever it still holds."""
        self._process.kill()
        self._process.wait()


async def start(path: str, image_format: str, connections: int, *, keep_allocated: bool = False) -> QemuNbd:
    """Serve the image to `connections` connections and the spare ones, and to nobody else.

    Call it from a thread that lives on.

    What it writes goes past the page cache where the file system can do that (docs/decisions/028-past-the-cache.md).
    The socket's directory is gone when this returns, so that not even a killed agent leaves one behind. Raises
    `DestinationFailed` with what qemu-nbd said.
    """
    options = [
        "--cache",
        "none" if await asyncio.to_thread(opens_direct, path) else "writeback",
        "--discard",
        "ignore" if keep_allocated else "unmap",
        "--detect-zeroes",
        "off",
        "--format",
        image_format,
    ]
    return await _start([*options, os.path.abspath(path)], f"{path} as {image_format}", connections, spare=True)  # noqa: PTH100 - symlinks stay


async def start_reading(image: str, image_format: str | None) -> QemuNbd:
    """Serve the image read-only to one connection; None: `image` is a json: pseudo-filename. Else as `start`.

    QEMU's image locks refuse it while anything writes to one of the files.
    """
    options = ["--format", image_format] if image_format is not None else []
    return await _start(["--read-only", *options, image], image, 1, spare=False)


async def _start(options: Sequence[str], what: str, count: int, *, spare: bool) -> QemuNbd:
    directory = await asyncio.to_thread(tempfile.mkdtemp, prefix="blkmig-")
    all_of_them = count + len(Spare._fields) if spare else count
    try:
        process, complaints, made = await _serve(options, what, all_of_them, Path(directory) / "nbd")
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
    others = made[count:]
    if others and made[0].flushes_for_all:
        return QemuNbd(process, complaints, made[:count], Spare(*others))
    for connection in others:
        connection.close()
    return QemuNbd(process, complaints, made[:count], None)


async def _serve(
    options: Sequence[str], what: str, count: int, listening: Path
) -> tuple[subprocess.Popen[bytes], IO[bytes], list[Connection]]:
    complaints = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the server
    command = ["setpriv", "--pdeathsig", "KILL", "qemu-nbd", "--socket", str(listening), "--export-name", _EXPORT]
    command += ["--shared", str(count), "--persistent", *options]
    process = subprocess.Popen(  # noqa: ASYNC220 - the main thread must be its parent (PR_SET_PDEATHSIG)
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=complaints,
        env=os.environ | KEEPING_MEMORY,
    )
    made: list[Connection] = []
    try:
        made.append(await _first_connection(process, listening))
        for _ in range(1, count):
            made.append(await asyncio.to_thread(connect, listening, _EXPORT, contexts=[ALLOCATION]))
    except BaseException as error:
        process.kill()
        await asyncio.to_thread(process.wait)
        if not isinstance(error, (errors.ConnectionLost, TimeoutError)):
            raise
        words = _last_words(complaints) or str(error)
        raise errors.DestinationFailed(f"qemu-nbd cannot serve {what}: {words}") from error
    return process, complaints, made


async def _first_connection(process: subprocess.Popen[bytes], listening: Path) -> Connection:
    """Connected as soon as the server lets us: its socket is there a moment before it listens.

    Raises `ConnectionLost` when the server has exited, `TimeoutError`.
    """
    async with time_limit(_START_TIMEOUT):
        while True:
            exited = process.poll() is not None
            try:
                return await asyncio.to_thread(connect, listening, _EXPORT, contexts=[ALLOCATION])
            except errors.ConnectionLost:
                if exited:
                    raise
            await asyncio.sleep(0.01)


def opens_direct(path: str) -> bool:
    """Whether O_DIRECT is to be had: some file systems, such as an older tmpfs, refuse to open a file with it."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _last_words(complaints: IO[bytes]) -> str:
    with contextlib.suppress(OSError):
        complaints.seek(0)
        return complaints.read(4000).decode(errors="replace").strip()
    return ""
