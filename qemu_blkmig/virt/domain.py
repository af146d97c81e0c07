"""What a domain's XML says of its disks and of other state on the host, and the XML that the destination gets.

Read: libvirt's "Domain XML format", sections "Hard drives, floppy disks, CDROMs", "BIOS bootloader" and "TPM device".
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from xml.etree import ElementTree

from qemu_blkmig.errors import Refused
from qemu_blkmig.virt.places import places

_SOURCE = {"file": "file", "block": "dev"}
"""Attribute of <source> that names the image, by the disk's type."""
ELSEWHERE = "its storage is not on this host"
"""Why a disk is left alone, in words."""
_LOOPBACK = re.compile(r"localhost|localhost\..*|.*\.localhost|127\..*|\[?::1\]?", re.IGNORECASE)
"""Names of the host that they are used on."""
_OF_THE_PLACE = ("seclabel", "reservations")
_OF_THE_CONTENTS = ("encryption", "slices")
"""Children of <source>."""
_OF_THE_SOURCE = ("auth", "encryption")
"""Children of <disk>, where libvirt reads and leaves them, too, for those who wrote them so before its version 3.9."""
_DECLARATION = re.compile(r"^\s*<\?xml\s.*?\?>", re.DOTALL)
"""It may name another encoding than that in which libvirt gets the XML."""
_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_NAMED = re.compile(r"""(?:^|[=:"])(/(?:[^,"]|,,)+)""")
"""A file that an argument of QEMU's names, such as file=/x,format=raw or {"filename": "/x"}."""

_PASSWORD = re.compile(r"""(\bpasswd\s*=\s*)(["']).*?\2""", re.DOTALL)
_COOKIE = re.compile(r"(<cookie\b[^>]*>).*?(?=</cookie\s*>)", re.DOTALL)


@dataclass(frozen=True)
class DomainDisk:
    """A <disk>. `target`: its name for users (vda). `alias`: the id of its device in QEMU, where the domain runs.

    `path`: of the image, where it is a file or a block device of the host; `volume`: pool and volume, where the XML
    names those instead. `left_alone`: why it is not migrated; None: it is. `encrypted`: by a key of libvirt's.
    `written_here`: the guest can write to it, and its storage is this host's, as far as its XML tells; what of one that
    is left alone is on no shared storage does not come to the destination.
    """

    target: str
    alias: str | None
    path: str | None
    format: str
    left_alone: str | None
    volume: tuple[str, str] | None = None
    encrypted: bool = False
    written_here: bool = False


@dataclass(frozen=True)
class Domain:
    """What a domain's XML says. `nvram`: path of its UEFI variables; `tpm`: it has an emulated TPM, `tpm_state`: whose
    state it wants there; `shared`: directories of the host that are shared with it.
    """

    name: str
    uuid: str
    disks: tuple[DomainDisk, ...]
    nvram: str | None
    tpm: bool
    xml: str
    tpm_state: str | None = None
    shared: tuple[str, ...] = ()

    @classmethod
    def parse(cls, xml: str) -> Domain:
        """Raises `Refused` when it is not a domain's XML."""
        root = rooted(xml)
        tpm_source = root.find("./devices/tpm/backend[@type='emulator']/source")
        shared = [source.get("dir") for source in root.findall("./devices/filesystem/source")]
        return cls(
            name=root.findtext("name", ""),
            uuid=root.findtext("uuid", ""),
            disks=tuple(map(_disk, root.findall("./devices/disk"))),
            nvram=_nvram(root),
            tpm=root.find("./devices/tpm/backend[@type='emulator']") is not None,
            xml=xml,
            tpm_state=tpm_source.get("path") if tpm_source is not None else None,
            shared=tuple(each for each in shared if each),
        )

    @property
    def aliases(self) -> set[str]:
        """The ids of its disks' devices, where it runs."""
        return {disk.alias for disk in self.disks if disk.alias is not None}


