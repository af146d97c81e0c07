"""What is to watch a job, as the command line asks for it; `observe.watch` does it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qemu_blkmig.errors import UsageError

LOOPBACK = "127.0.0.1"


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port of [HOST:]PORT; without a host only this one can connect. Raises `UsageError`."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not port.isdecimal() or int(port) > 65535 or (colon and not host):
        raise UsageError(f"not an address: {text!r}", advice="write [HOST:]PORT, such as 9123 or 0.0.0.0:9123")
    return host or LOOPBACK, int(port)


@dataclass(frozen=True)
class Asked:
    """What is to watch: the kind of display, and where metrics go, if anywhere.

    `command`, `source`, `destination`: what the metrics are labelled with.
    """

    progress: str
    command: str
    source: str
    destination: str
    file: Path | None = None
    listen: tuple[str, int] | None = None
