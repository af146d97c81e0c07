"""What tells a block device from all others, whatever it is called and whichever number the next boot gives it."""

from __future__ import annotations

import os
from pathlib import Path

_OWN = ("dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial")
"""Below a device's directory in sysfs, the first that is there counts: of the device mapper (LVM, multipath), of an
array, of a disk (SCSI, NVMe, virtio)."""


def known_as(device: int, sysfs: Path = Path("/sys")) -> str:
    """What the kernel knows the block device `device` (st_rdev) by; "" where it knows nothing that outlasts a boot."""
    place = sysfs / "dev/block" / f"{os.major(device)}:{os.minor(device)}"
    if number := _read(place / "partition"):
        whole = _of(place.resolve().parent)
        return whole and f"partition {number} of {whole}"
    return _of(place)


def _of(place: Path) -> str:
    if file := _read(place / "loop/backing_file"):
        return f"loop {_file(file)} {_read(place / 'loop/offset') or 0}"
    return next((f"{name} {told}" for name in _OWN if (told := _read(place / name))), "")


def _file(name: str) -> str:
    try:
        return f"inode {Path(name).stat().st_ino}"
    except OSError:
        return name


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
