"""`--data`: a TCP connection of the data's own, past ssh, from the destination to the source QEMU's NBD server."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qemu_blkmig.errors import Refused, UsageError
from qemu_blkmig.job.place import Place, Ssh
from qemu_blkmig.nbd.address import X509, TcpAddress
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.qmp.tls import add_certificates, add_key, new_key
from qemu_blkmig.transport.ssh import ssh_command

FORMS = "tls://[HOST[:PORT]] or, with --insecure, tcp://[HOST[:PORT]]"
INSECURE = "--data tcp: everybody on the way can read and change the guest's disks"
_DATA = re.compile(r"(?P<kind>tls|tcp)://(?:(?:\[(?P<literal>[^\]]+)\]|(?P<host>[^:/\[\]\s]+))(?::(?P<port>\d+))?)?/?")


@dataclass(frozen=True)
class DataPath:
    """`host`: this host's address that the destination connects to; None: the one that leads there. `port` 0: any.

    `certificates`: directory of the user's, on both hosts; None: a key made for the job.
    """

    tls: bool
    host: str | None = None
    port: int = 0
    certificates: str | None = None


def parse_data_path(text: str | None, *, certificates: str | None = None, insecure: bool = False) -> DataPath | None:
    """What --data, --tls-creds and --insecure say together. Raises `UsageError`."""
    if text is None:
        if certificates is not None or insecure:
            raise UsageError("--tls-creds and --insecure are for --data", advice=f"write --data {FORMS}")
        return None
    match = _DATA.fullmatch(text)
    if match is None or not 0 <= int(match["port"] or 0) <= 65535:
        raise UsageError(f"not a way for the data: {text!r}", advice=f"write {FORMS}")
    tls = match["kind"] == "tls"
    if not tls and certificates is not None:
        raise UsageError("--tls-creds is for --data tls://")
    if tls == insecure:
        raise UsageError(
            "--insecure is for --data tcp://, and that only with it",
            advice="tcp is neither encrypted nor does it ask who connects; use tls:// wherever you can",
        )
    return DataPath(tls, match["literal"] or match["host"], int(match["port"] or 0), certificates)


async def open_data_path(path: DataPath, source: Monitor, place: Place, name: str, runtime: Path) -> TcpAddress:
    """Where the source QEMU's NBD server is to listen, with its TLS object `name` made; it is removed by that name.

    Raises `Refused`.
    """
    host = path.host if path.host is not None else await asyncio.to_thread(_address_towards, place)
    address = TcpAddress(host, path.port)
    if not path.tls:
        return address
    if path.certificates is not None:
        await add_certificates(source, name, path.certificates)
        return msgspec.structs.replace(address, tls=X509(path.certificates))
    key = new_key(name)
    await add_key(source, name, key, runtime / "tls")
    return msgspec.structs.replace(address, tls=key)


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
        [*ssh_command(), "-G", "--", place.host], capture_output=True, text=True, timeout=10, check=True
    )
    named = [line.split()[1] for line in told.stdout.splitlines() if line.startswith("hostname ")]
    return named[0] if named else place.host
