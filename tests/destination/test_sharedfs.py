"""Which file system a path lies on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qemu_blkmig.destination import sharedfs
from qemu_blkmig.destination.sharedfs import shared_file_system, shared_file_systems

MOUNTS = r"""22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw
40 22 0:40 / /srv rw shared:5 - nfs4 nas:/srv rw
41 40 259:2 / /srv/local rw shared:6 - xfs /dev/sdb rw
42 22 0:41 / /my\040share rw - fuse.glusterfs vol rw
43 22 0:42 / /mnt rw - nfs nas:/x rw
44 22 259:3 / /mnt rw - ext4 /dev/sdc rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/vm/a", None), ("/srv/a", "nfs4"), ("/srv/local/a", None), ("/srvx/a", None), ("/mnt/a", None),
        ("/my share/a", "fuse.glusterfs"),
    ],
)  # fmt: skip
def test_the_innermost_and_latest_mount_counts(path: str, kind: str | None) -> None:
    assert shared_file_system(path, MOUNTS) == kind


def test_shared_file_systems_are_known_by_their_devices() -> None:
    told = {os.minor(device): kind for device, kind in shared_file_systems(MOUNTS).items()}
    assert told == {40: "nfs4", 41: "fuse.glusterfs", 42: "nfs"}


def test_this_host_s_own_mounts_are_read(tmp_path: Path) -> None:
    assert shared_file_system(str(tmp_path / "a")) is None


@pytest.mark.parametrize("name", [b"caf\xe9", "a\u00a0b".encode(), "a\u0085b".encode()])
def test_a_mount_s_name_may_be_any_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(MOUNTS.encode() + b"45 22 0:43 / /" + name + b" rw - nfs4 nas:/" + name + b" rw\n")
    monkeypatch.setattr(sharedfs, "MOUNTS", mounts)
    assert shared_file_system(os.fsdecode(b"/" + name + b"/a")) == "nfs4"
    assert shared_file_system("/srv/a") == "nfs4"
    assert os.makedev(0, 43) in shared_file_systems()
