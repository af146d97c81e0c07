"""Real QEMUs without a guest system, as sources and destinations of migrations."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.nbd.servers import Monitor


class Qemu:
    """A running QEMU and a connection to its monitor; `qmp`: a second socket, for the code under test."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes]) -> None:
        self.directory = directory
        self.process = process
        self.qmp = directory / "qmp"
        self._monitor = _connected(directory / "monitor")

    def __call__(self, command: str, **arguments: Any) -> Any:
        return self._monitor(command, **{key.replace("_", "-"): value for key, value in arguments.items()})

    def io(self, drive: str, command: str) -> None:
        """A request as if from the guest."""
        said = self("human-monitor-command", command_line=f'qemu-io {drive} "{command}"')
        assert "error" not in said.lower(), said

    def migrate(self, uri: str, **kind: bool) -> None:
        """Migrate all of it: a downtime limit of 1 ms keeps the old engine from losing data (FACTS.md)."""
        self("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=1)
        self("migrate", uri=uri, **kind)
        assert self.outcome() == "completed"

    def outcome(self) -> str:
        """How its migration, outgoing or incoming, ended."""
        for _ in range(600):
            status = str(self("query-migrate").get("status"))
            if status in ("completed", "failed", "cancelled"):
                return status
            time.sleep(0.05)
        return "still " + status

    def quit(self) -> None:
        """End it in order: its images are written out. It may be gone before it has answered, and now and then an old
        one dies of it: what is in the images is for the caller to see."""
        with contextlib.suppress(ValueError, OSError):
            self("quit")
        self.process.wait(20)


@contextlib.contextmanager
def qemu(directory: Path, *arguments: str, machine: str = "pc", prefix: Sequence[str] = ()) -> Iterator[Qemu]:
    """A QEMU that runs nothing; it ends with the block. `prefix`: before its command."""
    directory.mkdir()
    command = [
        *prefix,
        "qemu-system-x86_64",
        "-M",
        machine,
        "-accel",
        "tcg",
        "-m",
        "16",
        "-nodefaults",
        "-display",
        "none",
    ]
    # With wait=off QEMU now and then greets who comes while it starts, and never reads it.
    for name, wait in (("monitor", "on"), ("qmp", "off")):
        command += ["-qmp", f"unix:{directory}/{name},server=on,wait={wait}"]
    process = subprocess.Popen(
        [*command, *arguments], cwd=directory, stdout=subprocess.DEVNULL, stderr=(directory / "stderr").open("wb")
    )
    try:
        yield Qemu(directory, process)
    finally:
        process.kill()
        process.wait()


def drive(path: Path, image_format: str, name: str = "vda") -> tuple[str, str]:
    return "-drive", f"file={path},format={image_format},if=virtio,id={name},discard=unmap"


def make_image(path: Path, image_format: str, size: int, *writes: str, base: Path | None = None) -> Path:
    """An image; `writes`: commands of qemu-io."""
    backing = ["-b", str(base), "-F", "raw"] if base else []
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, *backing, path, str(size)], check=True)
    for command in writes:
        subprocess.run(["qemu-io", "-f", image_format, "-c", command, path], check=True, stdout=subprocess.DEVNULL)
    return path


def same(first: Path, first_format: str, second: Path, second_format: str) -> bool:
    """Whether two images hold the same."""
    command = ["qemu-img", "compare", "-U", "-f", first_format, "-F", second_format, str(first), str(second)]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


def _connected(path: Path) -> Monitor:
    for _ in range(400):
        connection = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            connection.connect(str(path))
            return Monitor(connection)
        connection.close()
        time.sleep(0.02)
    raise RuntimeError(f"{path}: QEMU did not start")
