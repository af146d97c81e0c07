"""Real NBD servers for the tests: qemu-storage-daemon with bitmaps, nbdkit with filters."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def running(command: list[str], listening: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server, from when it accepts connections on `listening` until the block ends."""
    with _connected(command, listening) as (server, probe):
        probe.close()
        yield server


@contextlib.contextmanager
def _connected(command: list[str], listening: Path) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """The server, until the block ends, and the first connection that it accepted on `listening`."""
    server = subprocess.Popen(command)
    try:
        with _connection(server, listening) as connection:
            yield server, connection
    finally:
        server.kill()
        server.wait()


def _connection(server: subprocess.Popen[bytes], listening: Path) -> socket.socket:
    for _ in range(1000):
        if server.poll() is not None:
            raise RuntimeError(f"{server.args!r} exited with {server.returncode}")
        connection = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            connection.connect(str(listening))
            return connection
        connection.close()
        time.sleep(0.01)
    raise RuntimeError(f"{server.args!r} does not listen")


@contextlib.contextmanager
def nbdkit(directory: Path, *arguments: str, name: str = "nbdkit.sock") -> Iterator[Path]:
    """An nbdkit on the socket that is given; it exits with the block.

    One with scripts (plugin eval) is left time to remove them; nobody may be connected any more then.
    """
    listening = directory / name
    with running(["nbdkit", "-f", "--unix", str(listening), *arguments], listening) as server:
        yield listening
        if "eval" in arguments:
            server.terminate()
            server.wait(10)


@contextlib.contextmanager
def qemu_export(
    directory: Path, image: Path, *, driver: str = "raw", name: str = "qsd.sock"
) -> Iterator[tuple[Path, Monitor]]:
    """A qemu-storage-daemon that exports `image` read-only as `disk`, its allocation depth shown.

    It waits for the connection to its monitor before it goes on: with wait=off QEMU now and then greets one that comes
    while it starts, and never reads it.
    """
    listening, control = directory / name, directory / f"{name}.qmp"
    command = ["qemu-storage-daemon", "--chardev", f"socket,path={control},server=on,wait=on,id=c"]
    command += ["--monitor", "chardev=c", "--nbd-server", f"addr.type=unix,addr.path={listening},max-connections=0"]
    command += ["--blockdev", f"driver=file,filename={image},node-name=file,discard=unmap"]
    command += ["--blockdev", f"driver={driver},file=file,node-name=node,discard=unmap"]
    command += ["--export", "type=nbd,id=disk,node-name=node,name=disk,allocation-depth=on"]
    with _connected(command, control) as (_, connection), contextlib.closing(Monitor(connection)) as monitor:
        yield listening, monitor


class Monitor:
    """Just enough QMP to prepare a test."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lines = self._socket.makefile("r")
        self._lines.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while "event" in (answer := json.loads(self._lines.readline())):
            continue
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
