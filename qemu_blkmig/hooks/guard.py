"""The hook's check without libvirt: for hook scripts of others, which must not ask libvirt either."""

from __future__ import annotations

from pathlib import Path

from qemu_blkmig.errors import Refused
from qemu_blkmig.hooks import qemu as hook
from qemu_blkmig.places import state_directory

DEFINITIONS = (Path("/run/libvirt/qemu"), Path("/etc/libvirt/qemu"))
"""Where libvirt keeps the XML of domains that run, and of those that are defined."""


def check(xml: bytes) -> hook.Domain:
    """Raise `Refused` if the domain of this XML must not be started here; else what was read of it."""
    try:
        domain = hook.Domain(xml)
    except hook.Damaged as error:
        raise Refused(str(error)) from error
    if found := hook.troubles(domain, str(state_directory())):
        raise Refused("\n".join([f"domain {domain.name or domain.uuid} must not be started here:", *found]))
    return domain


def definition(wanted: str) -> bytes:
    """The XML of a domain by UUID or name, as libvirt keeps it on this host. Raises `Refused`."""
    for directory in DEFINITIONS:
        for path in sorted(directory.glob("*.xml")):
            try:
                xml = path.read_bytes()
                domain = hook.Domain(xml)
            except (OSError, hook.Damaged):
                continue
            if wanted.lower() == domain.uuid or wanted == domain.name:
                return xml
    places = " or ".join(map(str, DEFINITIONS))
    raise Refused(f"no domain {wanted} is defined in {places}", advice="give its XML: qemu-blkmig guard --xml FILE")
