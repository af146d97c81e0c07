"""Loop devices for tests."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from integration.hosts import Hosts


@contextlib.contextmanager
def loop_device(file: Path, size: int, sector: int) -> Iterator[Path]:
    """A block device of `size` bytes, with sectors of `sector` bytes, over a new `file`."""
    with file.open("wb") as made:
        made.truncate(size)
    command = ["losetup", "--find", "--show", "--sector-size", str(sector), str(file)]
    device = subprocess.check_output(command, text=True).strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextlib.contextmanager
def called(hosts: Hosts, device: Path, wwid: str) -> Iterator[None]:
    """Both hosts' kernel tells of the loop device what it would of a LUN with this WWID; none can be made here.

    Nothing else is told of it.
    """
    shown = Path("/sys/devices/virtual/block") / device.name
    for far, folder in ((False, hosts.near), (True, hosts.far)):
        instead = folder / f"sysfs-{device.name}"
        (instead / "device").mkdir(parents=True)
        (instead / "device/wwid").write_text(f"{wwid}\n")
        hosts.run("mount", "--bind", instead, shown, far=far)
    try:
        yield
    finally:
        for far in (False, True):
            hosts.run("umount", "-l", shown, far=far)
