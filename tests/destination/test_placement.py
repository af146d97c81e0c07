"""Reading back past qemu-nbd: what lies where in the image's file, by real images that a real server writes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from qemu_blkmig.destination import placement, qemu_nbd
from qemu_blkmig.destination.placement import Part, Placement, Placements
from qemu_blkmig.destination.writers import NbdWriter
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.job import last_round

KIB, MIB = 1 << 10, 1 << 20
SIZE = 32 * MIB + 512


def create(path: Path, *options: str) -> Path:
    """A qcow2 image of `SIZE` bytes."""
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", *options, path, str(SIZE)], check=True)
    return path


def qemu_io(path: Path, *commands: str) -> None:
    """Have qemu-io write to an image."""
    script = [argument for command in commands for argument in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *script, path], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Placements]:
    """What tells of an image, however little of it."""
    monkeypatch.setattr(placement, "WORTH", 1)
    return lambda path: Placements(os.open(path, os.O_RDWR), "qcow2")


def test_parts_are_told_in_order_and_leave_out_nothing() -> None:
    told = Placement([(Extent(10, 5), 100), (Extent(15, 5), 200), (Extent(30, 10), 300)])
    assert list(told.parts(0, 50)) == [
        Part(Extent(0, 10), None),
        Part(Extent(10, 5), 100),
        Part(Extent(15, 5), 200),
        Part(Extent(20, 10), None),
        Part(Extent(30, 10), 300),
        Part(Extent(40, 10), None),
    ]
    assert list(told.parts(12, 5)) == [Part(Extent(12, 3), 102), Part(Extent(15, 2), 200)]
    assert list(told.parts(45, 1)) == [Part(Extent(45, 1), None)]
    assert list(Placement().parts(3, 4)) == [Part(Extent(3, 4), None)]
    assert told.places([Extent(0, 12), Extent(19, 12)]) == [Extent(100, 2), Extent(204, 1), Extent(300, 1)]


@pytest.fixture
async def writer(tmp_path: Path, opened: object) -> AsyncIterator[NbdWriter]:
    """Of an empty image, `tmp_path / "image"`."""
    path = create(tmp_path / "image")
    server = await qemu_nbd.start(str(path), "qcow2", 2)
    descriptor = os.open(path, os.O_RDWR)
    made = NbdWriter(server.connections, descriptor, "qcow2", server.spare)
    yield made
    made.close()
    os.close(descriptor)
    await server.stop()


def write(writer: NbdWriter, data: bytes, offset: int) -> None:
    """Write, and wait for it."""
    completed: list[tuple[object, int]] = []
    writer.connections[0].write(memoryview(data), offset, completed, None)
    assert not writer.connections[0].wait(completed)


async def test_what_is_read_past_the_server_is_what_was_written(
    writer: NbdWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(3)
    model = bytearray(SIZE)
    starts = list(range(0, SIZE, MIB))
    dice.shuffle(starts)
    written = []
    for start in starts[:24]:
        data = dice.randbytes(min(dice.randrange(1, MIB), SIZE - start))
        written.append(len(data))
        write(writer, data, start)
        model[start : start + len(data)] = data
    writer.flush()
    by_server: list[int] = []
    read = writer.read

    def noted(into: memoryview, offset: int) -> None:
        by_server.append(len(into))
        read(into, offset)

    monkeypatch.setattr(writer, "read", noted)
    reading = writer.reading([Extent(0, SIZE)])
    for start in range(0, SIZE, 3 * MIB):
        there = memoryview(bytearray(min(3 * MIB, SIZE - start)))
        reading(there, start)
        assert there == model[start : start + len(there)]
    assert 0 < sum(by_server) <= SIZE - sum(written)


async def test_what_was_written_anew_since_is_told_of_anew(writer: NbdWriter) -> None:
    write(writer, b"1" * MIB, 0)
    writer.flush()
    writer.reading([Extent(0, MIB)])
    completed: list[tuple[object, int]] = []
    writer.connections[0].zero(0, MIB, completed, None)
    assert not writer.connections[0].wait(completed)
    write(writer, b"2" * MIB, MIB)
    write(writer, b"3" * MIB, 0)
    writer.flush()
    there = memoryview(bytearray(MIB))
    writer.reading([Extent(0, MIB)])(there, 0)
    assert there == b"3" * MIB


def test_data_in_a_file_of_its_own_and_compressed_data_are_left_to_the_server(
    opened: Callable[[Path], Placements], tmp_path: Path
) -> None:
    apart = create(tmp_path / "apart", "-o", f"data_file={tmp_path / 'data'}")
    qemu_io(apart, "write 0 1M")
    squeezed = create(tmp_path / "squeezed")
    qemu_io(squeezed, "write -c 0 64k", "write 64k 64k")
    assert list(opened(apart).of([Extent(0, MIB)]).parts(0, MIB)) == [Part(Extent(0, MIB), None)]
    found = [part.place is None for part in opened(squeezed).of([Extent(0, MIB)]).parts(0, 128 * KIB)]
    assert found == [True, False]


def test_what_is_zero_by_its_entry_is_not_read_where_it_was_stored(
    opened: Callable[[Path], Placements], tmp_path: Path
) -> None:
    image = create(tmp_path / "image")
    qemu_io(image, "write -P 1 0 128k", "write -z 0 64k")
    found = [part.place is None for part in opened(image).of([Extent(0, MIB)]).parts(0, 128 * KIB)]
    assert found == [True, False]


def test_what_a_backing_file_holds_is_left_to_the_server(opened: Callable[[Path], Placements], tmp_path: Path) -> None:
    base = create(tmp_path / "base")
    qemu_io(base, "write 0 1M")
    overlay = create(tmp_path / "overlay", "-b", str(base), "-F", "qcow2")
    qemu_io(overlay, "write 64k 64k")
    found = [part.place is None for part in opened(overlay).of([Extent(0, MIB)]).parts(0, 256 * KIB)]
    assert found == [True, False, True]


def test_without_qemu_img_nothing_is_told(
    opened: Callable[[Path], Placements], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = create(tmp_path / "image")
    qemu_io(image, "write 0 1M")
    told = opened(image)
    assert told.of([Extent(0, MIB)]).places([Extent(0, MIB)])
    usual = os.environ["PATH"]
    monkeypatch.setenv("PATH", "/nonexistent")
    assert not told.of([Extent(0, MIB)]).places([Extent(0, MIB)])
    monkeypatch.setenv("PATH", usual)
    assert not told.of([Extent(0, MIB)]).places([Extent(0, MIB)])


def test_little_and_what_is_far_apart_is_not_asked_for(tmp_path: Path) -> None:
    image = create(tmp_path / "image")
    qemu_io(image, "write 0 20M")
    told = Placements(os.open(image, os.O_RDWR), "qcow2")
    assert told.of([Extent(0, 20 * MIB)]).places([Extent(0, 20 * MIB)])
    assert not told.of([Extent(0, MIB)]).places([Extent(0, MIB)])
    assert not told.of([Extent(0, 20 * MIB), Extent(placement.SPAN, MIB)]).places([Extent(0, 20 * MIB)])


@pytest.mark.parametrize("options", ["cluster_size=512", "extended_l2=on,cluster_size=16k"])
def test_of_a_disk_in_small_pieces_less_is_asked_for_at_once(tmp_path: Path, options: str) -> None:
    told = Placements(os.open(create(tmp_path / "image", "-o", options), os.O_RDWR), "qcow2")
    qemu_io(tmp_path / "image", "write 0 20M")
    assert told.of([Extent(0, 20 * MIB)]).places([Extent(0, 20 * MIB)])
    apart = [Extent(0, 20 * MIB), Extent(placement.MOST_TOLD * 512, 512)]
    assert not told.of(apart).places(apart)


def test_a_guest_that_is_paused_does_not_wait_for_a_qemu_img_that_hangs(
    opened: Callable[[Path], Placements], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert last_round.PATIENCE / 2 >= placement.PATIENCE
    image = create(tmp_path / "image")
    qemu_io(image, "write 0 1M")
    told = opened(image)
    hanging = tmp_path / "bin" / "qemu-img"
    hanging.parent.mkdir()
    answer = json.dumps([{"start": 0, "length": MIB, "data": True, "offset": MIB}])
    hanging.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\nprint({answer!r})\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("PATH", str(hanging.parent), prepend=os.pathsep)
    monkeypatch.setattr(placement, "PATIENCE", 0.2)
    assert not told.of([Extent(0, MIB)]).places([Extent(0, MIB)])
