"""Which layers of a chain are brought before the top one."""

from __future__ import annotations

import pytest

from qemu_blkmig.job.bases import bases_of
from qemu_blkmig.job.layers import _to_be_brought
from qemu_blkmig.qmp.disks import Backing, Disk, Layer

NAMES = ("top", "second", "third", "base")


def _chain() -> Disk:
    layers = tuple(
        Layer("", "qcow2", f"/src/{name}", filter=False, backing=Backing(below, "qcow2", f"/src/{below}"))
        for name, below in zip(NAMES, (*NAMES[1:], "nothing"), strict=True)
    )
    return Disk(
        name="vda", device="", qdev="", node="", format="qcow2", size=1 << 20, filename="/src/top", backing=None,
        layers=layers, cluster_size=None, encrypted=False, allocated=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("there", "base", "brought"),
    [
        ({"base"}, None, ["third", "second"]),
        ({"base", "third"}, None, ["second"]),
        ({"base", "third"}, "/src/base", ["second"]),
        ({"base"}, "third", ["second"]),
        ({"base", "second"}, None, []),
        (set(), None, []),
    ],
)
def test_what_is_missing_above_the_base_is_brought_the_lowest_first(
    there: set[str], base: str | None, brought: list[str]
) -> None:
    bases = bases_of(_chain())
    found = _to_be_brought(bases, [each.named.filename in there for each in bases], base)
    assert [bases[number].named.filename for number in found] == brought
