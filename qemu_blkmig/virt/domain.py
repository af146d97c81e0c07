"""What a domain's XML says of its disks and of other state on the host, and the XML that the destination gets.

Read: libvirt's "Domain XML format", sections "Hard drives, floppy disks, CDROMs", "BIOS bootloader" and "TPM device".
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

from qemu_blkmig.errors import Refused

_SOURCE = {"file": "file", "block": "dev"}
"""Attribute of <source> that names the image, by the disk's type."""
_OF_THE_PLACE = ("seclabel", "reservations")
_OF_THE_CONTENTS = ("encryption", "slices")
"""Children of <source>."""


@dataclass(frozen=True)
class DomainDisk:
    """A <disk>. `target`: its name for users (vda). `alias`: the id of its device in QEMU, where the domain runs.

    `path`: of the image, where it is a file or a block device of the host; `volume`: pool and volume, where the XML
    names those instead. `left_alone`: why it is not migrated; None: it is. `encrypted`: by a key of libvirt's.
    """

    target: str
    alias: str | None
    path: str | None
    format: str
    left_alone: str | None
    volume: tuple[str, str] | None = None
    encrypted: bool = False


@dataclass(frozen=True)
class Domain:
    """What a domain's XML says. `nvram`: path of its UEFI variables; `tpm`: it has an emulated TPM."""

    name: str
    uuid: str
    disks: tuple[DomainDisk, ...]
    nvram: str | None
    tpm: bool
    xml: str

    @classmethod
    def parse(cls, xml: str) -> Domain:
        """Raises `Refused` when it is not a domain's XML."""
        root = rooted(xml)
        return cls(
            name=root.findtext("name", ""),
            uuid=root.findtext("uuid", ""),
            disks=tuple(map(_disk, root.findall("./devices/disk"))),
            nvram=_nvram(root),
            tpm=root.find("./devices/tpm/backend[@type='emulator']") is not None,
            xml=xml,
        )

    def for_destination(self, paths: Mapping[str, str], name: str | None = None) -> str:
        """The XML with the images of these disks (path by target) in other places, and perhaps another name.

        Raises `Refused` when it has no such disk.
        """
        return rewritten(self.xml, paths, name)


def rewritten(xml: str, paths: Mapping[str, str], name: str | None = None, *, as_they_are: bool = False) -> str:
    """A domain's XML with the images of these disks (path by target) in other places, and perhaps another name.

    What libvirt adds for a running domain's chain of backing files goes: the destination finds its own. So does what
    tells how its image is read (encryption, slices), for what arrives is what the guest sees of it, unless images are
    copied `as_they_are`. Raises `Refused` when there is no such disk.
    """
    root = rooted(xml)
    disks = {_target(disk): disk for disk in root.findall("./devices/disk")}
    for target, path in paths.items():
        if target not in disks:
            raise Refused(f"the domain's XML has no disk {target} (it has: {', '.join(disks) or 'none'})", disk=target)
        _move(disks[target], path, _OF_THE_PLACE + (_OF_THE_CONTENTS if as_they_are else ()))
    if name is not None:
        element = root.find("name")
        if element is not None:
            element.text = name
    return ElementTree.tostring(root, encoding="unicode")


def image_files(xml: str) -> set[str]:
    """All files and devices that its disks and their backing chains, as far as libvirt tells them, and its UEFI
    variables lie in.
    """
    root = rooted(xml)
    sources = [source for disk in root.findall("./devices/disk") for source in disk.iter("source")]
    found = {source.get("file") or source.get("dev") or "" for source in sources}
    return (found | {_nvram(root) or ""}) - {""}


_FILES = {
    "./os/kernel": "its kernel",
    "./os/initrd": "its initial RAM disk",
    "./os/dtb": "its device tree",
    "./os/loader": "its firmware",
}


