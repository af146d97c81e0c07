"""Dirty extents, from bitmaps of a real qemu-storage-daemon."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qemu_blkmig import errors
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd import dirty
from qemu_blkmig.nbd.dirty import dirty_extents
from tests.nbd.servers import qemu_export

GRANULE = 64 << 10


def harvested(directory: Path, size: int, writes: list[tuple[int, int]]) -> list[list[Extent]]:
    """The batches after `writes` to a disk of `size` bytes whose bitmap was enabled before."""
    image = directory / "disk.raw"
    with image.open("wb") as file:
        file.truncate(size)
    with qemu_export(directory, image) as (listening, qmp):
        qmp("block-dirty-bitmap-add", node="node", name="b", granularity=GRANULE)
        qmp("block-export-add", type="nbd", id="w", name="w", **{"node-name": "node", "writable": True})
        script = [f"-c write -z {offset} {length}" for offset, length in writes]
        uri = f"nbd+unix:///w?socket={listening}"
        subprocess.run(["qemu-io", "-f", "raw", *script, uri], check=True, stdout=subprocess.DEVNULL)
        qmp("block-dirty-bitmap-disable", node="node", name="b")
        qmp("block-export-add", type="nbd", id="r", name="r", **{"node-name": "node", "bitmaps": ["b"]})
        return list(dirty_extents(listening, "r", "b", size))


def test_a_clean_bitmap_has_no_extents(tmp_path: Path) -> None:
    assert harvested(tmp_path, 1 << 30, []) == []


def test_neighbouring_writes_are_one_extent_and_others_are_apart(tmp_path: Path) -> None:
    writes = [(0, 512), (GRANULE, GRANULE), (10 * GRANULE + 4096, 4096)]
    assert harvested(tmp_path, 1 << 30, writes) == [[Extent(0, 2 * GRANULE), Extent(10 * GRANULE, GRANULE)]]


def test_an_extent_across_the_limit_of_one_query_is_one_extent(tmp_path: Path) -> None:
    writes = [((2 << 30) - GRANULE, 2 * GRANULE), ((5 << 30) - 512, 512)]
    expected = [Extent((2 << 30) - GRANULE, 2 * GRANULE), Extent((5 << 30) - GRANULE, GRANULE)]
    assert harvested(tmp_path, 5 << 30, writes) == [expected]


@pytest.mark.parametrize("size", [512, GRANULE + 512, (1 << 20) - 512])
def test_the_last_extent_ends_with_the_disk(tmp_path: Path, size: int) -> None:
    [[last]] = harvested(tmp_path, size, [(size - 512, 512)])
    assert last.end == size


def test_many_extents_come_in_bounded_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty, "BATCH", 64)
    batches = harvested(tmp_path, 1 << 30, [(n * 2 * GRANULE, 512) for n in range(2 * 64 + 5)])
    assert [len(batch) for batch in batches] == [64, 64, 5]


def test_an_export_that_does_not_show_the_bitmap_is_an_error(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    with (
        qemu_export(tmp_path, image) as (listening, _qmp),
        pytest.raises(errors.ConnectionLost, match="does not show the dirty bitmap 'b'"),
    ):
        list(dirty_extents(listening, "disk", "b", 1 << 20))


def test_a_socket_that_nobody_listens_on_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(errors.ConnectionLost, match=r"nobody\.sock"):
        list(dirty_extents(tmp_path / "nobody.sock", "disk", "b", 1 << 20))
