"""Image files that no guest uses, as a source: served read-only by qemu-nbd; nothing of them ever gets dirty."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qemu_blkmig.destination import images, locks
from qemu_blkmig.destination.basecache import Identity, identity, settled
from qemu_blkmig.destination.programs import SERVING, missing
from qemu_blkmig.destination.qemu_nbd import KEEPING_MEMORY
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import Refused
from qemu_blkmig.nbd.address import Export, UnixAddress
from qemu_blkmig.qmp.disks import Disk, Layer, data_file_of, is_encrypted, named_backing, snapshots_in
from qemu_blkmig.time_limit import time_limit

START = 10.0
"""Seconds in which qemu-nbd must serve."""
CONNECTIONS = 65
"""Most connections that the mover makes to one export, and one to spare."""
_IN_USE = "if a guest is using it, copy from the guest: qmp:SOCKET"


@dataclass(frozen=True)
class ImageFile:
    """An image at `path`, of `format` (None: as qemu-img recognizes it); `disk`: its name (None: its file's)."""

    path: str
    format: str | None = None
    disk: str | None = None


class _Served:
    """One image, served by a qemu-nbd of its own; `lock`: the descriptor that holds its lock."""

    def __init__(self, disk: Disk, socket: Path, server: asyncio.subprocess.Process, lock: int) -> None:
        self.disk = disk
        self.socket = socket
        self._server = server
        self._lock = lock

    @classmethod
    async def begin(cls, image: ImageFile, socket: Path) -> _Served:
        disk = await describe(image.path, image.format)
        lock = _locked(image.path)
        try:
            server = await _serve(disk, socket)
        except BaseException:
            os.close(lock)
            raise
        return cls(replace(disk, name=image.disk or disk.name), socket, server, lock)

    async def identity(self) -> Identity | None:
        _, files = await asyncio.to_thread(images.chain, self.disk.filename, self.disk.format)
        return identity(files)

    async def close(self) -> None:
        """End the server: it only reads, so nothing is lost by killing it.

        qemu-nbd forgets a SIGTERM that comes before its main loop begins, and would serve for ever.
        """
        if self._server.returncode is None:
            self._server.kill()
        await self._server.wait()
        os.close(self._lock)


class ImageSource:
    """Served image files. Implements the engine's `DirtyLog` and `Guest` for disks that nobody writes to.

    No guest can start to write to them meanwhile: qemu-nbd alone would let one write to a raw image.
    """

    def __init__(self, served: Sequence[_Served]) -> None:
        """Use `serve`."""
        self._served = served
        self._before: Mapping[str, Identity] = {}

    @classmethod
    async def serve(cls, files: Iterable[ImageFile], runtime: Path) -> ImageSource:
        """Serve the images. Raises `Refused`."""
        served: list[_Served] = []
        try:
            for number, image in enumerate(files):
                served.append(await _Served.begin(image, runtime / f"image{number}.nbd"))
        except BaseException:
            await cls(served).close()
            raise
        return cls(served)

    @property
    def disks(self) -> list[Disk]:
        """What the images hold, in the order asked for."""
        return [each.disk for each in self._served]

    @property
    def exports(self) -> dict[str, Export]:
        """Where they are read, by disk."""
        return {each.disk.name: Export(UnixAddress(str(each.socket)), "") for each in self._served}

    async def close(self) -> None:
        """End the servers, and let others write to the images."""
        for each in self._served:
            await each.close()

    async def unchanged(self) -> dict[str, Identity]:
        """What tells later whether the images are still as they are now, by disk, where anything does.

        Nothing does of block devices, and of files that were written to so lately that another change may not be seen.
        """
        found = {each.disk.name: await each.identity() for each in self._served}
        return {disk: files for disk, files in found.items() if files is not None and settled(files)}

    def were(self, before: Mapping[str, Identity]) -> None:
        """When a copy of them that is to be gone on with began, `unchanged` told `before`."""
        self._before = before

    async def start(self) -> None:
        """Nothing to record."""

    async def reattach(self) -> None:
        """Nothing was recorded, and need not be, if the images are as they were. Raises `Refused`."""
        for each in self._served:
            path = each.disk.filename
            before = self._before.get(each.disk.name)
            if before is None:
                raise Refused(
                    f"whether the image {path} has changed meanwhile cannot be known: it is no file, was written to "
                    "just before its copy began, or was not part of the job then"
                )
            if await each.identity() != before:
                raise Refused(
                    f"the image {path}, or one below it, has changed since its copy began (its inode, size or time "
                    "stamps)"
                )

    async def pending(self) -> Mapping[str, int]:
        """Nothing, ever."""
        return dict.fromkeys(self.exports, 0)

    async def harvest(self) -> _NothingDirty:
        """Nothing, ever."""
        return _NothingDirty(self.exports)

    async def stand_ready(self) -> None:
        """Nothing to be quick with."""

    async def verify_topology(self) -> Mapping[str, int]:
        """It has no guest that could change it."""
        return await self.pending()

    async def stop(self) -> None:
        """Nothing was recorded."""

    async def is_paused(self) -> bool:
        """No guest runs on it."""
        return True


class _NothingDirty:
    """The round of disks that nobody writes to."""

    def __init__(self, disks: Iterable[str]) -> None:
        self.dirty: Mapping[str, int] = dict.fromkeys(disks, 0)

    async def extents(self, disk: str) -> AsyncIterator[Sequence[Extent]]:
        """None."""
        none: tuple[Sequence[Extent], ...] = ()
        for batch in none:
            yield batch

    async def retire(self) -> None:
        """Nothing is owed."""

    async def restore(self) -> None:
        """Nothing was taken."""


async def _serve(disk: Disk, socket: Path) -> asyncio.subprocess.Process:
    """The qemu-nbd that serves the disk by now. Raises `Refused`."""
    server = await asyncio.create_subprocess_exec(
        "setpriv", "--pdeathsig", "KILL", "qemu-nbd", "--read-only", "--persistent", f"--shared={CONNECTIONS}",
        "--allocation-depth", f"--format={disk.format}", f"--socket={socket}", disk.filename,
        stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True,
        env=os.environ | KEEPING_MEMORY,
    )  # fmt: skip
    try:
        async with time_limit(START):
            while not socket.exists():
                if server.returncode is not None:
                    said = (await server.stderr.read()).decode(errors="replace") if server.stderr else ""
                    raise Refused(f"the image {disk.filename} cannot be served: {said.strip()}", advice=_IN_USE)
                await asyncio.sleep(0.01)
    except BaseException as error:
        if server.returncode is None:
            server.kill()
        if isinstance(error, TimeoutError):
            raise Refused(f"the image {disk.filename} cannot be served: qemu-nbd hangs", advice=_IN_USE) from None
        raise
    return server


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
    """The disk that an image of `image_format` holds; None: as it is recognized, where it names no other file.

    Raises `Refused`.
    """
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
    backing, data_file = named_backing(info), data_file_of(info)
    others = [None if backing is None else backing.filename, data_file, *_extents_elsewhere(info)]
    named = next((name for name in others if name is not None), None)
    if image_format is None and named is not None:
        raise Refused(
            f"the image {path} looks like {info['format']} that goes on in {named}; a guest may have written such a "
            "header to its raw disk, to have that file copied along",
            advice=f"if it is {info['format']}: --source-format {info['format']}; if it is a raw disk: "
            "--source-format raw",
        )
    return Disk(
        name=Path(path).stem,
        device="",
        qdev="",
        node="",
        format=str(info["format"]),
        size=info["virtual-size"],
        filename=path,
        backing=backing,
        layers=tuple(
            Layer("", each["format"], each["filename"], False, named_backing(each), encrypted=is_encrypted(each))
            for each in chain
        ),
        cluster_size=info.get("cluster-size"),
        encrypted=is_encrypted(info),
        allocated=info.get("actual-size"),
        snapshots=snapshots_in(info),
        data_file=data_file,
    )


def _extents_elsewhere(info: Mapping[str, Any]) -> list[str]:
    """Files that a VMDK's descriptor, which is plain text, has its data in: any whatever."""
    extents = info.get("format-specific", {}).get("data", {}).get("extents", ())
    own = os.path.realpath(info["filename"])
    return [extent["filename"] for extent in extents if os.path.realpath(extent["filename"]) != own]
