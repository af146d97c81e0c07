"""What would keep a migration with --tls from beginning: libvirt looks for it when the disks are copied."""

from __future__ import annotations

import asyncio
import contextlib

from qemu_blkmig.destination import certificates
from qemu_blkmig.destination.protocol import Certificates, CertificatesReply
from qemu_blkmig.errors import Refused
from qemu_blkmig.transport.client import AgentClient

_WHERE = "(qemu.conf, migrate_tls_x509_cert_dir)"


async def troubles(agent: AgentClient) -> tuple[list[str], list[str]]:
    """What is missing on either host, and warnings; nothing of a host that does not tell, as a confined agent."""
    problems, warnings = [], []
    with contextlib.suppress(OSError):
        if lost := await asyncio.to_thread(certificates.missing, (certificates.AUTHORITY,)):
            problems.append(f"--tls: this host has no {lost[0]} {_WHERE}")
        if lost := await asyncio.to_thread(certificates.missing, certificates.CLIENT):
            warnings.append(
                f"--tls: this host has no {' and no '.join(lost)}, which the destination asks for unless its "
                "migrate_tls_x509_verify is 0"
            )
    with contextlib.suppress(Refused):
        if lost := (await agent.expect(Certificates(), CertificatesReply)).missing:
            problems.append(f"--tls: the destination has no {' and no '.join(lost)} {_WHERE}")
    return problems, warnings
