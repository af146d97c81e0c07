"""Whether the destination has the huge pages that a domain's memory is to lie in, which QEMU takes when it starts.

Read: libvirt's "Domain XML format", sections "Memory Backing", "CPU model and topology" and "Memory devices", and its
src/qemu/qemu_command.c (which page a part of the guest's memory gets). To virConnectGetFreePages cell -1 is the whole
host (tried with libvirt 9.0).
"""

from __future__ import annotations

from xml.etree import ElementTree

from qemu_blkmig.units import show_bytes
from qemu_blkmig.virt.connection import Connection, LibvirtError
from qemu_blkmig.virt.domain import rooted

_UNITS = {"b": 1, "bytes": 1} | {
    name: factor**power
    for power, letter in enumerate("KMGTPE", 1)
    for name, factor in ((f"{letter}B".lower(), 1000), (letter.lower(), 1024), (f"{letter}iB".lower(), 1024))
}
HOST_S = 0
"""Stands for the page size that the host has set."""


async def pages_lacking(target: Connection, xml: str) -> list[str]:
    """What the destination has too few pages for; where it cannot tell, or the XML is none, nothing is said."""
    try:
        needed = pages_needed(xml)
    except ValueError:
        return []
    if not needed:
        return []
    ordinary, *huge = await _sizes(target) or [0]
    found = []
    for size, total in needed.items():
        if huge and size not in (HOST_S, ordinary, *huge):
            found.append(f"its memory lies in pages of {_shown(size)}, which the destination does not have")
            continue
        # A size that is the host's ordinary one asks for nothing.
        sizes = huge if size == HOST_S else [size] if size != ordinary else []
        free = [(each, await _free(target, each)) for each in sizes]
        if free and all(count is not None and count * each < total for each, count in free):
            has = " and ".join(f"{count} free pages of {_shown(each)}" for each, count in free)
            needs = " or ".join(str(-(-total // each)) for each, _ in free)
            found.append(
                f"the destination has {has}, the guest needs {needs} (vm.nr_hugepages there makes more; --unsafe tries "
                "it all the same)"
            )
    return found


def pages_needed(xml: str) -> dict[int, int]:
    """How many bytes of its memory lie in huge pages, by their size. Raises `ValueError` where a number is none."""
    root = rooted(xml)
    backing = root.find("./memoryBacking/hugepages")
    cells = root.findall("./cpu/numa/cell")
    whole = root.find("./memory")
    parts: list[tuple[str, int, int | None]] = []
    for number, cell in enumerate(cells):
        parts.append((cell.get("id", str(number)), _bytes(cell, "memory"), None))
    if whole is not None and not cells:
        parts.append(("0", _bytes(whole), None))
    for device in root.findall("./devices/memory[@model='dimm']"):
        size, own = device.find("./target/size"), device.find("./source/pagesize")
        if size is not None:
            node = device.findtext("./target/node", "0").strip()
            parts.append((node, _bytes(size), _bytes(own) if own is not None else None))
    needed: dict[int, int] = {}
    for node, count, own_size in parts:
        page = own_size if own_size is not None else _page_of(node, backing)
        if page is not None:
            needed[page] = needed.get(page, 0) + count
    return needed


def _page_of(node: str, backing: ElementTree.Element | None) -> int | None:
    """The size of the pages of a guest's NUMA node; None: ordinary ones."""
    if backing is None:
        return None
    pages = backing.findall("page")
    named = [page for page in pages if int(node) in _members(page.get("nodeset", ""))]
    rest = [page for page in pages if page.get("nodeset") is None]
    for page in (*named, *rest):
        return _bytes(page, "size")
    return None if pages else HOST_S


def _members(nodeset: str) -> set[int]:
    """Of a set such as 0-3,5,^2."""
    found: set[int] = set()
    for part in filter(None, nodeset.split(",")):
        first, _, last = part.strip().lstrip("^").partition("-")
        members = set(range(int(first), int(last or first) + 1))
        found = found - members if part.strip().startswith("^") else found | members
    return found


def _bytes(element: ElementTree.Element, attribute: str | None = None) -> int:
    """What an element, or its attribute, says in the unit that stands beside it, KiB where none does."""
    told = element.get(attribute, "0") if attribute is not None else (element.text or "0")
    factor: int = _UNITS.get(element.get("unit", "KiB").lower(), 1024)
    return int(told.strip()) * factor


async def _sizes(target: Connection) -> list[int]:
    """The page sizes that the host knows, in bytes, the ordinary one first."""
    told = ElementTree.fromstring(await target.capabilities())
    return sorted(int(page.get("size", "0")) << 10 for page in told.findall("./host/cpu/pages"))


async def _free(target: Connection, size: int) -> int | None:
    """How many pages of this size are free there; None: it does not tell."""
    try:
        told = await target.call(target.handle.getFreePages, [size >> 10], -1, 1, 0)
    except LibvirtError:
        return None
    counts = [cell[size >> 10] for cell in told.values() if size >> 10 in cell]
    return sum(counts) if counts else None


def _shown(size: int) -> str:
    """As pages are called: 2 MiB."""
    return show_bytes(size).replace(".0 ", " ")
