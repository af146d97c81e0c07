"""When a record is on its storage, and not only in memory: by the calls that bring it there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_blkmig.job.durable import DurableFile


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Tells the names of what was synced so far."""
    names: list[str] = []
    fsync = os.fsync

    def told(descriptor: int) -> None:
        names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", told)
    return lambda: list(names)


def test_a_version_is_synced_before_it_takes_the_name_and_its_directory_after(
    tmp_path: Path, synced: Callable[[], list[str]]
) -> None:
    file = DurableFile(tmp_path / "record.json")
    file.write(b"first", synced=True).result()
    assert synced() == ["record.new", tmp_path.name]
    assert (tmp_path / "record.json").read_bytes() == b"first"


def test_one_that_nobody_waits_for_to_be_synced_is_synced_soon_after(
    tmp_path: Path, synced: Callable[[], list[str]]
) -> None:
    """Renamed and never synced it might be empty after the host has crashed, and nothing would tell of the job."""
    file = DurableFile(tmp_path / "record.json")
    file.write(b"first", synced=False).result()
    file.finish()
    assert synced() == ["record.json", tmp_path.name]
