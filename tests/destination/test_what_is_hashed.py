"""Digests are of what was read from the source: put in on purpose, every other choice of bytes must be noticed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_blkmig.destination import sink
from qemu_blkmig.destination.hashtable import HashTable
from qemu_blkmig.destination.mover import DiskMover, Settings
from qemu_blkmig.destination.writers import Done, RawWriter
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.nbd.pump import Lease
from qemu_blkmig.nbd.throttle import Throttle
from tests.nbd.servers import qemu_export

KIB, MIB = 1 << 10, 1 << 20
UNIT = 64 * KIB
SIZE = 4 * MIB + 512
BAD = 1 * MIB + 3 * UNIT + 17

Patch = pytest.MonkeyPatch


class BadDisk(RawWriter):
    """Flips a byte of what it is given at `BAD`."""

    def write(self, data: memoryview, offset: int, done: Done) -> None:
        """See `Writer`."""
        spoilt = bytearray(data)
        if offset <= BAD < offset + len(data):
            spoilt[BAD - offset] ^= 1
        super().write(memoryview(spoilt), offset, done)


def verified(directory: Path, kind: type[RawWriter], below: int | None = None) -> tuple[int, list[Extent]]:
    """Bytes read back and what is found amiss, after a disk, parts of it zeroes, was copied through a writer."""
    source, destination = directory / "source", directory / "destination"
    content = bytearray(os.urandom(SIZE))
    content[UNIT : 2 * UNIT] = bytes(UNIT)
    content[5 * UNIT : 5 * UNIT + 4 * KIB] = bytes(4 * KIB)
    source.write_bytes(content)
    with destination.open("wb") as file:
        file.truncate(SIZE)
    with qemu_export(directory, source) as (listening, _), destination.open("r+b") as file:
        writer = kind(file.fileno())
        table = HashTable(directory / "table", SIZE, UNIT, "xxh3-128")
        settings = Settings(str(listening), "disk", 1, 4, MIB, 4 * KIB, None)
        disk = DiskMover("d", SIZE, settings, writer, Throttle(), reads_as_zero=True, table=table)
        control = Control()
        disk.course([Extent(0, SIZE)], control, bulk=True, over=lambda _: None).run()
        control.close()
        checked, found = 0, []
        while (told := disk.verify(MIB, lambda: False, below)).checked:
            checked += told.checked
            found += told.differ
        disk.disconnect()
        table.remove()
        writer.close()
    return checked, found


def check() -> None:
    """A bad disk is found out, and a good one is not blamed."""
    with tempfile.TemporaryDirectory() as place:
        assert verified(Path(place), BadDisk) == (SIZE, [Extent(BAD // UNIT * UNIT, UNIT)])
    with tempfile.TemporaryDirectory() as place:
        assert verified(Path(place), RawWriter) == (SIZE, [])


def hash_what_lies_at_the_destination(patch: Patch) -> None:
    """What was written is read back at once, and that is hashed."""
    data = sink.CopySink.data

    def write_then_hash(self: sink.CopySink, lease: Lease) -> None:
        table, self._table = self._table, None
        data(self, lease)
        self._table = table
        there = bytearray(lease.piece.length)
        self._writer.read(memoryview(there), lease.piece.offset)
        assert table is not None
        table.wrote(lease.piece.offset, memoryview(there))

    patch.setattr(sink.CopySink, "data", write_then_hash)


def hash_the_whole_slot(patch: Patch) -> None:
    """The buffer is hashed from its beginning for every unit."""
    wrote = HashTable.wrote

    def first_unit_again(self: HashTable, offset: int, data: memoryview) -> None:
        for start in range(0, len(data), UNIT):
            wrote(self, offset + start, data[: min(UNIT, len(data) - start)])

    patch.setattr(HashTable, "wrote", first_unit_again)


def hash_a_buffer_that_is_in_use_again(patch: Patch) -> None:
    """Digests are taken when the buffer has been given back, and the next read has gone into it."""
    data = sink.CopySink.data
    late: list[tuple[int, memoryview]] = []

    def later(self: sink.CopySink, lease: Lease) -> None:
        table, self._table = self._table, None
        data(self, lease)
        self._table = table
        late.append((lease.piece.offset, lease.view))
        assert table is not None
        if len(late) == 3 or lease.piece.length < MIB:
            for offset, _ in late:
                table.wrote(offset, lease.view)
            late.clear()

    patch.setattr(sink.CopySink, "data", later)


def leave_out_what_was_found_to_be_zero(patch: Patch) -> None:
    """Only the parts that are written as data are hashed."""
    wrote = HashTable.wrote

    def without_zeroes(self: HashTable, offset: int, data: memoryview) -> None:
        for start, end, zero in sink.zero_runs(data, offset, 4 * KIB):
            if not zero and (offset + start) % UNIT == 0:
                wrote(self, offset + start, data[start:end])

    patch.setattr(HashTable, "wrote", without_zeroes)


MUTANTS: tuple[Callable[[Patch], None], ...] = (
    hash_what_lies_at_the_destination,
    hash_the_whole_slot,
    hash_a_buffer_that_is_in_use_again,
    leave_out_what_was_found_to_be_zero,
)


def test_where_nothing_can_be_read_beside_the_first_pass_nothing_is(tmp_path: Path) -> None:
    class OneThingAtATime(RawWriter):
        works_beside = False

    assert verified(tmp_path, OneThingAtATime, below=SIZE) == (0, [])
    assert verified(tmp_path, RawWriter, below=SIZE // UNIT * UNIT) == (SIZE // UNIT * UNIT, [])


def test_a_disk_that_changes_what_it_is_given_is_found_out_and_a_good_one_is_not() -> None:
    check()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_hashing_the_wrong_bytes_is_noticed(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
