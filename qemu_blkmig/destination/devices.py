"""What tells a block device from all others, whatever it is called and whichever number the next boot gives it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

_OWN = ("dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial")
"""Below a device's directory in sysfs, the first that is there counts: of the device mapper (LVM, multipath), of an
array, of a disk (SCSI, NVMe, virtio)."""
_PART = r"(?:partition \d+ of )?"
_CERTAIN = re.compile(
    _PART + r"(?:dm/uuid (?:LVM-\w{32}|CRYPT-\w+-[0-9a-f]{32}$|(?:part\d+-)?mpath-(?:2|8|3(?!6000000)|eui\.|uuid\.))"
    r"|md/uuid |rbd |(?:device/)?wwid (?:naa\.(?!6000000)|eui\.|uuid\.))"
)
"""Names that are made to be given once. Serial numbers, and names made of them (t10., nvme.), are typed in by people,
or counted from 1 by every target (tgt: naa.6000000...)."""
_ENCRYPTED = re.compile(r"(CRYPT-\w+-[0-9a-f]{32})-.*")
_ACCIDENTAL = re.compile(r"CRYPT-|.*-devnode_")
"""Of the device mapper: a key without a header (dm-crypt, plain), numbers of the kernel (kpartx)."""
_MULTIPATH = re.compile(r"(?:part(\d+)-)?mpath-")
_DRBD = 147
"""Its major number (the kernel's devices.txt)."""


def known_as(device: int, sysfs: Path = Path("/sys")) -> str:
    """What the kernel knows the block device `device` (st_rdev) by; "" where it knows nothing that outlasts a boot."""
    place = sysfs / "dev/block" / f"{os.major(device)}:{os.minor(device)}"
    if number := _read(place / "partition"):
        whole = _of(place.resolve().parent)
        return whole and f"partition {number} of {whole}"
    return _of(place)


def names(device: int, sysfs: Path = Path("/sys")) -> list[str]:
    """What the block device `device` (st_rdev) is called by on whichever host it is attached to.

    None of a loop device, nor what another host's may well be called, too, unless it may be the same all the same.
    """
    return _names((sysfs / "dev/block" / f"{os.major(device)}:{os.minor(device)}").resolve())


def common(here: Iterable[str], there: Iterable[str]) -> str | None:
    """What a device here and one there are both called (`names`), or the disk that one of them is a partition of.

    The most certain one (`is_certain`); None: as far as can be told they are different devices.
    """
    ours, theirs = set(here), set(there)
    wholes = {_whole(name) for name in ours} & theirs | {_whole(name) for name in theirs} & ours
    return min(ours & theirs | wholes, key=lambda name: (not is_certain(name), name), default=None)


def is_certain(name: str) -> bool:
    """Whether no two devices have this name, but for clones (of a volume group, or a host's disk with one)."""
    return _CERTAIN.match(name) is not None


def _whole(name: str) -> str:
    return re.sub(f"^{_PART}", "", name)


def _names(place: Path) -> list[str]:
    if number := _read(place / "partition"):
        return [f"partition {number} of {name}" for name in _names(place.parent)]
    if uuid := _read(place / "dm/uuid"):
        return _mapped(uuid, place)
    if cluster := _read(place / "device/cluster_fsid"):
        # A volume of Ceph's that the kernel attached (Documentation/ABI/testing/sysfs-bus-rbd).
        return [f"rbd {cluster} {_read(place / 'device/pool_id')} {_read(place / 'device/image_id')}"]
    if _read(place / "dev").startswith(f"{_DRBD}:"):
        return [place.name]
    return [told for told in (_of(place),) if told and not told.startswith("loop ")]


def _mapped(uuid: str, place: Path) -> list[str]:
    """By the UUID that its maker gave it; a disk that the other host sees without multipath is called by its own."""
    if part := _MULTIPATH.match(uuid):
        prefix = f"partition {part[1]} of " if part[1] else ""
        below = [name for path in sorted((place / "slaves").glob("*")) for name in _names(path.resolve())]
        return [f"dm/uuid {uuid}", *dict.fromkeys(prefix + name for name in below)]
    if encrypted := _ENCRYPTED.fullmatch(uuid):
        return [f"dm/uuid {encrypted[1]}"]
    return [] if _ACCIDENTAL.match(uuid) else [f"dm/uuid {uuid}"]


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
