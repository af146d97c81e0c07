"""The real QEMUs, images and libvirt of other sides' tests; and no job leaves its run-time directory behind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qmp.conftest import make_image, start_qemu
from tests.virt.conftest import daemonless

__all__ = ["daemonless", "make_image", "start_qemu"]


@pytest.fixture(autouse=True)
def run_time_directories(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place for them, of a test's own, which is empty again when the test is over."""
    tmp_path_factory.getbasetemp()  # pytest's own place is not within it
    with tempfile.TemporaryDirectory() as place:
        monkeypatch.setattr(tempfile, "tempdir", place)
        yield
        assert not list(Path(place).glob("blkmig-*")), "a job was left"
