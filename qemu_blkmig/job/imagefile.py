"""An image file that no guest uses, as a source: served read-only by qemu-nbd; nothing of it ever gets dirty."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from qemu_blkmig.destination import images, locks
from qemu_blkmig.destination.basecache import Identity, identity, settled
from qemu_blkmig.destination.programs import SERVING, missing
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import Refused
from qemu_blkmig.qmp.disks import Disk, Layer, data_file_of, named_backing, snapshots_in

START = 10.0
"""Seconds in which qemu-nbd must serve."""
CONNECTIONS = 65
"""Most connections that the mover makes to one export, and one to spare."""
_IN_USE = "if a guest is using it, copy from the guest: qmp:SOCKET"


class ImageSource:
    """A served image file. Implements the engine's `DirtyLog` and `Guest` for a disk that nobody writes to.

    No guest can start to write to it meanwhile: qemu-nbd alone would let one write to a raw image.
    """

    def __init__(self, disk: Disk, socket: Path, server: asyncio.subprocess.Process, descriptor: int) -> None:
        """Use `serve`. `descriptor` holds the image's lock."""
        self._before: Identity | None = None
        self.disk = disk
        self.socket = socket
        self._server = server
        self._descriptor = descriptor

    @classmethod
    async def serve(cls, path: str, image_format: str | None, runtime: Path) -> ImageSource:
        """Serve the image at `path`, of `image_format` (None: as qemu-img recognizes it). Raises `Refused`."""
        disk = await describe(path, image_format)
        descriptor = _locked(path)
        try:
            return await cls._serve(disk, runtime / "image.nbd", descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    async def _serve(cls, disk: Disk, socket: Path, descriptor: int) -> ImageSource:
        path = disk.filename
        server = await asyncio.create_subprocess_exec(
            "setpriv", "--pdeathsig", "KILL", "qemu-nbd", "--read-only", "--persistent", f"--shared={CONNECTIONS}",
            "--allocation-depth", f"--format={disk.format}", f"--socket={socket}", path,
            stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        deadline = asyncio.get_running_loop().time() + START
        while not socket.exists():
            if server.returncode is not None or asyncio.get_running_loop().time() > deadline:
                said = await server.stderr.read() if server.stderr and server.returncode is not None else b""
                if server.returncode is None:
                    server.kill()
                raise Refused(
                    f"the image {path} cannot be served: {said.decode(errors='replace').strip() or 'qemu-nbd hangs'}",
                    advice=_IN_USE,
                )
            await asyncio.sleep(0.01)
        return cls(disk, socket, server, descriptor)

    async def close(self) -> None:
        """End the server: it only reads, so nothing is lost by killing it.

        qemu-nbd forgets a SIGTERM that comes before its main loop begins, and would serve for ever.
        """
        if self._server.returncode is None:
            self._server.kill()
        await self._server.wait()
        os.close(self._descriptor)

    async def unchanged(self) -> Identity | None:
        """What tells later whether the image is still as it is now; None where nothing does.

        That is so of block devices, and of files that were written to so lately that another change may not be seen.
        """
        _, files = await asyncio.to_thread(images.chain, self.disk.filename, self.disk.format)
        found = identity(files)
        return found if found is not None and settled(found) else None

    def was(self, before: Identity | None) -> None:
        """When a copy of it that is to be gone on with began, `unchanged` told `before`."""
        self._before = before

    async def start(self) -> None:
        """Nothing to record."""

    async def reattach(self) -> None:
        """Nothing was recorded, and need not be, if the image is as it was. Raises `Refused`."""
        path = self.disk.filename
        if self._before is None:
            raise Refused(
                f"whether the image {path} has changed meanwhile cannot be known: it is no file, or was written to "
                "just before its copy began"
            )
        _, files = await asyncio.to_thread(images.chain, path, self.disk.format)
        if identity(files) != self._before:
            raise Refused(
                f"the image {path}, or one below it, has changed since its copy began (its inode, size or time stamps)"
            )

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


def _locked(path: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Refused(f"the image {path} cannot be read: {error.strerror}") from error
    try:
        if locks.lock_as_reader(descriptor):
            return descriptor
    except OSError as error:
        os.close(descriptor)
        raise Refused(f"the image {path} cannot be locked: {error.strerror}") from error
    os.close(descriptor)
    raise Refused(f"the image {path} is open for writing in a QEMU", advice=_IN_USE)


async def describe(path: str, image_format: str | None) -> Disk:
    """The disk that an image of `image_format` (None: as it is recognized) holds. Raises `Refused`."""
    if lacking := missing(SERVING):
        raise Refused("; ".join(lacking))
    try:
        if not (stat.S_ISREG(mode := Path(path).stat().st_mode) or stat.S_ISBLK(mode)):
            raise Refused(f"the image {path} is neither a file nor a block device")
    except OSError as error:
        raise Refused(f"the image {path} cannot be read: {error.strerror}") from error
    arguments = [
        "qemu-img",
        "info",
        "--backing-chain",
        "--output=json",
        *(["-f", image_format] if image_format else []),
        "--",
        path,
    ]
    process = await asyncio.create_subprocess_exec(
        *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, said = await process.communicate()
    if process.returncode != 0:
        words = said.decode(errors="replace").strip()
        raise Refused(f"the image {path} cannot be read: {words}", advice=_IN_USE if "lock" in words else None)
    chain = json.loads(output)
    info = chain[0]
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
        backing=named_backing(info),
        layers=tuple(
            Layer("", each["format"], each["filename"], filter=False, backing=named_backing(each)) for each in chain
        ),
        cluster_size=info.get("cluster-size"),
        encrypted=bool(info.get("encrypted")) or info["format"] == "luks",
        allocated=info.get("actual-size"),
        snapshots=snapshots_in(info),
        data_file=data_file_of(info),
    )
