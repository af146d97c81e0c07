"""Fixtures of the integration tests: the guest's initramfs, made once, and a laboratory for each test."""

from __future__ import annotations

import functools
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.lab import MARK_VARIABLE, Lab
from qemu_blkmig.demo.guest import Kernel, build_initramfs, find_kernel


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """The kernel that the guests boot."""
    return find_kernel()


@pytest.fixture(scope="session")
def initramfs(kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Where the initramfs without or with (True) the guest agent is; each is made once."""
    folder = tmp_path_factory.mktemp("initramfs")

    @functools.cache
    def made(agent: bool) -> Path:
        path = folder / f"agent-{agent}.cpio"
        build_initramfs(path, kernel, agent=agent)
        return path

    return made


@pytest.fixture
def lab(kernel: Kernel, initramfs: Callable[[bool], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """A laboratory in a folder of its own; all that was started in it ends with the test."""
    mark = uuid.uuid4().hex
    laboratory = Lab(Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp")), kernel, initramfs, mark)
    monkeypatch.setenv(MARK_VARIABLE, mark)
    monkeypatch.setenv("TMPDIR", str(laboratory.temporary))
    monkeypatch.setenv("QEMU_BLKMIG_STATE_DIR", str(laboratory.state))
    # tempfile remembers the folder that it found first.
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield laboratory
    laboratory.close()
