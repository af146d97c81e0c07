"""Which huge pages a domain's memory lies in, and whether the destination has so many free ones."""

from __future__ import annotations

from typing import Any

import pytest

from qemu_blkmig.virt.connection import Connection, libvirt
from qemu_blkmig.virt.hugepages import HOST_S, pages_lacking, pages_needed

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def domain(pages: str = "", *, memory: str = "<memory unit='KiB'>1048576</memory>", more: str = "") -> str:
    return f"<domain><memoryBacking><hugepages>{pages}</hugepages></memoryBacking>{memory}{more}</domain>"


CELLS = (
    "<cpu><numa><cell id='0' cpus='0' memory='1' unit='GiB'/><cell id='1' cpus='1' memory='2097152' unit='KiB'/>"
    "<cell cpus='2' memory='512' unit='M'/></numa></cpu>"
)
DIMMS = (
    "<devices><memory model='dimm'><target><size unit='MiB'>256</size><node>1</node></target></memory>"
    "<memory model='dimm'><source><pagesize unit='KiB'>2048</pagesize></source><target><size unit='KiB'>131072</size>"
    "<node>0</node></target></memory>"
    "<memory model='nvdimm'><source><path>/x</path></source><target><size unit='GiB'>9</size></target></memory>"
    "</devices>"
)


@pytest.mark.parametrize(
    ("xml", "needed"),
    [
        ("<domain><memory>1048576</memory></domain>", {}),
        (domain(), {HOST_S: GIB}),
        (domain("<page size='2048' unit='KiB'/>"), {2 * MIB: GIB}),
        (domain("<page size='1' unit='G'/>", memory="<memory unit='b'>1073741824</memory>"), {GIB: GIB}),
        (domain("<page size='2' unit='M' nodeset='0'/>", memory="<memory unit='GB'>1</memory>"), {2 * MIB: 10**9}),
        (domain("<page size='2' unit='M'/>", more=CELLS), {2 * MIB: 3 * GIB + 512 * MIB}),
        (
            domain("<page size='2' unit='M'/><page size='1' unit='G' nodeset='1'/>", more=CELLS + DIMMS),
            {2 * MIB: GIB + 512 * MIB + 128 * MIB, GIB: 2 * GIB + 256 * MIB},
        ),
        (domain("<page size='1' unit='G' nodeset='0-2,^2'/>", more=CELLS), {GIB: 3 * GIB}),
    ],
)
def test_the_pages_that_a_domain_needs_are_found(xml: str, needed: dict[int, int]) -> None:
    assert pages_needed(xml) == needed


def free(monkeypatch: pytest.MonkeyPatch, **pages: int) -> None:
    """The destination tells so many free pages by size, in KiB.

    libvirt's own test driver has none for the whole host: 9.0 fails, 11.3 counts less than none.
    """

    def told(_: Any, sizes: list[int], first: int, cells: int, _flags: int = 0) -> dict[int, dict[int, int]]:
        assert (first, cells) == (-1, 1)
        if any(f"k{size}" not in pages for size in sizes):
            raise libvirt().libvirtError("page size is not available on node -1")
        return {-1: {size: pages[f"k{size}"] for size in sizes}}

    monkeypatch.setattr(libvirt().virConnect, "getFreePages", told)


async def test_a_destination_with_too_few_free_pages_is_told(
    daemonless: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    xml = domain("<page size='2' unit='M'/>", memory="<memory>1048577</memory>")
    free(monkeypatch, k2048=513)
    assert await pages_lacking(daemonless, xml) == []
    free(monkeypatch, k2048=512)
    assert await pages_lacking(daemonless, xml) == [
        "the destination has 512 free pages of 2 MiB, the guest needs 513 (vm.nr_hugepages there makes more; --unsafe "
        "tries it all the same)"
    ]


async def test_pages_of_the_host_s_own_choice_are_lacking_only_where_no_size_has_enough(
    daemonless: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for enough in ({"k8": 0, "k2048": 512, "k1048576": 0}, {"k8": 0, "k2048": 0, "k1048576": 1}, {"k2048": 0}):
        free(monkeypatch, **enough)
        assert await pages_lacking(daemonless, domain()) == [], "one of them has, or nobody knows"
    free(monkeypatch, k8=0, k2048=1, k1048576=0)
    (told,) = await pages_lacking(daemonless, domain())
    assert "1 free pages of 2 MiB and 0 free pages of 1 GiB, the guest needs 131072 or 512 or 1 (" in told


async def test_a_page_size_that_the_destination_does_not_know_is_told(daemonless: Connection) -> None:
    (told,) = await pages_lacking(daemonless, domain("<page size='16' unit='M'/>"))
    assert told == "its memory lies in pages of 16 MiB, which the destination does not have"


@pytest.mark.parametrize(
    "xml",
    [
        "<domain><memory>9</memory></domain>",
        domain("<page size='2' unit='M'/>"),
        domain("<page size='4' unit='KiB'/>"),
        domain("<page size='two'/>"),
    ],
    ids=["ordinary", "not told", "the host's ordinary size", "no number"],
)
async def test_where_nothing_is_known_or_needed_nothing_is_said(
    daemonless: Connection, monkeypatch: pytest.MonkeyPatch, xml: str
) -> None:
    free(monkeypatch)
    assert await pages_lacking(daemonless, xml) == []
