"""The certificates that this host's libvirt gives its QEMUs for a migration with TLS: which of them are not there.

As libvirt 9.0 looks for them (qemu.conf, migrate_tls_x509_cert_dir), and QEMU 7.2 needs them
(qcrypto_tls_creds_x509_load). What is in them is not looked at.
"""

from __future__ import annotations

import re
from pathlib import Path

CONFIGURATION = Path("/etc/libvirt/qemu.conf")
OF_MIGRATION = Path("/etc/pki/libvirt-migrate")
"""Taken where it is there and nothing else is configured."""
OF_ALL = Path("/etc/pki/qemu")
AUTHORITY = "ca-cert.pem"
SERVER = (AUTHORITY, "server-cert.pem", "server-key.pem")
CLIENT = ("client-cert.pem", "client-key.pem")
"""What a client is asked for, unless the server's migrate_tls_x509_verify is 0."""


def missing(names: tuple[str, ...]) -> list[str]:
    """The paths of those files that are not there. Raises `OSError` where the configuration cannot be read."""
    try:
        text = CONFIGURATION.read_text(errors="replace")
    except FileNotFoundError:
        text = ""
    directory = directory_of(text)
    return [str(directory / name) for name in names if not (directory / name).exists()]


def directory_of(configuration: str) -> Path:
    """Where they lie, by the text of qemu.conf."""
    own = _value(configuration, "migrate_tls_x509_cert_dir")
    if own is None and OF_MIGRATION.exists():
        return OF_MIGRATION
    return Path(own or _value(configuration, "default_tls_x509_cert_dir") or OF_ALL)


def _value(configuration: str, name: str) -> str | None:
    found = re.findall(rf"^[ \t]*{name}[ \t]*=[ \t]*([\"'])(.*?)\1", configuration, re.MULTILINE)
    return str(found[-1][1]) if found else None
