"""libvirt's TLS, and several connections, through the gate: the hosts have certificates for migration."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.virthosts import PLAIN, VirtHosts, two_virt_hosts
from integration.virtlab import Domain, VirtLab
from qemu_blkmig.demo.guest import Kernel
from tests.certificates import make_certificates

TCP = ("--migrateuri", "tcp://hostb:49180", "--listen-address", "0.0.0.0")


@pytest.fixture(scope="module")
def virt() -> Iterator[VirtHosts]:
    with tempfile.TemporaryDirectory(prefix="pki-", dir="/tmp") as directory:
        make_certificates(Path(directory), "DNS:hosta,DNS:hostb")
        with two_virt_hosts(qemu_conf=f'{PLAIN}migrate_tls_x509_cert_dir = "{directory}"\n') as hosts:
            yield hosts


@pytest.fixture(scope="module")
def virtlab(virt: VirtHosts, kernel: Kernel, initramfs: Callable[[bool], Path]) -> VirtLab:
    return VirtLab(virt, kernel, initramfs)


@pytest.mark.parametrize(
    "words", [("--tls",), ("--tls", *TCP), ("--parallel", "--parallel-connections", "3", *TCP)],
    ids=["tls by a unix socket", "tls by tcp", "parallel"],
)  # fmt: skip
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


def test_a_certificate_of_another_host_is_refused_and_the_guest_stays(virtlab: VirtLab, domain: Domain) -> None:
    virtlab.migrate(domain, "--tls", "--tls-destination", "elsewhere").failed(
        1, "does not match the hostname elsewhere", now="the guest runs at the source"
    )
    virtlab.assert_stayed(domain)
    virtlab.cleaned_up()
