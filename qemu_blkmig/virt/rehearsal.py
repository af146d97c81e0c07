"""libvirt's own migration of a domain, begun before a byte is copied, and ended at its address, which is none.

The source's libvirt compares the XML for the destination with what runs (virDomainDefCheckABIStability), and tells what
else it does not migrate; the destination's reads the XML, and refuses the address before it makes anything of it. Seen
on libvirt 9.0: over in 10 ms, the guest runs on, neither side knows of it afterwards.
"""

from __future__ import annotations

from typing import Any

from qemu_blkmig.virt.connection import Connection, LibvirtError, libvirt
from qemu_blkmig.virt.migration import Wish

NOWHERE = "blkmig-rehearsal://nowhere"
"""Of no scheme that a libvirt knows."""


async def would_refuse(
    source: Connection, domain: Any, target: Connection, xml: str, name: str | None = None
) -> LibvirtError | None:
    """Why the two would not migrate the running `domain` with this XML, under this `name`; or None."""
    module = libvirt()
    wish = Wish(NOWHERE, xml, name=name)
    try:
        await source.call(domain.migrate3, target.handle, wish.parameters(), wish.flags())
    except LibvirtError as error:
        passing = (module.VIR_ERR_NO_SUPPORT, module.VIR_ERR_OPERATION_TIMEOUT)
        return None if NOWHERE in error.words or error.code in passing else error
    return None


def is_of_xml(error: LibvirtError) -> bool:
    """Whether a migration was refused for the XML: with the same, libvirt will say it again."""
    module = libvirt()
    return error.code in (
        module.VIR_ERR_CONFIG_UNSUPPORTED,
        module.VIR_ERR_XML_ERROR,
        module.VIR_ERR_XML_DETAIL,
        module.VIR_ERR_INVALID_ARG,
    )
