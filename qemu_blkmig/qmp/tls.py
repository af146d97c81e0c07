"""What a QEMU does TLS with: objects of the types tls-creds-psk and tls-creds-x509 (QEMU's manual, "TLS setup")."""

from __future__ import annotations

import os
from pathlib import Path

from qemu_blkmig.errors import Refused
from qemu_blkmig.nbd.address import Psk
from qemu_blkmig.processor import knows_aes
from qemu_blkmig.qmp.monitor import CommandFailed, Monitor

KEY_BYTES = 32
_WITHOUT_CHACHA20 = "NORMAL:-CHACHA20-POLY1305"
"""A priority string of GnuTLS. In TLS 1.3 it takes ChaCha20-Poly1305 for a pre-shared key if it may: AES-256-GCM has
another hash than the key (SHA-256), and AES-128-GCM it likes least. Seen on 3.7.9; QEMU's manual, "TLS setup"."""
_DH_PARAMETERS = """\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
"""The group ffdhe2048 of RFC 7919. Without a file of it QEMU makes a group of its own, and its main loop, the guest's
I/O with it, stands still for 0.2 to 0.9 s (seen on 7.2.22)."""


def new_key(user: str) -> Psk:
    """A key for one job."""
    return Psk(user, os.urandom(KEY_BYTES).hex())


async def add_key(monitor: Monitor, name: str, key: Psk, directory: Path) -> None:
    """Give a QEMU the key, in a file in `directory`, which is made, for its user alone, and must last as long.

    The way to the file must be open to QEMU's user. Raises `Refused`.
    """
    owner = _user_of(monitor.peer_pid)
    try:
        directory.mkdir(mode=0o700)
        file = directory / "keys.psk"
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        with os.fdopen(descriptor, "w") as keys:
            keys.write(f"{key.user}:{key.key}\n")
        (directory / "dh-params.pem").write_text(_DH_PARAMETERS)
        if owner not in (None, os.geteuid()):
            # The directory above is ours alone, and has only sockets that others may not connect to.
            directory.parent.chmod(0o711)
            for path in (*directory.iterdir(), directory):
                os.chown(path, owner, -1)
    except OSError as error:
        raise Refused(f"the key for TLS cannot be stored in {directory}: {error.strerror}") from error
    quick = {"priority": _WITHOUT_CHACHA20} if knows_aes() else {}
    await _add(monitor, "tls-creds-psk", name, directory, **quick)


async def add_certificates(monitor: Monitor, name: str, directory: str) -> None:
    """Have a QEMU use ca-cert.pem, server-cert.pem and server-key.pem in `directory`, and ask clients for theirs.

    Raises `Refused`.
    """
    await _add(monitor, "tls-creds-x509", name, directory, **{"verify-peer": True})


async def remove_objects(monitor: Monitor, prefix: str) -> list[str]:
    """Remove the objects whose names begin with `prefix`; their names. Raises what `Monitor.execute` raises."""
    there = await monitor.execute("qom-list", {"path": "/objects"})
    names = [each["name"] for each in there if each["name"].startswith(prefix)]
    for name in names:
        await monitor.execute("object-del", {"id": name})
    return names


async def _add(monitor: Monitor, kind: str, name: str, directory: str | Path, **more: object) -> None:
    arguments = {"qom-type": kind, "id": name, "dir": str(directory), "endpoint": "server", **more}
    try:
        await monitor.execute("object-add", arguments)
    except CommandFailed as error:
        raise Refused(
            f"{monitor.who} cannot do TLS with {directory}: {error.description}",
            advice="it must be able to read that directory, and have been built with GNUTLS; the way through ssh "
            "(without --data) needs neither",
        ) from error


def _user_of(process: int | None) -> int | None:
    try:
        return Path(f"/proc/{process}").stat().st_uid
    except OSError:
        return None
