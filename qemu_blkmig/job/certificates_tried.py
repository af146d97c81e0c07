"""Certificates that would keep a TLS connection between the hosts from coming about, told before anything is copied.

libvirt looks at those of a migration (--tls) once the disks are copied, and libnbd at those of --data tls:// when
images are made already. So each host tells what it lacks and what is out of date by its clock, and then both make the
very handshake that will be made, its words carried by the agent's connection (`destination.handshake`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from qemu_blkmig.destination import certificates
from qemu_blkmig.destination.certificates import AUTHORITY, CLIENT, SERVER
from qemu_blkmig.destination.handshake import End
from qemu_blkmig.destination.protocol import Certificates, CertificatesReply, Fault, Handshake, HandshakeReply
from qemu_blkmig.errors import Refused
from qemu_blkmig.job.datapath import DataPath
from qemu_blkmig.job.datapath_made import address_of_data
from qemu_blkmig.job.place import Place
from qemu_blkmig.transport.client import AgentClient

MOST_TURNS = 10
"""Turns after which a handshake is given up; TLS 1.3 takes two of each side, 1.2 three."""

Answer = Callable[[bytes], Awaitable[HandshakeReply]]


@dataclass(frozen=True)
class _Link:
    """A connection to come. `directory`: of certificates, on both hosts (None: where libvirt's migrations look).

    `name`: of the server, as the client asks for it; `another`: how it is to be called otherwise. `where`: what says
    where certificates lie.
    """

    option: str
    directory: str | None
    serves_here: bool
    name: str
    another: str
    where: str = ""


@dataclass(frozen=True)
class _Side:
    """A host, as messages name it, and what it has."""

    who: str
    whose: str
    server: bool
    has: CertificatesReply

    @property
    def certificate(self) -> str:
        return f"{self.whose} {self.has.directory}/{(SERVER if self.server else CLIENT)[0]}"

    @property
    def authority(self) -> str:
        return f"{self.has.directory}/{AUTHORITY}"


async def of_migration(agent: AgentClient, name: str) -> tuple[list[str], list[str]]:
    """What would fail of libvirt's migration to a destination called `name`, and warnings; see `_troubles`."""
    link = _Link(
        "--tls", None, serves_here=False, name=name, another="--tls-destination NAME names another",
        where=" (qemu.conf, migrate_tls_x509_cert_dir)",
    )  # fmt: skip
    return await _troubles(agent, link)


async def of_data(agent: AgentClient, path: DataPath | None, place: Place) -> tuple[list[str], list[str]]:
    """The same of the data's own way, where it has certificates. Raises `Refused`."""
    if path is None or path.certificates is None:
        return [], []
    host = await address_of_data(path, place)
    return await _troubles(
        agent,
        _Link("--tls-creds", path.certificates, serves_here=True, name=host, another="--data tls://NAME names another"),
    )


async def require_data(agent: AgentClient, path: DataPath | None, place: Place, tell: Callable[[str], None]) -> None:
    """Raise `Refused` with what would fail of the data's own way; warnings are told."""
    problems, warnings = await of_data(agent, path, place)
    if problems:
        raise Refused("; ".join(problems), state="nothing was touched")
    for warning in warnings:
        tell(warning)


async def _troubles(agent: AgentClient, link: _Link) -> tuple[list[str], list[str]]:
    """Nothing is known of a host that does not tell, as a confined agent, or where the user may not read them."""
    serves_there = not link.serves_here
    try:
        here = await asyncio.to_thread(certificates.look, link.directory, server=link.serves_here)
        there = await agent.expect(Certificates(link.directory, serves_there), CertificatesReply)
    except (OSError, Refused) as error:
        return [], [_not_tried(link, str(error))]
    near = _Side("this host", "this host's", link.serves_here, here)
    far = _Side("the destination", "the destination's", serves_there, there)
    problems = [
        f"{link.option}: {side.who} has no {' and no '.join(lacks)}{link.where}"
        for side in (near, far)
        if (lacks := _needed(side))
    ]
    problems += [f"{link.option}: {side.whose} {told}: renew it" for side in (near, far) for told in side.has.dated]
    if problems:
        return problems, []
    return await _tried(agent, link, near, far)


def _needed(side: _Side) -> list[str]:
    """What is missing that it cannot do without; whether a client needs one of its own, the server tells."""
    return [path for path in side.has.missing if side.server or path == side.authority]


async def _tried(agent: AgentClient, link: _Link, near: _Side, far: _Side) -> tuple[list[str], list[str]]:
    near_fault, far_fault, names = await _handshake(agent, link)
    if "name" in (kind_of(near_fault), kind_of(far_fault)):
        # Whoever is asked for any name learns what names there are.
        *_, names = await _handshake(agent, replace(link, name=""))
    for fault, side, other in ((near_fault, near, far), (far_fault, far, near)):
        # After an authority has renewed its own, OpenSSL minds the old one's number, GnuTLS the key alone.
        if fault is not None and (fault.kind == "unclear" or (fault.kind == "authority" and other.has.by_number)):
            return [], [_not_tried(link, f"{side.who}: {fault.words}")]
        if fault is not None:
            return [f"{link.option}: {_told(fault, side, other, link, names)}"], []
    return [], []


def kind_of(fault: Fault | None) -> str | None:
    """Its kind, if there is one."""
    return None if fault is None else fault.kind


def _not_tried(link: _Link, why: str) -> str:
    return f"{link.option}: whether the certificates will do could not be tried beforehand ({why})"


def _told(fault: Fault, side: _Side, other: _Side, link: _Link, names: list[str]) -> str:
    match fault.kind:
        case "own":
            words = fault.words.replace("_", " ").lower()
            return f"{side.whose} certificates in {side.has.directory} cannot be used: {words}{link.where}"
        case "none-shown":
            lacks = " and no ".join(other.has.missing)
            return f"{side.who} asks {other.who} for a certificate, which has no {lacks}{link.where}"
        case "name" if link.name in names:
            return (
                f"{other.certificate} has {link.name} as a name, but that is an address, and has to be one there, too "
                f"(subjectAltName=IP:{link.name}): {link.another}"
            )
        case "name":
            return f"{other.certificate} is for {', '.join(names)}, and it is asked for by {link.name}: {link.another}"
        case "dates":
            return f"{other.certificate}, or its authority's, is not valid by the clock of {side.who}: {fault.words}"
    return (
        f"{other.certificate} is not signed by an authority that {side.who} trusts ({side.authority}): {fault.words}; "
        "have both hosts' certificates signed by the same one"
    )


async def _handshake(agent: AgentClient, link: _Link) -> tuple[Fault | None, Fault | None, list[str]]:
    """What this host would not put up with, what the other would not, and the names of the server's certificate."""
    name = link.name or None
    end = await asyncio.to_thread(
        End.of, Handshake(link.directory, link.serves_here, b"", name=None if link.serves_here else name)
    )
    begin, names = True, list[str]()
    near = await asyncio.to_thread(end.answer, b"")
    for _ in range(MOST_TURNS):
        if near.fault is not None:
            return near.fault, None, names
        said = Handshake(link.directory, not link.serves_here, near.said, begin, name if link.serves_here else None)
        far = await agent.expect(said, HandshakeReply)
        begin = False
        if far.fault is not None:
            return None, far.fault, names
        near = await asyncio.to_thread(end.answer, far.said)
        names = far.names if link.serves_here else near.names
        if not near.said and near.fault is None:
            break
    return near.fault, None, names
