"""The warning that the destination will not have room comes early, once, and again only after it had got better."""

from __future__ import annotations

from qemu_blkmig.destination.protocol import Space
from qemu_blkmig.job.space import SpaceWatch

MIB = 1 << 20


def told(*seen: tuple[str, int, int, int]) -> list[str]:
    """What is noted of disks a (100 MiB at the source) and b (50 MiB): (disk, device, free MiB, allocated MiB)."""
    notes: list[str] = []
    watch = SpaceWatch({"a": 100 * MIB, "b": 50 * MIB}, notes.append)
    for disk, device, free, allocated in seen:
        watch.heard(Space(disk, f"/d{device}/{disk}", device, free * MIB, allocated * MIB))
    return notes


def test_nothing_is_told_while_there_is_room() -> None:
    assert told(("a", 1, 100, 0), ("a", 1, 40, 60), ("a", 1, 0, 100)) == []


def test_it_is_told_once_when_what_is_left_exceeds_what_is_free() -> None:
    [note] = told(("a", 1, 90, 10), ("a", 1, 70, 20), ("a", 1, 60, 30))
    assert note.startswith("/d1 has only 70.0 MiB free, and about 80.0 MiB are still to be written")


def test_disks_of_one_file_system_share_its_room_and_those_of_others_do_not() -> None:
    assert len(told(("a", 1, 120, 0), ("b", 1, 120, 0))) == 1
    assert told(("a", 1, 120, 0), ("b", 2, 120, 0)) == []


def test_it_is_told_again_when_it_had_got_better() -> None:
    assert len(told(("a", 1, 50, 0), ("a", 1, 200, 0), ("a", 1, 50, 10))) == 2


def test_an_image_that_is_allocated_already_needs_no_more_room() -> None:
    assert told(("a", 1, 0, 120)) == []
