"""Where a host's certificates for migration lie, by qemu.conf as libvirt reads it; which are missing or out of date."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qemu_blkmig.destination import certificates
from tests.certificates import make_certificates


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without any of it."""
    monkeypatch.setattr(certificates, "CONFIGURATION", tmp_path / "qemu.conf")
    monkeypatch.setattr(certificates, "OF_MIGRATION", tmp_path / "libvirt-migrate")
    monkeypatch.setattr(certificates, "OF_ALL", tmp_path / "qemu")
    return tmp_path


def test_a_host_that_has_none_lacks_them_where_they_would_lie(host: Path) -> None:
    names = (certificates.AUTHORITY, *certificates.SERVER)
    assert certificates.look(None, server=True).missing == [str(host / "qemu" / name) for name in names]
    (host / "qemu").mkdir()
    for name in names:
        (host / "qemu" / name).touch()
    assert certificates.look(None, server=True).missing == []
    lacks = [str(host / "qemu" / name) for name in certificates.CLIENT]
    assert certificates.look(str(host / "qemu"), server=False).missing == lacks


@pytest.mark.parametrize(
    ("configured", "there", "expected"),
    [
        ("", False, "qemu"),
        ("", True, "libvirt-migrate"),
        ('#migrate_tls_x509_cert_dir = "/commented"', False, "qemu"),
        ('default_tls_x509_cert_dir = "/all"', False, "/all"),
        ('default_tls_x509_cert_dir = "/all"', True, "libvirt-migrate"),
        ('default_tls_x509_cert_dir = "/all"\n migrate_tls_x509_cert_dir="/own" # ours', True, "/own"),
    ],
)
def test_what_is_configured_for_migration_comes_before_what_is_there_and_that_before_the_rest(
    host: Path, configured: str, there: bool, expected: str
) -> None:
    if there:
        (host / "libvirt-migrate").mkdir()
    assert certificates.directory_of(configured) == host / expected


@pytest.mark.parametrize(
    ("configured", "asks"),
    [
        ("", True),
        ("migrate_tls_x509_verify = 0", False),
        ("#migrate_tls_x509_verify = 0", True),
        ("default_tls_x509_verify = 0", False),
        ("default_tls_x509_verify = 0\nmigrate_tls_x509_verify=1", True),
    ],
)
def test_clients_are_asked_for_a_certificate_unless_that_is_turned_off(configured: str, asks: bool) -> None:
    assert certificates.asks_clients(configured) is asks


def test_what_has_expired_is_told_with_its_date(host: Path) -> None:
    make_certificates(host, "DNS:hostb", days=-1)
    (told,) = certificates.look(str(host), server=True).dated
    yesterday = datetime.now(UTC) - timedelta(days=1)
    assert told.startswith(f"{host}/server-cert.pem expired on {yesterday:%Y-%m-%d} ")
    authority = host / certificates.AUTHORITY
    assert certificates.out_of_date(authority, datetime.now(UTC)) is None
    assert certificates.out_of_date(authority, datetime.now(UTC) + timedelta(days=3))


def test_what_is_not_valid_yet_is_told_with_the_host_s_clock(host: Path) -> None:
    make_certificates(host, "DNS:hostb")
    long_ago = datetime(2001, 2, 3, 4, 5, tzinfo=UTC)
    told = certificates.out_of_date(host / "server-cert.pem", long_ago)
    assert told and f"is valid from {datetime.now(UTC):%Y}" in told and "clock says 2001-02-03 04:05 UTC" in told


def test_an_authority_that_was_renewed_is_valid_beside_the_old_one(host: Path) -> None:
    make_certificates(host, "DNS:hostb", days=-1)
    authority = host / certificates.AUTHORITY
    old, new = (host / "server-cert.pem").read_text(), authority.read_text()
    authority.write_text(old)
    assert certificates.look(str(host), server=False).dated[0].startswith(f"{authority} expired")
    authority.write_text(old + new)
    shutil.copyfile(authority, host / "client-cert.pem")
    assert certificates.look(str(host), server=False).dated == [
        certificates.out_of_date(host / "client-cert.pem", datetime.now(UTC))
    ], "of a certificate and what it is signed by only its own date is told"


def test_what_is_no_certificate_has_no_date(host: Path) -> None:
    form = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n"
    for text in ("", form.format("MAA="), form.format(""), form.format("MAIwAA=="), "\0"):
        (host / "server-cert.pem").write_text(text)
        assert certificates.out_of_date(host / "server-cert.pem", datetime.now(UTC)) is None
        told = certificates.look(str(host), server=True)
        assert not told.dated and not told.by_number
