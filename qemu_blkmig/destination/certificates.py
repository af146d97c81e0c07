"""The certificates of a host's ends of TLS connections: where they lie, which are not there, which are out of date.

Those of a migration are looked for as libvirt 9.0 does (qemu.conf, migrate_tls_x509_cert_dir), and all as QEMU 7.2
names and needs them (qcrypto_tls_creds_x509_load). Whether both hosts' fit each other: `handshake`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from qemu_blkmig.destination.protocol import CertificatesReply

CONFIGURATION = Path("/etc/libvirt/qemu.conf")
OF_MIGRATION = Path("/etc/pki/libvirt-migrate")
"""Taken where it is there and nothing else is configured."""
OF_ALL = Path("/etc/pki/qemu")
AUTHORITY = "ca-cert.pem"
SERVER = ("server-cert.pem", "server-key.pem")
CLIENT = ("client-cert.pem", "client-key.pem")
"""What a client is asked for, unless the server does not verify its peers."""

_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)
_VERSION = 0xA0
_UTC_TIME = 0x17
_EXTENSIONS, _NUMBER = 0xA3, 0x82
"""Tags of ASN.1."""
_AUTHORITY_KEY = bytes((0x55, 0x1D, 0x23))
"""The identifier of the extension that tells whose key has signed (RFC 5280, 4.2.1.1)."""


def look(directory: str | None, *, server: bool) -> CertificatesReply:
    """What a server, or a client, has in `directory` (None: where libvirt's migrations look).

    Raises `OSError` where libvirt's configuration, or what is there, cannot be read.
    """
    place = directory_of(configuration()) if directory is None else Path(directory)
    files = [place / name for name in (AUTHORITY, *(SERVER if server else CLIENT))]
    missing = [str(path) for path in files if not path.exists()]
    dated = [told for path in files[:2] if path.exists() and (told := out_of_date(path, datetime.now(UTC)))]
    return CertificatesReply(str(place), missing, dated, files[1].exists() and _names_authority_by_number(files[1]))


def configuration() -> str:
    """The text of qemu.conf. Raises `OSError` where it cannot be read."""
    try:
        return CONFIGURATION.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def directory_of(configuration: str) -> Path:
    """Where those of migrations lie, by the text of qemu.conf."""
    own = _value(configuration, "migrate_tls_x509_cert_dir")
    if own is None and OF_MIGRATION.exists():
        return OF_MIGRATION
    return Path(own or _value(configuration, "default_tls_x509_cert_dir") or OF_ALL)


def asks_clients(configuration: str) -> bool:
    """Whether a destination asks the source for a certificate, by the text of qemu.conf."""
    for name in ("migrate_tls_x509_verify", "default_tls_x509_verify"):
        if found := re.findall(rf"^[ \t]*{name}[ \t]*=[ \t]*(\d+)", configuration, re.MULTILINE):
            return int(found[-1]) != 0
    return True


def _value(configuration: str, name: str) -> str | None:
    found = re.findall(rf"^[ \t]*{name}[ \t]*=[ \t]*([\"'])(.*?)\1", configuration, re.MULTILINE)
    return str(found[-1][1]) if found else None


def out_of_date(path: Path, now: datetime) -> str | None:
    """What is wrong with the dates of a certificate, the first one of its file, or of all of an authority's."""
    try:
        found = [validity(each) for each in _certificates(path)]
    except (ValueError, IndexError):
        # The handshake tells what it is, if it is no certificate.
        return None
    if path.name != AUTHORITY:
        found = found[:1]
    if not found or any(begin <= now <= end for begin, end in found):
        return None
    begin, end = found[0]
    if now > end:
        return f"{path} expired on {_shown(end)}"
    return f"{path} is valid from {_shown(begin)} on, and the host's clock says {_shown(now)}"


def _certificates(path: Path) -> list[bytes]:
    """All of a file, in DER. Raises `ValueError` where one is not even encoded as such."""
    return [base64.b64decode(encoded) for encoded in _CERTIFICATE.findall(path.read_text(errors="replace"))]


def _names_authority_by_number(path: Path) -> bool:
    """Whether it, or one that it comes with, does; False, too, where that cannot be told."""
    try:
        return any(names_authority_by_number(each) for each in _certificates(path))
    except (ValueError, IndexError):
        return False


def names_authority_by_number(certificate: bytes) -> bool:
    """Whether a certificate (in DER) names the serial number of the one that has signed it. Raises as `validity`."""
    for listed in (content for tag, content in _signed(certificate) if tag == _EXTENSIONS):
        for _, extension in _elements(_first(listed)):
            (_, identifier), *_, (_, value) = _elements(extension)
            if identifier == _AUTHORITY_KEY:
                return any(tag == _NUMBER for tag, _ in _elements(_first(value)))
    return False


def _shown(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def validity(certificate: bytes) -> tuple[datetime, datetime]:
    """From when to when a certificate (X.509 in DER) is valid. Raises `ValueError` or the like for what is none."""
    fields = [each for each in _signed(certificate) if each[0] != _VERSION]
    # RFC 5280, 4.1: serial number, signature, issuer, validity.
    begin, end = _elements(fields[3][1])
    return _moment(*begin), _moment(*end)


def _signed(certificate: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of what the authority has signed."""
    return _elements(_first(_first(certificate)))


def _moment(tag: int, content: bytes) -> datetime:
    form = "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"
    return datetime.strptime(content.decode("ascii"), form).replace(tzinfo=UTC)


def _first(encoded: bytes) -> bytes:
    """The contents of the first element. Raises `ValueError` where there is none."""
    for _, content in _elements(encoded):
        return content
    raise ValueError("no element of ASN.1")


def _elements(encoded: bytes) -> Iterator[tuple[int, bytes]]:
    """The elements of an ASN.1 sequence's contents, each with its tag."""
    while encoded:
        length, begin = encoded[1], 2
        if length & 0x80:
            begin += length & 0x7F
            length = int.from_bytes(encoded[2:begin], "big")
        yield encoded[0], encoded[begin : begin + length]
        encoded = encoded[begin + length :]
