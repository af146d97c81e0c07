"""The table of what was written: flat, sparse, and trusted only for what was read back."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import xxhash

from qemu_blkmig.destination.hashtable import HashTable, forget, table_path
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import Refused
from qemu_blkmig.hashing import Algorithm

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
UNIT = 64 * KIB


def made(directory: Path, size: int = 16 * UNIT + 512, algorithm: Algorithm = "xxh3-128") -> HashTable:
    return HashTable(table_path(str(directory / "image")), size, UNIT, algorithm)


def read_back(table: HashTable) -> list[tuple[int, int, bool]]:
    """(offset, length, whether there are digests) of all that is to be read back; taken for good."""
    found = []
    for run in table.unread(MIB):
        found.append((run.extent.offset, run.extent.length, run.digests is not None))
        table.good(run.extent)
        table.goes_on(run.extent.end)
    return found


def test_only_what_was_written_is_to_be_read_back_and_only_once(tmp_path: Path) -> None:
    table = made(tmp_path)
    assert table.left == 0 and read_back(table) == []
    table.wrote(2 * UNIT, memoryview(os.urandom(2 * UNIT)))
    table.zeroed(4 * UNIT, UNIT)
    table.wrote(16 * UNIT, memoryview(os.urandom(512)))
    assert table.left == 4 * UNIT
    assert read_back(table) == [(2 * UNIT, 2 * UNIT, True), (4 * UNIT, UNIT, False), (16 * UNIT, 512, True)]
    assert table.left == 0 and read_back(table) == []
    table.wrote(3 * UNIT, memoryview(os.urandom(UNIT)))
    assert read_back(table) == [(3 * UNIT, UNIT, True)]


@pytest.mark.parametrize("algorithm", ["xxh3-128", "sha256", "blake3"])
def test_each_unit_has_the_digest_of_its_own_bytes(tmp_path: Path, algorithm: Algorithm) -> None:
    table = made(tmp_path, algorithm=algorithm)
    data = os.urandom(2 * UNIT + 512)
    table.wrote(14 * UNIT, memoryview(data))
    (run,) = table.unread(MIB)
    units = [memoryview(data)[start : start + UNIT] for start in range(0, len(data), UNIT)]
    assert run.digests == b"".join(table.digest(unit) for unit in units)
    if algorithm == "xxh3-128":
        assert run.digests[:16] == xxhash.xxh3_128(data[:UNIT]).digest()


def test_what_is_amiss_is_left_but_not_read_back_until_it_is_written_again(tmp_path: Path) -> None:
    table = made(tmp_path)
    table.wrote(0, memoryview(bytes(3 * UNIT)))
    (run,) = table.unread(MIB)
    table.amiss(Extent(UNIT, UNIT))
    table.good(run.extent)
    assert table.left == UNIT and read_back(table) == []
    table.wrote(UNIT, memoryview(bytes(UNIT)))
    assert read_back(table) == [(UNIT, UNIT, True)] and table.left == 0


def test_reading_back_goes_on_where_it_was_and_comes_around(tmp_path: Path) -> None:
    table = made(tmp_path)
    table.wrote(0, memoryview(bytes(8 * UNIT)))
    first = next(iter(table.unread(2 * UNIT)))
    table.good(first.extent)
    table.goes_on(first.extent.end)
    table.wrote(0, memoryview(bytes(UNIT)))
    assert [run.extent.offset // UNIT for run in table.unread(2 * UNIT)] == [2, 4, 6, 0]


def test_before_a_byte_it_goes_on_and_does_not_come_around(tmp_path: Path) -> None:
    """Of a large disk that would be to look through all of it again and again."""
    table = made(tmp_path)
    table.wrote(0, memoryview(bytes(8 * UNIT)))
    table.goes_on(2 * UNIT)
    assert [run.extent for run in table.unread(MIB, 5 * UNIT + 512)] == [Extent(2 * UNIT, 3 * UNIT)]


def test_nothing_has_a_name_until_it_is_kept(tmp_path: Path) -> None:
    table = made(tmp_path)
    assert not list(tmp_path.iterdir())
    table.keep()
    assert list(tmp_path.iterdir()) == [tmp_path / ".image.blkmig-hashes"]
    table.remove()
    assert not list(tmp_path.iterdir())


def test_a_kept_table_s_name_is_stable_where_it_had_one_from_the_beginning_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it has where the file system knows no files without a name."""
    open_, stable = os.open, list[str]()

    def without_nameless(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return open_(path, flags, mode)

    monkeypatch.setattr("os.open", without_nameless)
    monkeypatch.setattr("os.fsync", lambda each: stable.append(str(Path(f"/proc/self/fd/{each}").readlink())))
    table = made(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".image.blkmig-hashes"]
    table.keep()
    assert stable == [str(tmp_path / ".image.blkmig-hashes"), str(tmp_path)]
    table.remove()


def test_a_kept_table_is_taken_up_again_and_trusts_nothing_that_was_read_back(tmp_path: Path) -> None:
    size = 16 * UNIT + 512
    table = made(tmp_path, size)
    table.keep()
    table.wrote(0, memoryview(os.urandom(2 * UNIT)))
    table.zeroed(8 * UNIT, UNIT)
    digests = next(iter(table.unread(MIB))).digests
    read_back(table)
    table.wrote(UNIT, memoryview(os.urandom(UNIT)))
    table.sync()
    table.close()

    path = tmp_path / ".image.blkmig-hashes"
    again = HashTable.reopen(path, size, UNIT, "xxh3-128")
    assert again.left == 3 * UNIT
    first, second = again.unread(MIB)
    assert digests is not None and first.digests is not None and first.digests[:16] == digests[:16]
    assert (first.extent, second.extent) == (Extent(0, 2 * UNIT), Extent(8 * UNIT, UNIT)) and second.digests is None
    again.close()
    for other in ((size + 512, UNIT, "xxh3-128"), (size, 2 * UNIT, "xxh3-128"), (size, UNIT, "sha256")):
        with pytest.raises(Refused, match="does not hold the hashes"):
            HashTable.reopen(path, *other)
    path.unlink()
    with pytest.raises(Refused, match="cannot be read"):
        HashTable.reopen(path, size, UNIT, "xxh3-128")


def test_a_table_that_is_forgotten_does_not_come_back_when_the_host_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would prove that what an earlier recording has brought over lies there, and nobody copied it anew."""
    table = made(tmp_path)
    table.keep()
    table.close()
    stable: list[tuple[str, list[str]]] = []

    def fsync(descriptor: int) -> None:
        place = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        stable.append((place, os.listdir(descriptor)))

    monkeypatch.setattr(os, "fsync", fsync)
    forget(str(tmp_path / "image"))
    assert stable == [(str(tmp_path), [])]
    forget(str(tmp_path / "image"))


def test_the_time_of_a_kept_table_is_that_at_which_it_was_let_go_of(tmp_path: Path) -> None:
    table = made(tmp_path)
    table.keep()
    path = tmp_path / ".image.blkmig-hashes"
    os.utime(path, (0, 0))
    table.close()
    assert path.stat().st_mtime > 0


@pytest.mark.parametrize("damage", ["cut off", "states"])
def test_a_kept_table_that_is_damaged_is_not_relied_upon(tmp_path: Path, damage: str) -> None:
    """Units of a state that nobody knows would never be read back, nor those whose states are gone."""
    size = 16 * UNIT + 512
    table = made(tmp_path, size)
    table.keep()
    table.wrote(0, memoryview(os.urandom(2 * UNIT)))
    table.close()
    path = tmp_path / ".image.blkmig-hashes"
    if damage == "cut off":
        os.truncate(path, 4096)
    else:
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"x")
    with pytest.raises(Refused, match="does not hold the hashes"):
        HashTable.reopen(path, size, UNIT, "xxh3-128")


def test_what_was_amiss_when_the_work_was_left_is_read_back_again(tmp_path: Path) -> None:
    table = made(tmp_path)
    table.keep()
    table.wrote(0, memoryview(os.urandom(UNIT)))
    table.zeroed(4 * UNIT, UNIT)
    for run in table.unread(MIB):
        table.amiss(run.extent)
    assert read_back(table) == [] and table.left == 2 * UNIT
    table.close()
    again = HashTable.reopen(tmp_path / ".image.blkmig-hashes", 16 * UNIT + 512, UNIT, "xxh3-128")
    assert read_back(again) == [(0, UNIT, True), (4 * UNIT, UNIT, False)] and again.left == 0
    again.remove()


def test_the_table_of_a_huge_disk_is_as_large_as_what_was_written(tmp_path: Path) -> None:
    size = 16 * TIB
    table = made(tmp_path, size)
    table.keep()
    places = sorted(random.Random(1).sample(range(size // UNIT), 40))
    for place in places:
        table.wrote(place * UNIT, memoryview(os.urandom(UNIT)))
    assert [offset // UNIT for offset, _, _ in read_back(table)] == places
    assert (tmp_path / ".image.blkmig-hashes").stat().st_blocks * 512 < 2 * 40 * 4 * KIB + 64 * KIB


def test_random_writes_are_told_as_a_plain_list_tells_them(tmp_path: Path) -> None:
    count = 300
    table = made(tmp_path, count * UNIT)
    rng = random.Random(7)
    model = ["none"] * count
    data = memoryview(bytes(8 * UNIT))
    for _ in range(200):
        first = rng.randrange(count)
        length = min(rng.randrange(1, 9), count - first)
        deed = rng.choice(["data", "zero", "read"])
        if deed == "data":
            table.wrote(first * UNIT, data[: length * UNIT])
        elif deed == "zero":
            table.zeroed(first * UNIT, length * UNIT)
        else:
            for run in table.unread(4 * UNIT):
                units = range(run.extent.offset // UNIT, run.extent.end // UNIT)
                assert {model[unit] for unit in units} == {"zero" if run.digests is None else "data"}
                bad = rng.randrange(4) == 0
                if bad:
                    table.amiss(Extent(units[0] * UNIT, UNIT))
                table.good(run.extent)
                table.goes_on(run.extent.end)
                for unit in units:
                    model[unit] = "amiss" if bad and unit == units[0] else "good"
                if rng.randrange(3) == 0:
                    break
            continue
        model[first : first + length] = [deed] * length
    assert table.left == sum(state in ("data", "zero", "amiss") for state in model) * UNIT
    assert sum(length for _, length, _ in read_back(table)) == sum(s in ("data", "zero") for s in model) * UNIT
