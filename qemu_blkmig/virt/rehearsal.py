"""libvirt's own migration of a domain, begun before a byte is copied, and ended at its address, which is none.

The source's libvirt compares the XML for the destination with what runs (virDomainDefCheckABIStability), and tells what
else it does not migrate; the destination's reads the XML, and refuses the address before it makes anything of it. Seen
on libvirt 9.0: over in 10 ms, the guest runs on, neither side knows of it afterwards. So it is with a domain that does
not run: the address, of no use then, is refused before anything is defined (qemuMigrationDstPrepareDirect).

Peer to peer it is the source's libvirt that must reach the other, with the keys and certificates of its own user. That
is asked for apart, of a libvirt by another path: the words of an objection are lost by ssh, when the source's libvirt
hangs up ("End of file while reading data", libvirt 9.0), but not those of one that did not even open a connection.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from qemu_blkmig.virt.connection import Connection, LibvirtError, libvirt
from qemu_blkmig.virt.kept import is_session
from qemu_blkmig.virt.migration import Wish, asked_for

NOWHERE = "blkmig-rehearsal://nowhere"
"""Of no scheme that a libvirt knows."""
_NO_PATH = "/blkmig-rehearsal"
"""In the URI of a libvirt: it is refused by the one that is reached."""
_CALL = re.compile(r"\bvir[A-Z]\w+$|^unknown procedure")
"""How a libvirt names a call that its driver, or the daemon, does not know."""


async def would_refuse(
    source: Connection,
    domain: Any,
    target: Connection,
    xml: str,
    name: str | None = None,
    *,
    offline: bool = False,
) -> LibvirtError | None:
    """Why the two would not migrate `domain`, which runs or is `offline`, with this XML, under this `name`; or None."""
    wish = Wish(NOWHERE, xml, name=name, offline=offline, persistent=offline)
    try:
        await asked_for(source, domain, target, wish)
    except LibvirtError as error:
        return _objection(error, NOWHERE)
    return None


async def unreachable(
    source: Connection, domain: Any, target: Connection, xml: str, *, offline: bool = False
) -> LibvirtError | None:
    """Why the source's libvirt itself does not reach the target's, as a migration peer to peer has it do; or None.

    Of a user's own daemon there (qemu:///session) nothing is known: another path would be another daemon's.
    """
    if is_session(target.uri):
        return None
    wish = Wish(NOWHERE, xml, peer_to_peer=True, offline=offline, persistent=offline)
    uri = urlsplit(target.uri)._replace(path=_NO_PATH).geturl()
    try:
        await source.call(domain.migrateToURI3, uri, wish.parameters(), wish.flags())
    except LibvirtError as error:
        return _objection(error, _NO_PATH)
    return None


async def unfit(target: Connection, xml: str) -> LibvirtError | None:
    """Why the destination's libvirt would not take `xml` as a domain's definition; or None.

    A migration brings a definition along behind the guest: libvirt reads it when that runs there already, and would
    leave it undefined. Read is it as well where libvirt shows how it would start QEMU, which defines nothing.
    """
    try:
        await target.call(target.handle.domainXMLToNative, "qemu-argv", xml, 0)
    except LibvirtError as error:
        return error if is_of_xml(error) else None
    return None


def _objection(error: LibvirtError, expected: str) -> LibvirtError | None:
    busy = error.code == libvirt().VIR_ERR_OPERATION_TIMEOUT
    return None if expected in error.words or busy or _is_unknown(error) else error


def _is_unknown(error: LibvirtError) -> bool:
    """Whether a libvirt does not know the call; the same code also tells what it cannot migrate (a TPM's state)."""
    return error.code == libvirt().VIR_ERR_NO_SUPPORT and _CALL.search(error.words.strip()) is not None


def is_of_xml(error: LibvirtError) -> bool:
    """Whether a migration was refused for the XML: with the same, libvirt will say it again."""
    module = libvirt()
    return error.code in (
        module.VIR_ERR_CONFIG_UNSUPPORTED,
        module.VIR_ERR_XML_ERROR,
        module.VIR_ERR_XML_DETAIL,
        module.VIR_ERR_INVALID_ARG,
    )
