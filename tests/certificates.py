"""Certificates for TLS between QEMUs, as they and libvirt name their files."""

from __future__ import annotations

import subprocess
from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_SIGNED = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial")


def make_with_renewed_authority(directory: Path, names: str) -> None:
    """As `make_certificates`, but the authority has renewed its own since, whose serial number they name."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True)

    make_certificates(directory, names)
    for side in ("server", "client"):
        with (directory / f"{side}.ext").open("a") as file:
            file.write("authorityKeyIdentifier=keyid,issuer:always\n")
        own = ("-in", f"{side}.csr", "-extfile", f"{side}.ext", "-out", f"{side}-cert.pem")
        openssl("x509", "-req", *own, *_SIGNED, "-days", "2")
    openssl("req", "-x509", "-new", "-key", "ca-key.pem", "-out", "ca-cert.pem", "-days", "2", "-subj", "/CN=ca")


def make_certificates(directory: Path, names: str, days: int = 2) -> None:
    """An authority, and certificates of its as server and as client, for `names` (as of OpenSSL's subjectAltName).

    They expire in as many `days`, negative: they have expired; the authority does not.
    """

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True)

    signed = (*_SIGNED, "-days", str(days))
    openssl("req", "-x509", *_KEY, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-days", "2", "-subj", "/CN=ca")
    for side in ("server", "client"):
        told = f"subjectAltName={names}\nextendedKeyUsage={side}Auth\nkeyUsage=digitalSignature\n"
        (directory / f"{side}.ext").write_text(told)
        openssl("req", *_KEY, "-keyout", f"{side}-key.pem", "-out", f"{side}.csr", "-subj", f"/CN={side}")
        openssl("x509", "-req", "-in", f"{side}.csr", *signed, "-extfile", f"{side}.ext", "-out", f"{side}-cert.pem")
