"""Real QEMU processes without a guest OS, each with two QMP sockets: one for the test, one for the code under test."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qemu_blkmig.errors import Refused
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.qmp.socket import SocketMonitor

GRANULARITY = 65536


@dataclass
class Qemu:
    """A running QEMU: `monitor` is for the code under test, `user` is somebody else's connection."""

    process: subprocess.Popen[bytes]
    directory: Path
    monitor: Monitor
    user: Monitor

    @property
    def second_socket(self) -> str:
        return str(self.directory / "user.sock")

    async def io(self, device: str, command: str) -> str:
        """Run a qemu-io command on a device or node, like a guest's request; return what it printed."""
        line = f'qemu-io {device} "{command}"'
        return str(await self.user.execute("human-monitor-command", {"command-line": line}))

    async def bitmaps(self) -> list[tuple[str, str]]:
        """All (node, bitmap) of this QEMU."""
        nodes = await self.user.execute("query-named-block-nodes", {"flat": True})
        return [(node["node-name"], bitmap["name"]) for node in nodes for bitmap in node.get("dirty-bitmaps", [])]

    async def exports(self) -> list[str]:
        return [export["id"] for export in await self.user.execute("query-block-exports")]

    async def server_runs(self) -> bool:
        """Whether the QEMU's NBD server runs (starting another one is refused then)."""
        path = str(self.directory / "probe.nbd")
        try:
            await self.user.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
        except Exception:
            return True
        await self.user.execute("nbd-server-stop")
        return False

    async def end(self) -> None:
        await self.monitor.close()
        await self.user.close()
        self.process.kill()
        self.process.wait()


def launch(command: list[str], errors: Path) -> subprocess.Popen[bytes]:
    with errors.open("wb") as output:
        return subprocess.Popen(command, stderr=output)


START = 60.0
"""Seconds in which a QEMU greets: on a busy machine the key of an encrypted image takes it a while."""

StartQemu = Callable[..., Awaitable[Qemu]]


@pytest.fixture
async def start_qemu(tmp_path: Path) -> AsyncIterator[StartQemu]:
    """Start QEMUs with the given further arguments; they end with the test."""
    running: list[Qemu] = []

    async def start(*arguments: str, paused: bool = False) -> Qemu:
        directory = tmp_path / f"qemu{len(running)}"
        directory.mkdir()
        command = ["qemu-system-x86_64", "-accel", "tcg", "-M", "pc", "-m", "16", "-nodefaults", "-display", "none"]
        # With wait=off QEMU now and then greets who comes while it starts, and never reads it.
        command += ["-qmp", f"unix:{directory}/qmp.sock,server=on,wait=on"]
        command += ["-qmp", f"unix:{directory}/user.sock,server=on,wait=off"]
        command += ["-S"] if paused else []
        process = await asyncio.to_thread(launch, [*command, *arguments], directory / "stderr")
        try:
            monitor = None
            while monitor is None:
                if process.poll() is not None:
                    raise RuntimeError((directory / "stderr").read_text())
                with contextlib.suppress(Refused):  # it does not listen yet
                    monitor = await SocketMonitor.connect(str(directory / "qmp.sock"), who="source QEMU", timeout=START)
                await asyncio.sleep(0.02)
            user = await SocketMonitor.connect(str(directory / "user.sock"), who="the user's QEMU", timeout=START)
        except BaseException:
            process.kill()
            process.wait()
            raise
        running.append(Qemu(process, directory, monitor, user))
        return running[-1]

    yield start
    for qemu in running:
        await qemu.end()


MakeImage = Callable[..., Path]


@pytest.fixture
def make_image(tmp_path: Path) -> MakeImage:
    """Make images by qemu-img: (name, size="8M", format="qcow2", backing: Path | None)."""

    def make(name: str, size: str | int = "8M", format: str = "qcow2", backing: Path | None = None) -> Path:
        path = tmp_path / name
        base: list[Any] = ["-b", backing, "-F", "qcow2"] if backing else []
        subprocess.run(["qemu-img", "create", "-q", "-f", format, *base, path, str(size)], check=True)
        return path

    return make
