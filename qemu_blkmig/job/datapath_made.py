"""The data's own TCP connection, from the destination to the source QEMU's NBD server: where that is to listen."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from pathlib import Path

import msgspec

from qemu_blkmig.errors import Refused
from qemu_blkmig.job.datapath import DataPath
from qemu_blkmig.job.place import Place, Ssh
from qemu_blkmig.nbd.address import X509, TcpAddress
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.qmp.tls import add_certificates, add_key, new_key
from qemu_blkmig.transport.route import ssh_command


async def open_data_path(path: DataPath, source: Monitor, place: Place, name: str, runtime: Path) -> TcpAddress:
    """Where the source QEMU's NBD server is to listen, with its TLS object `name` made; it is removed by that name.

    Raises `Refused`.
    """
    address = TcpAddress(await address_of_data(path, place), path.port)
    if not path.tls:
        return address
    if path.certificates is not None:
        await add_certificates(source, name, path.certificates)
        return msgspec.structs.replace(address, tls=X509(path.certificates))
    key = new_key(name)
    await add_key(source, name, key, runtime / "tls")
    return msgspec.structs.replace(address, tls=key)


async def address_of_data(path: DataPath, place: Place) -> str:
    """What the destination connects to. Raises `Refused`."""
    return path.host if path.host is not None else await asyncio.to_thread(_address_towards, place)


def _address_towards(place: Place) -> str:
    """This host's address on the way to `place`."""
    if not isinstance(place, Ssh):
        return "127.0.0.1"
    try:
        name = _name_of(place)
        family, kind, _, _, there = socket.getaddrinfo(name, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            # Connecting a datagram socket sends nothing: it asks the routing table.
            probe.connect(there)
            return str(probe.getsockname()[0])
    except (OSError, subprocess.SubprocessError) as error:
        raise Refused(
            f"which address of this host leads to {place.host} cannot be told: {error}",
            advice="name it: --data tls://HOST",
        ) from error


def _name_of(place: Ssh) -> str:
    """The name or address that ssh connects to: the user's configuration may say another than the one given."""
    told = subprocess.run(
        [*ssh_command(), "-G", "--", place.host],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=10,
        check=True,
    )
    named = [line.split()[1] for line in told.stdout.splitlines() if line.startswith("hostname ")]
    return named[0] if named else place.host
