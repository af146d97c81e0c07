"""Certificates for TLS between QEMUs, as they and libvirt name their files."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_SIGNED = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial")
_DATE = "%Y%m%d%H%M%SZ"
_CONFIGURATION = """
[ca]
default_ca = own
[own]
certificate = ca-cert.pem
private_key = ca-key.pem
database = issued
unique_subject = no
rand_serial = yes
new_certs_dir = .
default_md = sha256
policy = any
[any]
commonName = supplied
"""


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

    (directory / "ca.conf").write_text(_CONFIGURATION)
    (directory / "issued").touch()
    ends = datetime.now(UTC) + timedelta(days=days)
    begins = min(datetime.now(UTC), ends - timedelta(days=1))
    # `openssl x509 -days` takes no negative number since OpenSSL 3.4, and no dates before.
    dated = ("-startdate", f"{begins:{_DATE}}", "-enddate", f"{ends:{_DATE}}")
    openssl("req", "-x509", *_KEY, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-days", "2", "-subj", "/CN=ca")
    for side in ("server", "client"):
        told = f"subjectAltName={names}\nextendedKeyUsage={side}Auth\nkeyUsage=digitalSignature\n"
        (directory / f"{side}.ext").write_text(told)
        openssl("req", *_KEY, "-keyout", f"{side}-key.pem", "-out", f"{side}.csr", "-subj", f"/CN={side}")
        own = ("-in", f"{side}.csr", "-extfile", f"{side}.ext", "-out", f"{side}-cert.pem")
        openssl("ca", "-batch", "-notext", "-config", "ca.conf", *dated, *own)