def rewritten(
    xml: str, paths: Mapping[str, str], block: Mapping[str, bool] | None = None, *, as_they_are: bool = False
) -> str:
    """A domain's XML with the images of these disks (path by target) in other places, all else byte for byte.

    `block`: of paths, whether a block device is there; of others their names tell. What libvirt adds for a running
    domain's chain of backing files goes: the destination finds its own. So does what tells how its image is read
    (encryption, slices), for what arrives is what the guest sees of it, unless images are copied `as_they_are`. Raises
    `Refused` when there is no such disk.
    """
    elements = rooted(xml).findall("./devices/disk")
    disks = {_target(disk): number for number, disk in enumerate(elements)}
    text = _DECLARATION.sub("", xml).encode()
    spans = places(text, "domain/devices/disk")
    kept = _OF_THE_PLACE + (_OF_THE_CONTENTS if as_they_are else ())
    edits = []
    for target, path in paths.items():
        if target not in disks:
            raise Refused(f"the domain's XML has no disk {target} (it has: {', '.join(disks) or 'none'})", disk=target)
        disk = elements[disks[target]]
        _move(disk, path, kept, block=(block or {}).get(path, _is_device(path)))
        disk.tail = None
        edits.append((*spans[disks[target]], ElementTree.tostring(disk, encoding="unicode").encode()))
    for begin, end, moved in sorted(edits, reverse=True):
        text = text[:begin] + moved + text[end:]
    return text.decode()


def without_secrets(xml: str) -> str:
    """A domain's XML for people's eyes, and their logs: passwords of its display, and cookies of disks that it reads by
    HTTP, are blanked. libvirt must not get it so.
    """
    return _COOKIE.sub(r"\1***", _PASSWORD.sub(r"\1\2***\2", xml))


def image_files(xml: str) -> set[str]:
    """All files and devices that its disks and their backing chains, as far as libvirt tells them, its UEFI variables
    and its memory that lasts lie in, and those that its own arguments for QEMU name.
    """
    root = rooted(xml)
    sources = [source for disk in root.findall("./devices/disk") for source in disk.iter("source")]
    found = {source.get("file") or source.get("dev") or "" for source in sources}
    found |= {memory.path for memory in lasting_memory(xml)}
    for argument in root.iter(f"{_QEMU}arg"):
        found |= {name.replace(",,", ",") for name in _NAMED.findall(argument.get("value", ""))}
    return (found | {_nvram(root) or ""}) - {""}


@dataclass(frozen=True)
class LastingMemory:
    """What of a domain's memory outlasts it, in the file or device `path`. `what`: in words. `written`: whatever the
    guest writes to it comes to that file, as its RAM does at the destination of a migration.
    """

    what: str
    path: str
    written: bool


def lasting_memory(xml: str) -> list[LastingMemory]:
    """NVDIMMs, other persistent memory, and where the guest's system keeps its last words (pstore)."""
    root = rooted(xml)
    cells = {cell.get("id"): cell.get("memAccess") for cell in root.findall("./cpu/numa/cell")}
    common = root.find("./memoryBacking/access")
    found = []
    for memory in root.findall("./devices/memory"):
        path = memory.findtext("./source/path")
        if path:
            access = memory.get("access") or cells.get(memory.findtext("./target/node"))
            access = access or (common.get("mode") if common is not None else None)
            found.append(LastingMemory(memory.get("model", "memory"), path.strip(), access == "shared"))
    if path := root.findtext("./devices/pstore/path"):
        found.append(LastingMemory("pstore", path.strip(), written=True))
    return found


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
    for interface in root.findall("./devices/interface[@type='direct']/source[@dev]"):
        # Of a network's devices libvirt chooses one anew.
        if interface.get("network") is None:
            found[f"/sys/class/net/{interface.get('dev')}/address"] = f"network device {interface.get('dev')}"
    return found | _passed_through(root)


def gives_devices_back(xml: str) -> bool:
    """Whether QEMU takes a device from the guest as soon as it is to migrate (teaming), and gives it back if not."""
    return rooted(xml).find("./devices//teaming[@type='transient']") is not None


def _passed_through(root: ElementTree.Element) -> dict[str, str]:
    """PCI devices that the guest gives back while it is migrated, and is to have at the destination (teaming)."""
    found = {}
    for device in (*root.findall("./devices/interface[@type='hostdev']"), *root.findall("./devices/hostdev")):
        address = device.find("./source/address[@slot]")
        if address is None or device.find("./teaming[@type='transient']") is None:
            continue
        try:
            numbers = [int(address.get(part, "0"), 0) for part in ("domain", "bus", "slot", "function")]
        except ValueError:
            continue
        name = "{:04x}:{:02x}:{:02x}.{:x}".format(*numbers)
        found[f"/sys/bus/pci/devices/{name}/vendor"] = f"PCI device {name}"
    return found


