"""Certificates of two hosts are tried by the handshake to come, which the agent's connection carries."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qemu_blkmig.destination import certificates
from qemu_blkmig.errors import Refused
from qemu_blkmig.job.certificates_tried import of_data, of_migration, require_data
from qemu_blkmig.job.datapath import DataPath
from qemu_blkmig.job.place import Local
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.local import LocalHost
from tests.certificates import make_certificates, make_with_renewed_authority

HERE = Local("/")


@pytest.fixture
async def agent() -> AsyncIterator[AgentClient]:
    client = await LocalHost().start_agent()
    yield client
    await client.abandon()


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """Certificates for 127.0.0.1 and hostb; both hosts are one, and have the same."""
    make_certificates(tmp_path, "IP:127.0.0.1,DNS:hostb")
    return tmp_path


def lock(key: Path) -> None:
    command = ["openssl", "pkey", "-aes256", "-passout", "pass:x", "-in", str(key)]
    key.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)


def data(pki: Path, host: str = "127.0.0.1") -> DataPath:
    return DataPath(tls=True, host=host, certificates=str(pki))


async def test_those_that_will_do_are_not_spoken_of(agent: AgentClient, pki: Path) -> None:
    assert await of_data(agent, data(pki), HERE) == ([], [])
    assert await of_data(agent, data(pki, "hostb"), HERE) == ([], [])
    assert await of_data(agent, DataPath(tls=True), HERE) == ([], []), "a key of the job's"
    assert await of_data(agent, None, HERE) == ([], [])


async def test_one_for_another_name_is_told_with_the_names_that_it_has(agent: AgentClient, pki: Path) -> None:
    (problem,), _ = await of_data(agent, data(pki, "hosta"), HERE)
    assert problem == (
        f"--tls-creds: this host's {pki}/server-cert.pem is for 127.0.0.1, hostb, and it is asked for by hosta: "
        "--data tls://NAME names another"
    )


async def test_an_address_that_stands_for_a_name_will_not_do_as_it_does_not_for_gnutls(
    agent: AgentClient, tmp_path: Path
) -> None:
    """Neither libnbd nor QEMU connects (GnuTLS 3.7.9; it did before 3.6)."""
    make_certificates(tmp_path, "DNS:127.0.0.1")
    (problem,), _ = await of_data(agent, data(tmp_path), HERE)
    assert "has 127.0.0.1 as a name, but that is an address" in problem and "subjectAltName=IP:127.0.0.1" in problem


async def test_a_common_name_does_not_count_beside_an_address_as_it_does_not_for_gnutls(
    agent: AgentClient, tmp_path: Path
) -> None:
    make_certificates(tmp_path, "IP:127.0.0.1")
    (problem,), _ = await of_data(agent, data(tmp_path, "server"), HERE)
    assert "server-cert.pem is for 127.0.0.1, and it is asked for by server" in problem
    make_certificates(tmp_path, "email:server@example.org")
    assert await of_data(agent, data(tmp_path, "server"), HERE) == ([], [])


@pytest.mark.parametrize(("strange", "whose"), [("server", "this host's"), ("client", "the destination's")])
async def test_one_of_another_authority_is_told_whichever_side_it_is_of(
    agent: AgentClient, pki: Path, strange: str, whose: str
) -> None:
    (pki / "other").mkdir()
    make_certificates(pki / "other", "IP:127.0.0.1")
    for name in (f"{strange}-cert.pem", f"{strange}-key.pem"):
        shutil.copyfile(pki / "other" / name, pki / name)
    (problem,), _ = await of_data(agent, data(pki), HERE)
    assert problem.startswith(f"--tls-creds: {whose} {pki}/{strange}-cert.pem is not signed by an authority that ")


async def test_one_that_an_authority_has_signed_whose_own_was_renewed_since_is_not_refused(
    agent: AgentClient, tmp_path: Path
) -> None:
    """GnuTLS takes it: the key is the same."""
    make_with_renewed_authority(tmp_path, "IP:127.0.0.1")
    problems, (warning,) = await of_data(agent, data(tmp_path), HERE)
    assert problems == [] and "could not be tried beforehand (the destination: unable to get local issuer" in warning


async def test_a_key_of_another_certificate_is_told(agent: AgentClient, pki: Path) -> None:
    shutil.copyfile(pki / "client-key.pem", pki / "server-key.pem")
    assert (await of_data(agent, data(pki), HERE))[0] == [
        f"--tls-creds: this host's certificates in {pki} cannot be used: key values mismatch"
    ]


async def test_a_client_without_a_certificate_is_told_what_it_lacks(agent: AgentClient, pki: Path) -> None:
    (pki / "client-cert.pem").unlink()
    assert (await of_data(agent, data(pki), HERE))[0] == [
        f"--tls-creds: this host asks the destination for a certificate, which has no {pki}/client-cert.pem"
    ]


async def test_what_has_expired_or_is_missing_is_told_of_both_hosts_at_once(agent: AgentClient, pki: Path) -> None:
    make_certificates(pki, "IP:127.0.0.1", days=-1)
    first, second = (await of_data(agent, data(pki), HERE))[0]
    assert first.startswith(f"--tls-creds: this host's {pki}/server-cert.pem expired on ")
    assert second.startswith(f"--tls-creds: the destination's {pki}/client-cert.pem expired on ")
    assert first.endswith(" UTC: renew it")
    (pki / "ca-cert.pem").unlink()
    told = (await of_data(agent, data(pki), HERE))[0]
    assert [f"--tls-creds: {who} has no {pki}/ca-cert.pem" for who in ("this host", "the destination")] == told[:2]


async def test_an_encrypted_key_cannot_be_tried_and_asks_nobody(agent: AgentClient, pki: Path) -> None:
    await asyncio.to_thread(lock, pki / "server-key.pem")
    assert await of_data(agent, data(pki), HERE) == (
        [],
        ["--tls-creds: whether the certificates will do could not be tried beforehand (this host: a key is encrypted)"],
    )


async def test_a_job_is_refused_before_anything_is_made(agent: AgentClient, pki: Path) -> None:
    told: list[str] = []
    await require_data(agent, data(pki), HERE, told.append)
    with pytest.raises(Refused, match="asked for by hosta") as refused:
        await require_data(agent, data(pki, "hosta"), HERE, told.append)
    assert refused.value.state == "nothing was touched" and told == []


async def test_a_migration_is_tried_with_what_libvirt_is_configured_to_use(
    agent: AgentClient, pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent here has this host's own configuration: none, so that its side lacks them."""
    monkeypatch.setattr(certificates, "CONFIGURATION", pki / "qemu.conf")
    (pki / "qemu.conf").write_text(f'migrate_tls_x509_cert_dir = "{pki}"\n')
    (problem,), warnings = await of_migration(agent, "hostb")
    assert problem.startswith("--tls: the destination has no ") and warnings == []
    assert problem.endswith(" (qemu.conf, migrate_tls_x509_cert_dir)")