def files_needed(xml: str) -> dict[str, str]:
    """Files by path, and what they are, that a host must have to start it: all but UEFI variables."""
    root = rooted(xml)
    found = {path.strip(): what for place, what in _FILES.items() if (path := root.findtext(place))}
    for disk in root.findall("./devices/disk"):
        source = disk.find("source")
        if source is not None and source.get("startupPolicy", "mandatory") == "mandatory":
            path = source.get("file") or source.get("dev")
            found |= {path: f"disk {_target(disk)}"} if path else {}
    for interface in root.findall("./devices/interface[@type='bridge']/source"):
        found[f"/sys/class/net/{interface.get('bridge')}/address"] = f"bridge {interface.get('bridge')}"
    return found


def nvram_of(xml: str) -> tuple[str | None, str | None]:
    """Where the template of its UEFI variables lies, and where they do themselves."""
    root = rooted(xml)
    nvram = root.find("./os/nvram")
    return (None, None) if nvram is None else (nvram.get("template"), _nvram(root))


def _nvram(root: ElementTree.Element) -> str | None:
    """Named as text, or by a <source> as a disk's image is (since libvirt 8.5, where it was defined so)."""
    source = root.find("./os/nvram/source")
    named = root.findtext("./os/nvram") if source is None else source.get("file") or source.get("dev")
    return (named or "").strip() or None


def rooted(xml: str) -> ElementTree.Element:
    """The element of a domain's XML. Raises `Refused` when it is not that."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise Refused(f"not XML: {error}") from error
    if root.tag != "domain":
        raise Refused(f"not a domain's XML, but <{root.tag}>")
    return root


def _target(disk: ElementTree.Element) -> str:
    target = disk.find("target")
    return target.get("dev", "") if target is not None else ""


def _disk(disk: ElementTree.Element) -> DomainDisk:
    source, driver, alias = disk.find("source"), disk.find("driver"), disk.find("alias")
    attribute = _SOURCE.get(disk.get("type", "file"))
    return DomainDisk(
        target=_target(disk),
        alias=alias.get("name") if alias is not None else None,
        path=source.get(attribute) if source is not None and attribute else None,
        format=driver.get("type", "raw") if driver is not None else "raw",
        left_alone=_why_left_alone(disk, source),
        volume=_volume(disk, source),
        encrypted=disk.find("source/encryption") is not None,
    )


def _volume(disk: ElementTree.Element, source: ElementTree.Element | None) -> tuple[str, str] | None:
    if disk.get("type") != "volume" or source is None:
        return None
    return source.get("pool", ""), source.get("volume", "")


def _why_left_alone(disk: ElementTree.Element, source: ElementTree.Element | None) -> str | None:
    device, kind = disk.get("device", "disk"), disk.get("type", "file")
    if device in ("cdrom", "floppy"):
        return f"it is a {device}"
    if source is None:
        return "it is empty"
    if device == "lun":
        return "it is a SCSI device passed through"
    if kind not in ("file", "block", "volume"):
        return f"its storage is not on this host (type {kind})"
    if disk.find("readonly") is not None:
        return "it is read-only"
    if disk.find("shareable") is not None:
        return "it is shared with other guests (<shareable/>)"
    if disk.find("transient") is not None:
        return "what is written to it is dropped when the guest ends (<transient/>)"
    return None


def _move(disk: ElementTree.Element, path: str, kept: Container[str]) -> None:
    block = path.startswith("/dev/") and not path.startswith("/dev/shm/")
    disk.set("type", "block" if block else "file")
    old = disk.find("source")
    place = list(disk).index(old) if old is not None else len(disk)
    if old is not None:
        disk.remove(old)
    source = ElementTree.Element("source", {"dev" if block else "file": path})
    source.tail = old.tail if old is not None else None
    if old is not None:
        source.attrib |= {name: old.attrib[name] for name in ("startupPolicy",) if name in old.attrib}
        source.extend(child for child in old if child.tag in kept)
    disk.insert(place, source)
    backing = disk.find("backingStore")
    if backing is not None:
        disk.remove(backing)