def nvram_of(xml: str) -> tuple[str | None, str | None]:
    """Where the template of its UEFI variables lies, and where they do themselves."""
    root = rooted(xml)
    nvram = root.find("./os/nvram")
    return (None, None) if nvram is None else (nvram.get("template"), _nvram(root))


def keeps_variables(xml: str) -> bool:
    """Whether it has UEFI that keeps its variables in a file, named or not, from one start to the next."""
    root = rooted(xml)
    loader = root.find("./os/loader")
    told = {} if loader is None else loader.attrib
    nvram = root.find("./os/nvram")
    if told.get("stateless") == "yes" or (nvram is not None and nvram.get("type", "file") not in _SOURCE):
        return False
    chosen = root.find("./os[@firmware='efi']") is not None
    return chosen or (told.get("type"), told.get("readonly")) == ("pflash", "yes")


def has_varstore(xml: str) -> bool:
    """Whether it has UEFI whose variables QEMU itself keeps (<varstore>, of libvirts later than 9.0)."""
    return rooted(xml).find("./os/varstore") is not None


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
    left_alone, written_here = _left_alone(disk, source)
    return DomainDisk(
        target=_target(disk),
        alias=alias.get("name") if alias is not None else None,
        path=source.get(attribute) if source is not None and attribute else None,
        format=driver.get("type", "raw") if driver is not None else "raw",
        left_alone=left_alone,
        volume=_volume(disk, source),
        encrypted=any(disk.find(place) is not None for place in ("source/encryption", "encryption")),
        written_here=written_here,
    )


def _volume(disk: ElementTree.Element, source: ElementTree.Element | None) -> tuple[str, str] | None:
    if disk.get("type") != "volume" or source is None:
        return None
    return source.get("pool", ""), source.get("volume", "")


def _left_alone(disk: ElementTree.Element, source: ElementTree.Element | None) -> tuple[str | None, bool]:
    """See `DomainDisk`."""
    device, kind = disk.get("device", "disk"), disk.get("type", "file")
    written = disk.find("readonly") is None
    if device == "floppy" and source is not None and written:
        return "it is a floppy; what the guest has written to it stays here", False
    if device in ("cdrom", "floppy"):
        return f"it is a {device}", False
    if source is None:
        return "it is empty", False
    if (where := _not_copied(kind, source)) is not None:
        return where, written and not where.startswith(ELSEWHERE)
    if device == "lun":
        return "it is a SCSI device passed through", written
    if not written:
        return "it is read-only", False
    if disk.find("shareable") is not None:
        return "it is shared with other guests (<shareable/>)", True
    if disk.find("transient") is not None:
        return "what is written to it is dropped when the guest ends (<transient/>)", False
    return None, True


def _not_copied(kind: str, source: ElementTree.Element) -> str | None:
    """Where the storage of a disk of this type is, in words; None: in a file or block device, or what a pool knows."""
    match kind:
        case "file" | "block" | "volume":
            return None
        case "nvme":
            return "it is an NVMe device of this host, driven by QEMU itself"
        case "dir":
            return f"it is a directory of this host ({source.get('dir')})"
        case "vhostuser":
            return f"it is served by a process of this host ({source.get('path')})"
        case "vhostvdpa":
            return f"it is a vDPA device of this host ({source.get('dev')})"
        case "network":
            hosts = source.findall("host")
            served = [host.get("socket") or host.get("name") or "" for host in hosts if _is_this(host)]
            if served and len(served) == len(hosts):
                return f"it is served by a process of this host ({', '.join(served)})"
            return f"{ELSEWHERE} (type {kind})"
    return f"where its storage is cannot be told of its type, {kind}"


def _is_this(host: ElementTree.Element) -> bool:
    return host.get("transport") == "unix" or _LOOPBACK.fullmatch(host.get("name", "")) is not None


def _is_device(path: str) -> bool:
    return PurePosixPath(path).is_relative_to("/dev") and not PurePosixPath(path).is_relative_to("/dev/shm")


def _move(disk: ElementTree.Element, path: str, kept: Container[str], *, block: bool) -> None:
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
    gone = ("backingStore", *(each for each in _OF_THE_SOURCE if each not in kept))
    for child in [child for child in disk if child.tag in gone]:
        disk.remove(child)
