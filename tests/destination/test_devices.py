"""What a block device is known by: what the kernel tells of it that outlasts a boot, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qemu_blkmig.destination.devices import known_as


def tell(sysfs: Path, number: str, files: dict[str, str], inside: str = "") -> int:
    """Lay out a device, `inside` another's directory, as sysfs has it; its number."""
    place = sysfs / "devices" / (inside or "block") / number.replace(":", "-")
    place.mkdir(parents=True, exist_ok=True)
    for name, told in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"{told}\n")
    (sysfs / "dev/block").mkdir(parents=True, exist_ok=True)
    (sysfs / "dev/block" / number).symlink_to(place)
    major, minor = map(int, number.split(":"))
    return os.makedev(major, minor)


@pytest.mark.parametrize(
    ("files", "known"),
    [
        ({"dm/uuid": "LVM-abc", "wwid": "naa.5"}, "dm/uuid LVM-abc"),
        ({"device/wwid": "naa.5000"}, "device/wwid naa.5000"),
        ({"serial": "QM1"}, "serial QM1"),
        ({"serial": "", "size": "4096"}, ""),
    ],
)
def test_a_device_is_known_by_what_outlasts_a_boot(tmp_path: Path, files: dict[str, str], known: str) -> None:
    assert known_as(tell(tmp_path, "8:16", files), tmp_path) == known


def test_a_partition_is_known_by_its_disk_and_number(tmp_path: Path) -> None:
    tell(tmp_path, "8:0", {"wwid": "naa.5"})
    part = tell(tmp_path, "8:1", {"partition": "1"}, "block/8-0")
    assert known_as(part, tmp_path) == "partition 1 of wwid naa.5"
    tell(tmp_path, "9:0", {"size": "1"})
    assert known_as(tell(tmp_path, "9:1", {"partition": "1"}, "block/9-0"), tmp_path) == ""


def test_a_loop_device_is_known_by_its_file_and_where_in_it_it_begins(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    whole = tell(tmp_path, "7:0", {"loop/backing_file": str(file), "loop/offset": "0"})
    part = tell(tmp_path, "7:1", {"loop/backing_file": str(file), "loop/offset": "512"})
    gone = tell(tmp_path, "7:2", {"loop/backing_file": "/nowhere (deleted)", "loop/offset": "0"})
    told = [known_as(number, tmp_path) for number in (whole, part, gone)]
    assert told == [f"loop inode {file.stat().st_ino} 0", f"loop inode {file.stat().st_ino} 512",
                    "loop /nowhere (deleted) 0"]  # fmt: skip
    assert known_as(os.makedev(7, 3), tmp_path) == ""
