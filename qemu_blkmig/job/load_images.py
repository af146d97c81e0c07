"""The images that a stream is loaded into: planned, made or locked, marked, opened; flushed and closed, or given up."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qemu_blkmig.destination import images, qemu_nbd
from qemu_blkmig.destination.protocol import Image
from qemu_blkmig.destination.writers import NbdWriter, RawWriter
from qemu_blkmig.errors import BlkmigError, ConnectionLost, DestinationWriteError, Refused
from qemu_blkmig.job.load_options import LoadOptions
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.stable import sync_entry
from qemu_blkmig.stream.blocking import run_blocking
from qemu_blkmig.stream.events import CHUNK
from qemu_blkmig.stream.receiver import Landing, grower

MARK = ".incomplete"
"""What is appended to an image's name for the file that marks it as not (yet) complete."""
CONNECTIONS = 2
"""To the NBD server of an image that is not raw."""


def plan(options: LoadOptions) -> dict[str, Image]:
    """The images, by device, as far as they are known without the stream: a size of 0 is one that it must tell.

    Raises `Refused`.
    """
    return {name: _plan(options, name, str(Path(path).absolute())) for name, path in options.images.items()}


def prepare(plain: Mapping[str, Image], sizes: Mapping[str, int], source: str, made: list[LoadImage]) -> None:
    """Create, check and lock the images; from now on they are marked as incomplete, and the caller's, in `made`.

    `sizes`: what the stream tells of them, by device. Raises `Refused`.
    """
    wanted = [
        image if image.size else msgspec.structs.replace(image, size=sizes.get(name, CHUNK))
        for name, image in plain.items()
    ]
    for prepared in images.prepare(wanted):
        was_marked = prepared.created is None and Path(prepared.image.path + MARK).exists()
        made.append(LoadImage(prepared, bool(plain[prepared.image.disk].size), was_marked))
    for image in made:
        image.mark(source)


async def land(made: Sequence[LoadImage], control: Control) -> None:
    """The images are flushed, closed, and no longer marked. Raises `DestinationWriteError`, `DestinationFailed`."""
    for image in made:
        await image.close_writer(control)
    for image in made:
        image.close()


@dataclass
class LoadImage:
    """One image on its way. `size_known`: from the user or the image, not from the stream's blocks. `was_marked`: it
    was there, and incomplete already.
    """

    prepared: images.Prepared
    size_known: bool
    was_marked: bool
    _server: qemu_nbd.QemuNbd | None = None
    _landing: Landing | None = None
    _closed: bool = False

    @property
    def device(self) -> str:
        """What it is called in the stream."""
        return self.prepared.image.disk

    @property
    def path(self) -> str:
        """Where it is."""
        return self.prepared.image.path

    @property
    def landing(self) -> Landing:
        """Where its blocks go, and what came of them. It must have been opened."""
        if self._landing is None:
            raise RuntimeError("the image is not open")
        return self._landing

    def mark(self, source: str) -> None:
        """From now on whoever looks sees that it is incomplete. Raises `Refused`."""
        try:
            self._mark.write_bytes(os.fsencode(f"qemu-blkmig is loading {self.path} from {source}\n"))
            sync_entry(Path(self.path))
        except OSError as error:
            raise Refused(f"{self._mark} cannot be made: {error.strerror}", disk=self.device) from error

    async def open(self) -> Landing:
        """Make it ready to be written. Raises `DestinationFailed`."""
        image, descriptor = self.prepared.image, self.prepared.descriptor
        grow = None
        if image.format == "raw":
            writer: RawWriter | NbdWriter = RawWriter(descriptor)
            grow = None if self.size_known else grower(descriptor)
        else:
            self._server = await qemu_nbd.start(image.path, image.format, CONNECTIONS)
            writer = NbdWriter(self._server.connections, descriptor, image.format, self._server.spare)
        self._landing = Landing(self.device, image.size, writer, grow, self.prepared.reads_as_zero)
        return self._landing

    async def close_writer(self, control: Control) -> None:
        """Flush it, and end its server. Raises `DestinationWriteError`, `DestinationFailed`."""
        await run_blocking(self._flush, control)
        self.landing.writer.close()
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop()

    def close(self) -> None:
        """It is complete: stable on its disk, and no longer marked."""
        os.fsync(self.prepared.descriptor)
        os.close(self.prepared.descriptor)
        self._closed = True
        self._mark.unlink(missing_ok=True)
        sync_entry(Path(self.path))

    async def give_up(self) -> str:
        """After a failure: let go of it, and remove it if we made it. What has become of it, in words."""
        if self._closed:
            return f"{self.path} is complete and closed"
        if self._landing is not None:
            self._landing.writer.close()
        if self._server is not None:
            with contextlib.suppress(BlkmigError):
                await self._server.stop()
        created = self.prepared.created is not None
        images.give_up(self.prepared)
        if self.was_marked or (self._landing is not None and not created):
            before = " as it was before" if self._landing is None else ""
            return f"{self.path} is incomplete{before}, and marked so by {self._mark}"
        self._mark.unlink(missing_ok=True)
        return f"{self.path} was removed again" if created else f"{self.path} is untouched"

    @property
    def _mark(self) -> Path:
        return Path(self.path + MARK)

    def _flush(self) -> None:
        try:
            self.landing.writer.flush()
        except (OSError, ConnectionLost) as error:
            what = f"the image cannot be flushed: {error}"
            raise DestinationWriteError(what, disk=self.device, offset=None, errno=0) from error


def _plan(options: LoadOptions, device: str, path: str) -> Image:
    told = options.size_of(device) or 0
    if options.create:
        if os.path.lexists(path):
            raise Refused(f"{path} is there already", disk=device, advice="without --create it is filled in")
        size = told or options.expected_size_of(device) or 0
        return Image(device, path, options.format or "raw", size, create=True)
    if not Path(path).exists():
        raise Refused(f"{path} is not there", disk=device, advice="--create makes it")
    image_format = options.format or _recognized(device, path)
    size = images.size_of(path, image_format)
    if told and told != size:
        raise Refused(f"{path} has {size} bytes, not {told}", disk=device)
    return Image(device, path, image_format, size, create=False)


def _recognized(device: str, path: str) -> str:
    """Raw, unless it looks like something else: then the user must say which it is, for a guest could have made it
    look so."""
    looks = images.recognized(path)
    if looks != "raw":
        raise Refused(
            f"{path} looks like {looks}", disk=device, advice=f"say which it is: --format {looks} or --format raw"
        )
    return looks
