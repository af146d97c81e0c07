"""Certificates for TLS between QEMUs, as they and libvirt name their files."""

from __future__ import annotations

import subprocess
from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_SIGNED = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", "2")


def make_certificates(directory: Path, names: str) -> None:
    """An authority, and certificates of its as server and as client, for `names` (as of OpenSSL's subjectAltName)."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True)

    openssl("req", "-x509", *_KEY, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-days", "2", "-subj", "/CN=ca")
    for side in ("server", "client"):
        told = f"subjectAltName={names}\nextendedKeyUsage={side}Auth\nkeyUsage=digitalSignature\n"
        (directory / f"{side}.ext").write_text(told)
        openssl("req", *_KEY, "-keyout", f"{side}-key.pem", "-out", f"{side}.csr", "-subj", f"/CN={side}")
        openssl("x509", "-req", "-in", f"{side}.csr", *_SIGNED, "-extfile", f"{side}.ext", "-out", f"{side}-cert.pem")
