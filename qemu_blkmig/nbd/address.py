"""Where an NBD server is reached, and what its connections are encrypted with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec


class UnixAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="unix"):
    """A unix socket on the host of whoever connects."""

    path: str

    def __str__(self) -> str:
        return self.path


class Psk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="psk"):
    """TLS with a key that both sides know (hexadecimal); it is never shown."""

    user: str
    key: str

    def __repr__(self) -> str:
        return f"Psk(user={self.user!r})"


class X509(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="x509"):
    """TLS with certificates in `directory` on the host of whoever connects.

    They are ca-cert.pem, client-cert.pem and client-key.pem, as libnbd (nbd_set_tls_certificates(3)) and QEMU name
    them. The server's certificate must name its host.
    """

    directory: str


class TcpAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="tcp"):
    """A TCP port; without `tls` everybody on the way can read and change what passes."""

    host: str
    port: int
    tls: Psk | X509 | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'tcp'}://{host}:{self.port}"


Address = UnixAddress | TcpAddress


class Export(NamedTuple):
    """An export, by its `name`, of the NBD server at `address`."""

    address: Address
    name: str


def address_of(where: str | Path | Address) -> Address:
    """`where`, of which a path means a unix socket."""
    return UnixAddress(str(where)) if isinstance(where, (str, Path)) else where
