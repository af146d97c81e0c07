"""A host as libvirt's hook sees it: a state directory, a folder of hooks, domains; the hook runs as libvirt runs it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from qemu_blkmig.hooks.install import install
from qemu_blkmig.places import STATE_VARIABLE

UUID = "c0ffee00-1111-2222-3333-444455556666"


class Host:
    """The hook is installed, alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.hooks = folder / "hooks"
        self.image = folder / "vm.qcow2"
        self.image.touch()
        install(self.hooks, way="directory")

    def xml(self, *sources: str, more: str = "", uuid: str = UUID) -> bytes:
        """A domain with these disks: vda, vdb... (None of the words that libvirt would add.)"""
        disks = "".join(
            f"<disk type='file' device='disk'>\n  <driver name='qemu' type='qcow2'/>\n  <source file='{source}'/>\n"
            f"  <target dev='vd{chr(97 + number)}' bus='virtio'/>{more}</disk>\n"
            for number, source in enumerate(sources or [str(self.image)])
        )
        return f"<domain type='kvm'><name>web1</name><uuid>{uuid}</uuid><devices>{disks}</devices></domain>\n".encode()

    def call(
        self, operation: str, xml: bytes | None = None, hook: Sequence[Path] = (), sub: str = ""
    ) -> subprocess.CompletedProcess[bytes]:
        """As libvirt calls it, which passes next to nothing of its environment."""
        words = ["web1", operation, sub or ("end" if operation in ("stopped", "release") else "begin"), "-"]
        path = hook[0] if hook else self.hooks / "qemu.d" / "50-qemu-blkmig"
        return subprocess.run(
            [path, *words], input=self.xml() if xml is None else xml, capture_output=True, env={"LC_ALL": "C"}
        )

    def passes(self, operation: str, xml: bytes | None = None) -> None:
        """Assert that the hook says nothing."""
        done = self.call(operation, xml)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    def refuses(self, operation: str, *words: str, xml: bytes | None = None) -> str:
        """Assert that the hook refuses, with these words."""
        done = self.call(operation, xml)
        text = done.stderr.decode()
        assert (done.returncode, done.stdout) == (1, b""), done
        for word in words:
            assert word in text, text
        return text


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host of its own."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    return Host(tmp_path)
