"""What a block device is known by: what the kernel tells of it that outlasts a boot, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qemu_blkmig.destination.devices import common, is_certain, known_as, names


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


LVM = f"LVM-{'a' * 32}{'b' * 32}"
LUKS = f"CRYPT-LUKS2-{'0' * 32}"


@pytest.mark.parametrize(
    ("files", "called", "certain"),
    [
        ({"dm/uuid": LVM}, [f"dm/uuid {LVM}"], True),
        ({"dm/uuid": f"{LUKS}-here"}, [f"dm/uuid {LUKS}"], True),
        ({"dm/uuid": "CRYPT-PLAIN-swap"}, [], False),
        ({"dm/uuid": "part1-devnode_7:0_Wh5pYvM"}, [], False),
        ({"dm/uuid": "mine"}, ["dm/uuid mine"], False),
        ({"dm/uuid": ""}, [], False),
        ({"device/wwid": "naa.5000c500a0b1c2d3"}, ["device/wwid naa.5000c500a0b1c2d3"], True),
        ({"device/wwid": "naa.60000000000000000e00000000010001"}, None, False),
        ({"device/wwid": "t10.ATA     QEMU HARDDISK    QM00001"}, None, False),
        ({"wwid": "eui.0025385b71b00001"}, ["wwid eui.0025385b71b00001"], True),
        ({"wwid": "nvme.1b36-31-51454d55-00000001"}, None, False),
        ({"serial": "data"}, ["serial data"], False),
        ({"device/cluster_fsid": "c", "device/pool_id": "2", "device/image_id": "1f"}, ["rbd c 2 1f"], True),
        ({"loop/backing_file": "/nowhere", "loop/offset": "0"}, [], False),
        ({"size": "4096"}, [], False),
    ],
)
def test_what_a_device_is_called_on_all_hosts_and_whether_another_may_be_called_so(
    tmp_path: Path, files: dict[str, str], called: list[str] | None, certain: bool
) -> None:
    found = names(tell(tmp_path, "8:16", files), tmp_path)
    assert called is None or found == called
    assert [is_certain(name) for name in found] == [certain] * len(found)
    inside = names(tell(tmp_path, "8:17", {"partition": "2"}, "block/8-16"), tmp_path)
    assert inside == [f"partition 2 of {name}" for name in found]
    assert [is_certain(name) for name in inside] == [certain] * len(found)


def test_a_mirror_of_drbd_is_called_by_its_number_which_others_have_too(tmp_path: Path) -> None:
    (called,) = names(tell(tmp_path, "147:3", {"dev": "147:3"}), tmp_path)
    assert called == "147-3" and not is_certain(called)


def test_a_disk_is_the_same_whether_a_host_sees_it_with_multipath_or_without(tmp_path: Path) -> None:
    path = tell(tmp_path, "8:0", {"device/wwid": "naa.6001405a"})
    first = tell(tmp_path, "8:1", {"partition": "1"}, "block/8-0")
    dm = {"253:0": "mpath-36001405a", "253:1": "part1-mpath-36001405a"}
    whole, part = (tell(tmp_path, number, {"dm/uuid": uuid}) for number, uuid in dm.items())
    for above, below in (("253-0", "8-0"), ("253-1", "253-0")):
        slaves = tmp_path / "devices/block" / above / "slaves"
        slaves.mkdir()
        (slaves / below).symlink_to(tmp_path / "devices/block" / below)
    known = {each: names(each, tmp_path) for each in (path, first, whole, part)}
    assert common(known[path], known[whole]) == "device/wwid naa.6001405a"
    assert common(known[first], known[part]) == "partition 1 of device/wwid naa.6001405a"
    assert all(is_certain(name) for each in known.values() for name in each)


def test_a_disk_and_a_partition_of_it_are_in_each_other_s_way_and_two_partitions_are_not() -> None:
    whole, first, second = ["wwid eui.1"], ["partition 1 of wwid eui.1"], ["partition 2 of wwid eui.1"]
    assert common(whole, first) == common(first, whole) == "wwid eui.1"
    assert common(first, second) is None and common([], whole) is None
    assert common(["serial 1", *whole], ["serial 1", *whole]) == "wwid eui.1"
