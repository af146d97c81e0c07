"""Where the gate stands in a domain's migration stream: what the source's QEMU connects to, and what lies behind it."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from dataclasses import dataclass
from pathlib import Path

from qemu_blkmig.destination.migration_sockets import socket_path
from qemu_blkmig.errors import Refused, UsageError
from qemu_blkmig.job.managed_options import ManagedOptions, migration_address
from qemu_blkmig.job.place import Local
from qemu_blkmig.transport.host import Host
from qemu_blkmig.virt.kept import is_session

PORTS = range(49152, 49216)
"""libvirt's own for migration (qemu.conf)."""
CONNECT = 20.0
"""Seconds in which the destination's QEMU must take a connection."""


@dataclass(frozen=True)
class Gateway:
    """`listener`: where the source's QEMU comes to, by `uri`; the destination's is reached at `address`."""

    uri: str
    listener: socket.socket
    address: str | tuple[str, int]

    def connect(self) -> socket.socket:
        """Connect to the destination's QEMU, which may then be silent for as long as it likes. Raises `OSError`."""
        if isinstance(self.address, tuple):
            end = socket.create_connection(self.address, CONNECT)
        else:
            end = socket.socket(socket.AF_UNIX)
            try:
                end.settimeout(CONNECT)
                end.connect(self.address)
            except OSError:
                end.close()
                raise
        end.settimeout(None)
        return end

    def close(self) -> None:
        """Remove what the source's QEMU came to."""
        if isinstance(self.listener.getsockname() if self.listener.fileno() >= 0 else "", str):
            Path(self.uri.removeprefix("unix://")).unlink(missing_ok=True)


async def gateway(options: ManagedOptions, host: Host, job: str, number: int) -> Gateway:
    """Listen for the source's QEMU, in the job's attempt `number`: on a unix socket, whose like at the destination is
    reached through ssh, or where the user says. Raises `Refused`, `DestinationFailed`, `UsageError`.
    """
    if options.migrate_uri is not None:
        return _tcp(options.migrate_uri)
    if isinstance(options.place, Local):
        raise UsageError("without ssh to the destination the guest's RAM needs a way: --migrateuri tcp://HOST:PORT")
    return await _unix(host, socket_path(job, number, session=is_session(options.target_uri)))


async def _unix(host: Host, path: str) -> Gateway:
    listener = socket.socket(socket.AF_UNIX)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108
        listener.bind(path)
        Path(path).chmod(0o600)
        listener.listen(8)
        return Gateway(f"unix://{path}", listener, await host.reach(path))
    except OSError as error:
        listener.close()
        raise Refused(f"cannot listen on {path}: {error.strerror}") from error
    except BaseException:
        listener.close()
        raise


def _tcp(uri: str) -> Gateway:
    host, given = migration_address(uri)
    wanted = random.sample(PORTS, len(PORTS)) if given is None else [given]
    for port in wanted:
        listener = socket.socket(socket.AF_INET)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen(64)
        except OSError:
            listener.close()
            continue
        return Gateway(f"tcp://127.0.0.1:{port}", listener, (host, port))
    raise Refused(f"no port of {wanted[0] if len(wanted) == 1 else '49152 to 49215'} is free on 127.0.0.1")
