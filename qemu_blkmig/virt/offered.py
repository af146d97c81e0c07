"""What a domain's XML asks for that a libvirt does not offer, by what that tells of itself and its QEMU.

Read: libvirt's "Domain capabilities XML format" and "Driver capabilities XML format"; its src/qemu/qemu_capabilities.c
(virQEMUCapsFillDomainDevice...Caps), by which it judges the XML itself, when the domain is to start.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree

from qemu_blkmig.virt.domain import rooted

_ASKED = (
    ("graphics", "type", "./devices/graphics", "type", "graphics of type", {"vnc", "spice", "sdl"}),
    ("video", "modelType", "./devices/video/model", "type", "video model", {"vga", "cirrus", "vmvga", "qxl", "virtio"}),
)
"""Capability, its enumeration; element and attribute of a domain's XML; in words; those that are in the enumeration as
long as there has been one: of what came later a libvirt may know more than it tells."""


def not_offered(capabilities: str, xml: str) -> Iterator[str]:
    """What the domain has, and a host with these domain `capabilities` does not offer, as far as they tell."""
    told, root = ElementTree.fromstring(capabilities), rooted(xml)
    emulated = root.find("./devices/tpm/backend[@type='emulator']") is not None
    backends = _told(told, "tpm", "backendModel")
    if emulated and backends is not None and "emulator" not in backends:
        yield (
            "the destination's QEMU or libvirt offers no emulated TPM (is swtpm installed there? a libvirt that was "
            "asked before it was may have to be restarted)"
        )
    for device, enumeration, place, attribute, what, known in _ASKED:
        offers = _told(told, device, enumeration)
        wanted = {each.get(attribute, "") for each in root.findall(place)} & known
        if offers is not None:
            for each in sorted(wanted - offers):
                has = ", ".join(sorted(offers)) or "none"
                yield f"the destination's QEMU offers no {what} {each} (it offers: {has})"


def _told(capabilities: ElementTree.Element, device: str, enumeration: str) -> set[str] | None:
    """The values that are offered; None: nothing is told of them."""
    found = capabilities.find(f"./devices/{device}")
    if found is None:
        return None
    if found.get("supported") == "no":
        return set()
    values = found.find(f"./enum[@name='{enumeration}']")
    return None if values is None else {(value.text or "").strip() for value in values.findall("value")}


def static_labels(xml: str) -> set[str]:
    """The security drivers by which the domain has labels that are given, not made when it starts."""
    labels = rooted(xml).findall("./seclabel[@type='static']")
    return {label.get("model", "") for label in labels} - {"", "none"}


def drivers_lacking(capabilities: str, xml: str) -> Iterator[str]:
    """Those of `static_labels` that a host with these `capabilities` does not have."""
    models = ElementTree.fromstring(capabilities).findall("./host/secmodel/model")
    has = {(model.text or "").strip() for model in models}
    for model in sorted(static_labels(xml) - has) if has else ():
        yield (
            f"the destination has no security driver {model}, of which this domain has a static label (it has: "
            f"{', '.join(sorted(has))})"
        )
