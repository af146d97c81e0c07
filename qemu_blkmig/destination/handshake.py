"""One end of a TLS handshake on trial, with the certificates that QEMU or libnbd will use later.

No connection is made: what an end says is carried to the other one by whoever wants to know. OpenSSL makes the
handshake on trial, GnuTLS the one that counts; where the two differ (revocation lists, what a certificate's key may be
used for) nothing is said to be wrong.
"""

from __future__ import annotations

import contextlib
import ipaddress
import ssl
from pathlib import Path
from typing import Any, Literal

from qemu_blkmig.destination.certificates import AUTHORITY, CLIENT, SERVER, asks_clients, configuration, directory_of
from qemu_blkmig.destination.protocol import Fault, Handshake, HandshakeReply

_DATES = (9, 10)
_AUTHORITY = (2, 7, 18, 19, 20, 21)
_NAME = (62, 64)
"""What OpenSSL says of a peer's certificate (x509_vfy.h)."""
_NONE_SHOWN = "PEER_DID_NOT_RETURN_A_CERTIFICATE"


class _Locked(Exception):
    """The key is encrypted."""


class End:
    """One end. It reads files and calculates: use it in a thread."""

    def __init__(self, said: ssl.MemoryBIO, saying: ssl.MemoryBIO, tls: ssl.SSLObject | None, fault: Fault | None):
        """Use `of`."""
        self._said = said
        self._saying = saying
        self._tls = tls
        self._fault = fault
        self._names: list[str] = []

    @classmethod
    def of(cls, op: Handshake) -> End:
        """The end that is asked for; what keeps it from beginning it tells when it is asked to."""
        said, saying = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            tls = _context(op).wrap_bio(said, saying, server_side=op.server, server_hostname=op.name)
        except _Locked:
            return cls(said, saying, None, Fault("unclear", "a key is encrypted"))
        except ssl.SSLError as error:
            return cls(said, saying, None, Fault("own", error.reason or str(error)))
        except (OSError, ValueError) as error:
            return cls(said, saying, None, Fault("unclear", getattr(error, "strerror", None) or str(error)))
        return cls(said, saying, tls, None)

    def answer(self, said: bytes) -> HandshakeReply:
        """What it says to what the other end `said`, and what it will not put up with, if anything."""
        if self._tls is not None and self._fault is None:
            self._said.write(said)
            self._fault = self._go_on(self._tls)
        return HandshakeReply(self._saying.read(), self._fault, self._names)

    def _go_on(self, tls: ssl.SSLObject) -> Fault | None:
        try:
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                self._names = _names(tls)
                if tls.server_hostname is not None and _is_only_for_others(tls):
                    return Fault("name", "the common name does not count beside an address")
                # Tickets come afterwards, and a client's being refused.
                tls.read(1)
        except ssl.SSLCertVerificationError as error:
            return Fault(_kind(error.verify_code), error.verify_message)
        except ssl.SSLError as error:
            words = error.reason or str(error)
            return Fault("none-shown" if words == _NONE_SHOWN else "unclear", words)
        return None


def _context(op: Handshake) -> ssl.SSLContext:
    """Raises `OSError`, `ssl.SSLError` among them, and `_Locked`."""
    place = directory_of(configuration()) if op.directory is None else Path(op.directory)
    certificate, key = (place / name for name in (SERVER if op.server else CLIENT))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if op.server else ssl.PROTOCOL_TLS_CLIENT)
    # As GnuTLS: an authority need not be the topmost, and Debian's OpenSSL would ask for longer keys than it does.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    if op.server:
        # Whoever names the directory has QEMU ask in any case (`qmp.tls`).
        asks = op.directory is not None or asks_clients(configuration())
        context.verify_mode = ssl.CERT_REQUIRED if asks else ssl.CERT_NONE
    else:
        context.check_hostname = op.name is not None
        context.hostname_checks_common_name = True
    context.load_verify_locations(place / AUTHORITY)
    if op.server or (certificate.exists() and key.exists()):
        context.load_cert_chain(certificate, key, _locked)
    return context


def _locked() -> bytes:
    raise _Locked


def _kind(code: int) -> Literal["dates", "authority", "name", "unclear"]:
    if code in _DATES:
        return "dates"
    if code in _AUTHORITY:
        return "authority"
    return "name" if code in _NAME else "unclear"


def _is_only_for_others(tls: ssl.SSLObject) -> bool:
    """Whether it was its common name that OpenSSL took, where GnuTLS goes by what else it is for."""
    told: dict[str, Any] = tls.getpeercert() or {}
    kinds = {kind for kind, _ in told.get("subjectAltName", ())}
    return bool(kinds & {"IP Address", "URI"}) and "DNS" not in kinds and not _is_address(str(tls.server_hostname))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _names(tls: ssl.SSLObject) -> list[str]:
    """Whose the peer's certificate is, as far as it was verified."""
    told: dict[str, Any] = tls.getpeercert() or {}
    named = [str(value) for _, value in told.get("subjectAltName", ())]
    common = [str(value) for part in told.get("subject", ()) for name, value in part if name == "commonName"]
    return named or common
