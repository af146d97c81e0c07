"""An image file that no guest uses, as a source: served read-only by qemu-nbd; nothing of it ever gets dirty."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import Refused
from qemu_blkmig.qmp.disks import Backing, Disk

START = 10.0
"""Seconds in which qemu-nbd must serve."""
CONNECTIONS = 65
"""Most connections that the mover makes to one export, and one to spare."""


class ImageSource:
    """A served image file. Implements the engine's `DirtyLog` and `Guest` for a disk that nobody writes to.

    qemu-nbd holds the image's locks meanwhile, so no guest can start to write to it.
    """

    def __init__(self, disk: Disk, socket: Path, server: asyncio.subprocess.Process) -> None:
        self.disk = disk
        self.socket = socket
        self._server = server

    @classmethod
    async def serve(cls, path: str, image_format: str | None, runtime: Path) -> ImageSource:
        """Serve the image at `path`, of `image_format` (None: as qemu-img recognizes it). Raises `Refused`."""
        disk = await _describe(path, image_format)
        socket = runtime / "image.nbd"
        server = await asyncio.create_subprocess_exec(
            "setpriv", "--pdeathsig", "KILL", "qemu-nbd", "--read-only", "--persistent", f"--shared={CONNECTIONS}",
            "--allocation-depth", f"--format={disk.format}", f"--socket={socket}", path,
            stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        deadline = asyncio.get_running_loop().time() + START
        while not socket.exists():
            if server.returncode is not None or asyncio.get_running_loop().time() > deadline:
                said = await server.stderr.read() if server.stderr and server.returncode is not None else b""
                raise Refused(
                    f"the image {path} cannot be served: {said.decode(errors='replace').strip() or 'qemu-nbd hangs'}",
                    advice="if a guest is using it, copy from the guest: qmp:SOCKET",
                )
            await asyncio.sleep(0.01)
        return cls(disk, socket, server)

    async def close(self) -> None:
        """End the server."""
        if self._server.returncode is None:
            self._server.terminate()
        await self._server.wait()

    async def start(self) -> None:
        """Nothing to record."""

    async def pending(self) -> Mapping[str, int]:
        """Nothing, ever."""
        return {self.disk.name: 0}

    async def harvest(self) -> _NothingDirty:
        """Nothing, ever."""
        return _NothingDirty(self.disk.name)

    async def verify_topology(self) -> None:
        """It has no guest that could change it."""

    async def stop(self) -> None:
        """Nothing was recorded."""

    async def is_paused(self) -> bool:
        """No guest runs on it."""
        return True


class _NothingDirty:
    """The round of a disk that nobody writes to."""

    def __init__(self, disk: str) -> None:
        self.dirty: Mapping[str, int] = {disk: 0}

    async def extents(self, disk: str) -> AsyncIterator[Sequence[Extent]]:
        """None."""
        none: tuple[Sequence[Extent], ...] = ()
        for batch in none:
            yield batch

    async def retire(self) -> None:
        """Nothing is owed."""

    async def restore(self) -> None:
        """Nothing was taken."""


async def _describe(path: str, image_format: str | None) -> Disk:
    if shutil.which("qemu-img") is None:
        raise Refused("qemu-img is missing", advice="install qemu-utils")
    arguments = ["qemu-img", "info", "--output=json", *(["-f", image_format] if image_format else []), "--", path]
    process = await asyncio.create_subprocess_exec(
        *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, said = await process.communicate()
    if process.returncode != 0:
        raise Refused(
            f"the image cannot be read: {said.decode(errors='replace').strip()}",
            advice="if a guest is using it, copy from the guest: qmp:SOCKET",
        )
    info = json.loads(output)
    backing = None
    if name := info.get("backing-filename"):
        backing = Backing(
            filename=name,
            full=info.get("full-backing-filename", name),
            format=info.get("backing-filename-format"),
        )
    with contextlib.suppress(KeyError):
        image_format = str(info["format"])
    return Disk(
        name=Path(path).stem,
        device="",
        qdev="",
        node="",
        format=image_format or "raw",
        size=info["virtual-size"],
        filename=path,
        backing=backing,
        layers=(),
        cluster_size=info.get("cluster-size"),
        encrypted=bool(info.get("encrypted")) or info["format"] == "luks",
        allocated=info.get("actual-size"),
        data_file=None,
    )
