"""Digests of the same contents are the same, whatever the images that hold them are made of."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qemu_blkmig.destination.writers import RawWriter
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd.connection import connect
from qemu_blkmig.nbd.control import Cancelled, Control
from qemu_blkmig.nbd.digests import differing_units, digests_of, fault_of, not_known_zero
from qemu_blkmig.nbd.plan import ALLOCATION
from qemu_blkmig.nbd.reader import NbdReader
from tests.nbd.servers import qemu_export

KIB, MIB = 1 << 10, 1 << 20
SIZE = 9 * MIB + 1536


@pytest.fixture
def control() -> Iterator[Control]:
    made = Control()
    yield made
    made.close()


def patches(path: Path) -> None:
    """Data, written zeroes and holes; one unit is half hole, half data, the last is short."""
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.write(os.urandom(MIB))
        file.seek(2 * MIB)
        file.write(bytes(MIB))
        file.seek(4 * MIB + 300 * KIB)
        file.write(os.urandom(MIB))
        file.seek(SIZE - 512)
        file.write(os.urandom(512))


def test_raw_and_qcow2_written_zeroes_and_holes_have_the_same_digests(tmp_path: Path, control: Control) -> None:
    raw, qcow2 = tmp_path / "raw", tmp_path / "qcow2"
    patches(raw)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", "-S", "4k", raw, qcow2], check=True)
    descriptor = os.open(raw, os.O_RDONLY)
    writer, whole = RawWriter(descriptor), Extent(0, SIZE)
    with qemu_export(tmp_path, qcow2, driver="qcow2") as (listening, _):
        reader = NbdReader(connect(listening, "disk", contexts=[ALLOCATION]))
        for unit in (512, 64 * KIB, MIB):
            for window in (whole, Extent(4 * MIB, SIZE - 4 * MIB), Extent(6 * MIB, MIB)):
                if fault_of(window, unit, SIZE) is None:
                    one, other = (digests_of(each, window, unit, "xxh3-128", control) for each in (writer, reader))
                    assert one == other
        reader.close()
    digests = digests_of(writer, whole, MIB, "sha256", control)
    zero = [not any(digests[at : at + 32]) for at in range(0, len(digests), 32)]
    assert zero == [False, True, True, True, False, False, True, True, True, False]
    assert digests_of(writer, Extent(6 * MIB, 2 * MIB), MIB, "sha256", control) == b""
    writer.close()
    os.close(descriptor)


def test_what_is_known_to_be_zero_is_not_read(tmp_path: Path, control: Control) -> None:
    path = tmp_path / "raw"
    patches(path)
    descriptor = os.open(path, os.O_RDONLY)
    writer = RawWriter(descriptor)
    digests_of(writer, Extent(0, SIZE), MIB, "xxh3-128", control)
    assert (control.tally.copied, control.tally.zeroed) == (4 * MIB + 1536, 5 * MIB)
    writer.close()
    os.close(descriptor)


def test_a_cancel_ends_the_reading(tmp_path: Path, control: Control) -> None:
    path = tmp_path / "raw"
    patches(path)
    descriptor = os.open(path, os.O_RDONLY)
    writer = RawWriter(descriptor)
    control.cancel()
    with pytest.raises(Cancelled):
        digests_of(writer, Extent(0, SIZE), MIB, "xxh3-128", control)
    writer.close()
    os.close(descriptor)


@pytest.mark.parametrize(
    ("zeroes", "left"),
    [
        ([], [(0, 10)]),
        ([(0, 10)], []),
        ([(0, 3), (3, 2)], [(4, 6)]),
        ([(1, 6)], [(0, 2), (6, 4)]),
        ([(1, 2)], [(0, 10)]),
        ([(5, 5)], [(0, 6)]),
    ],
    ids=str,
)
def test_units_that_are_zero_as_a_whole_are_left_out(
    zeroes: Sequence[tuple[int, int]], left: Sequence[tuple[int, int]], control: Control
) -> None:
    given = [Extent(*each) for each in zeroes]
    found = not_known_zero(given, Extent(0, 10), 2, control)
    assert [(each.offset, each.length) for each in found] == left


def test_neighbouring_units_that_differ_are_one_extent() -> None:
    one = b"".join(bytes([n]) * 16 for n in range(5))
    other = b"".join(bytes([n]) * 16 for n in (0, 9, 9, 3, 9))
    extent = Extent(MIB, 4 * MIB + 512)
    assert differing_units(one, other, extent, MIB, "xxh3-128") == [
        Extent(2 * MIB, 2 * MIB),
        Extent(5 * MIB, 512),
    ]
    assert differing_units(bytes(80), b"", extent, MIB, "xxh3-128") == []
    assert differing_units(b"", b"\1" * 80, extent, MIB, "xxh3-128") == [extent]


@pytest.mark.parametrize(
    ("extent", "unit"),
    [
        (Extent(0, MIB), 100),
        (Extent(0, MIB), 8 * MIB),
        (Extent(512, MIB), MIB),
        (Extent(0, 2 * SIZE), MIB),
        (Extent(0, 0), MIB),
        (Extent(0, 9 * MIB), 512),
    ],
    ids=str,
)
def test_digests_that_cannot_be_told_are_refused(extent: Extent, unit: int) -> None:
    assert fault_of(extent, unit, SIZE) is not None
