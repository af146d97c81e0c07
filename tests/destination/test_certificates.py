"""Where a host's certificates for migration lie, and which are missing, by qemu.conf as libvirt reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_blkmig.destination import certificates


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without any of it."""
    monkeypatch.setattr(certificates, "CONFIGURATION", tmp_path / "qemu.conf")
    monkeypatch.setattr(certificates, "OF_MIGRATION", tmp_path / "libvirt-migrate")
    monkeypatch.setattr(certificates, "OF_ALL", tmp_path / "qemu")
    return tmp_path


def test_a_host_that_has_none_lacks_them_where_they_would_lie(host: Path) -> None:
    assert certificates.missing(certificates.SERVER) == [str(host / "qemu" / name) for name in certificates.SERVER]
    (host / "qemu").mkdir()
    for name in certificates.SERVER:
        (host / "qemu" / name).touch()
    assert certificates.missing(certificates.SERVER) == []


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
