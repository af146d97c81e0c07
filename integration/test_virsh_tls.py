"""libvirt's TLS, and several connections, through the gate: the hosts have certificates for migration."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from integration.virthosts import VirtHosts, two_virt_hosts, with_certificates
from integration.virtlab import Domain, VirtLab
from qemu_blkmig.demo.guest import Kernel
from tests.certificates import make_certificates

SERVERS, CLIENTS = ("server-cert.pem", "server-key.pem"), ("client-cert.pem", "client-key.pem")
TCP = ("--migrateuri", "tcp://hostb:49180", "--listen-address", "0.0.0.0")


@pytest.fixture(scope="module")
def virt() -> Iterator[VirtHosts]:
    with (
        tempfile.TemporaryDirectory(prefix="pki-", dir="/tmp") as directory,
        two_virt_hosts(qemu_conf=with_certificates(Path(directory))) as hosts,
    ):
        yield hosts


@pytest.fixture(scope="module")
def virtlab(virt: VirtHosts, kernel: Kernel, initramfs: Callable[[bool], Path]) -> VirtLab:
    return VirtLab(virt, kernel, initramfs)


@pytest.mark.parametrize("words", [("--tls",), ("--tls", *TCP)], ids=["tls by a unix socket", "tls by tcp"])
def test_a_guest_moves_through_the_gate(virtlab: VirtLab, domain: Domain, words: tuple[str, ...]) -> None:
    virtlab.migrate(domain, *words).succeeded()
    virtlab.assert_arrived(domain)
    virtlab.assert_nothing_left()


@pytest.mark.parametrize(
    ("name", "why"),
    [("server-key.pem", "the destination has no "), ("ca-cert.pem", "this host has no ")],
)
def test_a_certificate_that_is_missing_is_told_before_anything_is_copied(
    virtlab: VirtLab, domain: Domain, name: str, why: str
) -> None:
    (configured,) = re.findall(r'^migrate_tls_x509_cert_dir = "(.*)"', _configuration(virtlab), re.MULTILINE)
    certificate = Path(configured, name)
    away = certificate.rename(certificate.with_suffix(".away"))
    try:
        virtlab.migrate(domain, "--tls").failed(3, f"--tls: {why}{certificate}", now="nothing was touched")
        virtlab.migrate(domain, "--dry-run").succeeded()
    finally:
        away.rename(certificate)
    virtlab.assert_stayed(domain)


def _configuration(virtlab: VirtLab) -> str:
    return virtlab.hosts.run("cat", "/etc/libvirt/qemu.conf")


@pytest.mark.parametrize(
    ("names", "days", "files", "words", "why"),
    [
        ("DNS:hostb", -1, SERVERS, (), "the destination's {}/server-cert.pem expired on "),
        ("DNS:hostb", 2, SERVERS, (), "the destination's {}/server-cert.pem is not signed by an "),
        ("DNS:hosta", 2, CLIENTS, (), "this host's {}/client-cert.pem is not signed by an "),
        ("DNS:any", 2, (), ("--tls-destination", "elsewhere"), "is for hosta, hostb, and it is asked for by elsewhere"),
    ],
    ids=["expired", "the server's of another authority", "the client's of another authority", "another name"],
)  # fmt: skip
def test_a_certificate_that_libvirt_would_not_take_is_told_before_anything_is_copied(
    virtlab: VirtLab,
    domain: Domain,
    names: str,
    days: int,
    files: tuple[str, ...],
    words: tuple[str, ...],
    why: str,
    tmp_path: Path,
) -> None:
    (configured,) = re.findall(r'^migrate_tls_x509_cert_dir = "(.*)"', _configuration(virtlab), re.MULTILINE)
    make_certificates(tmp_path, names, days)
    why = why.format(configured)
    with _in_place_of(Path(configured), tmp_path, files):
        virtlab.migrate(domain, "--tls", *words).failed(3, why, now="nothing was touched")
        assert why in virtlab.migrate(domain, "--tls", *words, "--dry-run").failed(3).stdout
        assert virtlab.images_there(domain) == []
    virtlab.assert_stayed(domain)
    virtlab.assert_nothing_left()


@contextlib.contextmanager
def _in_place_of(directory: Path, other: Path, names: Sequence[str]) -> Iterator[None]:
    before = {name: (directory / name).read_bytes() for name in names}
    try:
        for name in names:
            shutil.copyfile(other / name, directory / name)
        yield
    finally:
        for name, content in before.items():
            (directory / name).write_bytes(content)


def test_certificates_for_the_disks_own_way_are_told_before_an_image_is_made(
    virtlab: VirtLab, domain: Domain, tmp_path: Path
) -> None:
    make_certificates(tmp_path, "DNS:elsewhere")
    words, why = ("--data", "tls://", "--tls-creds", str(tmp_path)), "is for elsewhere, and it is asked for by "
    virtlab.migrate(domain, *words).failed(3, why, now="nothing was touched")
    assert why in virtlab.migrate(domain, *words, "--dry-run").failed(3).stdout
    assert virtlab.images_there(domain) == []
    virtlab.assert_stayed(domain)
    virtlab.assert_nothing_left()
