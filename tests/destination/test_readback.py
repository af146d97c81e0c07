"""Reading back: while one part is judged the next one is read, and never more than one thing at once."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest

from qemu_blkmig.destination.hashtable import HashTable
from qemu_blkmig.destination.readback import ReadBack
from qemu_blkmig.destination.writers import Read, Writer
from qemu_blkmig.engine.extents import Extent

UNIT = 64 << 10
PART = 2 << 20
SIZE = 4 * PART


class _Storage:
    """An image in memory, slow to read, that notes what is asked of it."""

    def __init__(self, table: HashTable) -> None:
        self.contents = bytearray(os.urandom(SIZE))
        table.wrote(0, memoryview(self.contents))
        self.begun: list[int] = []
        self.bad_at: int | None = None
        self._one = threading.Lock()

    @property
    def idle(self) -> bool:
        return not self._one.locked()

    def read(self, into: memoryview, offset: int) -> None:
        assert self._one.acquire(blocking=False), "two reads at once"
        try:
            self.begun.append(offset)
            time.sleep(0.02)
            if offset == self.bad_at:
                raise OSError(errno.EIO, "the medium is damaged")
            into[:] = self.contents[offset : offset + len(into)]
        finally:
            self._one.release()

    def reading(self, extents: Sequence[Extent]) -> Read:
        assert self.idle
        return self.read

    def zeroes(self, offset: int, length: int) -> Iterator[Extent]:
        assert self.idle
        return iter(())


@pytest.fixture
def table(tmp_path: Path) -> Iterator[HashTable]:
    made = HashTable(tmp_path / "hashes", SIZE, UNIT, "xxh3-128")
    yield made
    made.remove()


def test_the_next_part_is_read_while_one_is_judged(table: HashTable, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, judged_after = _Storage(table), []
    good = table.good

    def judged(extent: Extent) -> None:
        time.sleep(0.03)
        judged_after.append(len(storage.begun))
        good(extent)

    monkeypatch.setattr(table, "good", judged)
    found = ReadBack(cast(Writer, storage), table).run(SIZE, lambda: False)
    assert (found.checked, found.left, found.differ) == (SIZE, 0, [])
    assert judged_after == [2, 3, 4, 4]


def test_what_was_changed_is_found_where_it_is(table: HashTable) -> None:
    storage = _Storage(table)
    wrong = [Extent(UNIT, UNIT), Extent(PART, UNIT), Extent(SIZE - UNIT, UNIT)]
    for each in wrong:
        storage.contents[each.offset] ^= 1
    found = ReadBack(cast(Writer, storage), table).run(SIZE, lambda: False)
    assert found.differ == wrong and found.left == len(wrong) * UNIT


def test_nothing_is_read_any_more_once_it_was_interrupted(table: HashTable) -> None:
    storage = _Storage(table)
    reading = ReadBack(cast(Writer, storage), table)
    found = reading.run(SIZE, lambda: True)
    assert found.checked == PART and storage.idle and len(storage.begun) == 2
    assert reading.run(SIZE, lambda: False).left == 0


def test_what_is_written_again_all_the_time_keeps_nothing_from_being_read_back(table: HashTable) -> None:
    storage = _Storage(table)
    reading = ReadBack(cast(Writer, storage), table)
    for _ in range(SIZE // PART):
        reading.run(PART, lambda: False)
        table.wrote(0, memoryview(storage.contents)[:UNIT])
    assert storage.begun == [*range(0, SIZE, PART)]


def test_a_part_that_cannot_be_read_costs_only_itself(table: HashTable) -> None:
    storage = _Storage(table)
    storage.bad_at = PART
    reading = ReadBack(cast(Writer, storage), table)
    with pytest.raises(OSError, match="damaged"):
        reading.run(SIZE, lambda: False)
    assert storage.idle and table.left == SIZE - PART
    storage.bad_at = None
    assert reading.run(SIZE, lambda: False).left == 0


def test_zeroes_are_read_in_between(table: HashTable) -> None:
    storage = _Storage(table)
    storage.contents[PART : 2 * PART] = bytes(PART)
    table.zeroed(PART, PART)
    storage.contents[PART + UNIT] = 1
    found = ReadBack(cast(Writer, storage), table).run(SIZE, lambda: False)
    assert found.differ == [Extent(PART + UNIT, UNIT)] and found.checked == SIZE


def test_what_had_arrived_does_not_keep_what_lies_before_it_from_being_read_back(
    table: HashTable,
) -> None:
    read_back = ReadBack(cast(Writer, _Storage(table)), table)
    assert read_back.arrived(3 * PART, PART, lambda: False) == [Extent(3 * PART, PART)]
    assert read_back.run(SIZE, lambda: False, below=SIZE).checked == 3 * PART
