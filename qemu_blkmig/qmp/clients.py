"""Who is still connected to an NBD server of ours: a QEMU is not told to stop it before nobody is.

QEMU 7.2 of Debian 12 (with CVE-2024-7409 mended) waits in nbd-server-stop until all its clients are gone, and does not
serve meanwhile one that is still negotiating: it waits for ever, its main loop and the guest with it
(tests/qmp/test_exports.py has it).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from qemu_blkmig.nbd.address import Address, UnixAddress

SOCKET = "source.nbd"
"""The name of the server's unix socket, in a job's runtime directory."""
POLL = 0.01
_CONNECTING, _CONNECTED = "02", "03"
_ESTABLISHED, _SYN_RECEIVED, _CLOSE_WAIT = "01", "03", "08"


async def nobody_connected(address: Address, seconds: float) -> bool:
    """Let nobody connect to a unix socket any more, and wait until nobody is connected to `address`, for so long."""
    if isinstance(address, UnixAddress):
        path = address.path
        return await _nobody_there(lambda each: each == path, seconds)
    port = address.port
    return await _until(lambda: not _tcp(port), seconds)


async def nobody_of_job_connected(prefix: str, seconds: float) -> bool:
    """The same of the unix socket of the job that has this prefix."""
    return await _nobody_there(lambda path: path.endswith(f"/{SOCKET}") and f"/{prefix}" in path, seconds)


async def _nobody_there(wanted: Callable[[str], bool], seconds: float) -> bool:
    for path in {path for _, path in _unix() if wanted(path)}:
        with contextlib.suppress(OSError):
            Path(path).unlink()
    states = (_CONNECTING, _CONNECTED)
    return await _until(lambda: not any(state in states and wanted(path) for state, path in _unix()), seconds)


async def _until(over: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not over():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(POLL)
    return True


def _unix() -> list[tuple[str, str]]:
    """State and path of each unix socket that has a path, at the server's end."""
    rows = (line.split(maxsplit=7) for line in _lines("unix"))
    return [(row[5], row[7]) for row in rows if len(row) == 8]


def _tcp(port: int) -> bool:
    """Whether a client is connected to the port here."""
    rows = (line.split() for name in ("tcp", "tcp6") for line in _lines(name))
    states = (_ESTABLISHED, _SYN_RECEIVED, _CLOSE_WAIT)
    return any(row[3] in states and int(row[1].rpartition(":")[2], 16) == port for row in rows)


def _lines(name: str) -> list[str]:
    """What the kernel tells of this network namespace, without the heading."""
    try:
        return Path(f"/proc/net/{name}").read_text(errors="surrogateescape").splitlines()[1:]
    except OSError:
        return []
