"""`load`: a migration stream of the old wire format into images; or on to a new QEMU, the images beside it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from qemu_blkmig.destination import images, qemu_nbd
from qemu_blkmig.destination.protocol import Image
from qemu_blkmig.destination.writers import NbdWriter, RawWriter
from qemu_blkmig.errors import (
    BlkmigError,
    ConnectionLost,
    DestinationWriteError,
    Interrupted,
    MigrationError,
    Refused,
    UsageError,
)
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.stream.blocking import run_blocking
from qemu_blkmig.stream.channel import Channel, check, open_source, open_target
from qemu_blkmig.stream.events import CHUNK, DeviceState
from qemu_blkmig.stream.framing import PAGE_SIZE
from qemu_blkmig.stream.receiver import Landing, Receiver, grower
from qemu_blkmig.stream.survey import survey
from qemu_blkmig.units import show_bytes

MARK = ".incomplete"
"""What is appended to an image's name for the file that marks it as not (yet) complete."""
CONNECTIONS = 2
"""To the NBD server of an image that is not raw."""

PERCENT_STEP = 10

_T = TypeVar("_T")


@dataclass(frozen=True)
class LoadOptions:
    """`images`: path by device. `sizes`, `expected`: bytes by device, None: of every device not named.

    `incremental`: parts that never come are left as they are, without a warning.
    """

    source: str
    images: Mapping[str, str]
    create: bool = False
    format: str | None = None
    sizes: Mapping[str | None, int] = field(default_factory=dict)
    expected: Mapping[str | None, int] = field(default_factory=dict)
    require_complete: bool = False
    incremental: bool = False
    forward: str | None = None
    page_size: int = PAGE_SIZE


class LoadedDisk(msgspec.Struct, frozen=True):
    """One device; sizes in bytes. `missing`: what never came, `first_missing`: where that begins."""

    name: str
    image: str
    format: str
    virtual_size: int
    size_known: bool
    created: bool
    blocks: int
    zero_blocks: int
    written: int
    zeroed: int
    missing: int
    first_missing: int | None


class LoadResult(msgspec.Struct, frozen=True):
    """What was loaded. `proven`: what the stream proves; `warnings`: what it does not."""

    outcome: str
    machine: str | None
    disks: list[LoadedDisk]
    forwarded: str | None
    proven: list[str]
    warnings: list[str]


@dataclass
class _Target:
    """One image on its way. `size_known`: from the user or the image, not from the stream's blocks."""

    prepared: images.Prepared
    size_known: bool
    server: qemu_nbd.QemuNbd | None = None
    landing: Landing | None = None
    closed: bool = False

    @property
    def name(self) -> str:
        return self.prepared.image.disk

    @property
    def path(self) -> str:
        return self.prepared.image.path

    @property
    def landed(self) -> Landing:
        if self.landing is None:
            raise RuntimeError("the image is not open")
        return self.landing


async def load(options: LoadOptions, reporter: Reporter, interrupts: Interrupts) -> LoadResult:
    """Load a stream. Raises a `BlkmigError` that tells what became of the images."""
    control = Control()
    loading = _Load(options, reporter, control)
    with interrupts.watching():
        try:
            return await loading.whole()
        except (Exception, asyncio.CancelledError) as error:
            failure = _explained(error, interrupts)
            failure.state = failure.state or await loading.give_up()
            raise failure from error
        finally:
            control.close()


def _explained(error: BaseException, interrupts: Interrupts) -> BlkmigError:
    if isinstance(error, BlkmigError):
        return error
    if interrupts.received is not None:
        return Interrupted(interrupts.received)
    raise error


class _Load:
    def __init__(self, options: LoadOptions, reporter: Reporter, control: Control) -> None:
        self._options = options
        self._reporter = reporter
        self._control = control
        self._source: Channel | None = None
        self._forward: Channel | None = None
        self._targets: list[_Target] = []
        self._landed = False
        self._percent = 0

    async def whole(self) -> LoadResult:
        """All of it."""
        options = self._options
        check(options.source)
        self._reporter.stage("prepare")
        plain = await asyncio.to_thread(self._plan)
        source = self._source = await self._in_thread(
            lambda: open_source(options.source, self._control, self._reporter.note)
        )
        sizes = await self._missing_sizes(source, plain)
        await asyncio.to_thread(self._prepare, plain, sizes)
        if options.forward is not None:
            forward = options.forward
            self._forward = await self._in_thread(lambda: open_target(forward))
        landings = {target.name: await self._open(target) for target in self._targets}
        loop = asyncio.get_running_loop()

        def on_progress(percent: int) -> None:
            loop.call_soon_threadsafe(self._tell_percent, percent)

        receiver = Receiver(
            source,
            landings,
            self._control,
            page_size=options.page_size,
            forward=self._forward,
            on_progress=on_progress,
        )
        self._reporter.stage("load")
        await self._in_thread(receiver.receive_disks)
        warnings = self._judge()
        await self._land()
        self._reporter.stage("device state")
        await self._in_thread(receiver.pass_rest)
        await self._finish_channels()
        return self._result(receiver, warnings)

    def _tell_percent(self, percent: int) -> None:
        """What the sender says of its progress, in steps."""
        if percent // PERCENT_STEP > self._percent // PERCENT_STEP:
            self._reporter.note(f"the sender has read {percent} % of its disks")
        self._percent = max(self._percent, percent)

    async def give_up(self) -> str:
        """After a failure: let go of everything, remove what was created. What has become of the images, in words."""
        for channel in (self._source, self._forward):
            if channel is not None:
                channel.abandon()
        if self._landed:
            return (
                "the images are complete and closed; if the source says that it completed, its guest is paused "
                "there (postmigrate) and only the destination QEMU can tell whether it has taken over"
                if self._options.forward
                else "the images are complete and closed"
            )
        told = [await self._give_up(target) for target in self._targets]
        return "; ".join(told) or "nothing was touched"

    async def _give_up(self, target: _Target) -> str:
        if target.closed:
            return f"{target.path} is complete and closed"
        if target.landing is not None:
            target.landing.writer.close()
        if target.server is not None:
            with contextlib.suppress(BlkmigError):
                await target.server.stop()
        created = target.prepared.created is not None
        images.give_up(target.prepared)
        if created:
            _mark(target.path).unlink(missing_ok=True)
            return f"{target.path} was removed again"
        if target.landing is None:
            _mark(target.path).unlink(missing_ok=True)
            return f"{target.path} is untouched"
        return f"{target.path} is incomplete, and marked so by {_mark(target.path)}"

    def _plan(self) -> dict[str, Image]:
        """The images as far as they are known without the stream: a size of 0 is one that it must tell."""
        options = self._options
        for names in (options.sizes, options.expected):
            for name in names:
                if name is not None and name not in options.images:
                    raise UsageError(f"a size is given for device {name!r}, but no image")
        return {name: self._plan_image(name, str(Path(path).absolute())) for name, path in options.images.items()}

    def _plan_image(self, name: str, path: str) -> Image:
        options = self._options
        told = options.sizes.get(name, options.sizes.get(None, 0))
        if options.create:
            if os.path.lexists(path):
                raise Refused(f"{path} is there already", disk=name, advice="without --create it is filled in")
            expected = options.expected.get(name, options.expected.get(None, 0))
            return Image(name, path, options.format or "raw", told or expected, create=True)
        if not Path(path).exists():
            raise Refused(f"{path} is not there", disk=name, advice="--create makes it")
        image_format = options.format or _recognized(name, path)
        size = images.size_of(path, image_format)
        if told and told != size:
            raise Refused(f"{path} has {size} bytes, not {told}", disk=name)
        return Image(name, path, image_format, size, create=False)

    async def _missing_sizes(self, source: Channel, plain: Mapping[str, Image]) -> dict[str, int]:
        """What the stream's highest blocks tell of sizes; where it is a file, and an image needs to know beforehand."""
        unknown = [name for name, image in plain.items() if not image.size]
        if all(plain[name].format == "raw" for name in unknown):
            return {}
        if not source.is_file:
            raise UsageError(
                f"the size of {', '.join(map(repr, unknown))} must be given (--size): an image of format "
                f"{self._options.format} cannot grow with the stream"
            )
        gathered, found = await self._in_thread(
            lambda: survey(source, self._control, page_size=self._options.page_size)
        )
        if found.flaw is not None:
            raise Refused(f"the stream cannot be loaded: {found.flaw}")
        os.lseek(source.descriptor, 0, os.SEEK_SET)
        return {name: device.end for name, device in gathered.maps.devices.items()}

    def _prepare(self, plain: Mapping[str, Image], sizes: Mapping[str, int]) -> None:
        """Create, check and lock the images; mark them as incomplete from now on."""
        wanted = [
            image if image.size else msgspec.structs.replace(image, size=sizes.get(name, CHUNK))
            for name, image in plain.items()
        ]
        for prepared in images.prepare(wanted):
            self._targets.append(_Target(prepared, size_known=bool(plain[prepared.image.disk].size)))
        for target in self._targets:
            try:
                _mark(target.path).write_text(f"qemu-blkmig is loading {target.path} from {self._options.source}\n")
                images.sync_directory(target.path)
            except OSError as error:
                raise Refused(f"{_mark(target.path)} cannot be made: {error.strerror}", disk=target.name) from error

    async def _open(self, target: _Target) -> Landing:
        image, prepared = target.prepared.image, target.prepared
        grow = None
        if image.format == "raw":
            writer: RawWriter | NbdWriter = RawWriter(prepared.descriptor)
            grow = None if target.size_known else grower(prepared.descriptor)
        else:
            target.server = await qemu_nbd.start(image.path, image.format, CONNECTIONS)
            writer = NbdWriter(target.server.connections, prepared.descriptor)
        target.landing = Landing(target.name, image.size, writer, grow, prepared.reads_as_zero)
        return target.landing

    def _judge(self) -> list[str]:
        """What the blocks that came do not prove; raises `MigrationError` where the user asked for proof."""
        warnings = []
        for target in self._targets:
            landing = target.landed
            expected = self._options.expected.get(target.name, self._options.expected.get(None))
            if expected is not None:
                _check_size(landing, expected)
            missing = list(landing.chunks.missing(landing.size))
            if missing:
                what = (
                    f"{show_bytes(sum(each.length for each in missing))} of {show_bytes(landing.size)} never came, "
                    f"the first of it at {missing[0].offset}"
                )
                if self._options.require_complete:
                    raise MigrationError(f"{what} (--require-complete)", disk=target.name)
                if not self._options.incremental:
                    warnings.append(
                        f"disk {target.name}: {what}: the stream is incremental, or its sender ended too early (an old "
                        "QEMU says completed all the same); --incremental says that this is meant, "
                        "--require-complete makes it an error"
                    )
            if not target.size_known:
                warnings.append(
                    f"disk {target.name}: its size was not given; {landing.size} bytes is where its highest block "
                    "ends, and the stream does not tell what may have been beyond it"
                )
        return warnings

    async def _land(self) -> None:
        """The images are flushed and closed, and no longer marked."""
        for target in self._targets:
            await self._in_thread(functools.partial(_flush, target))
            target.landed.writer.close()
            if target.server is not None:
                server, target.server = target.server, None
                await server.stop()
        for target in self._targets:
            os.fsync(target.prepared.descriptor)
            os.close(target.prepared.descriptor)
            target.closed = True
            _mark(target.path).unlink(missing_ok=True)
            images.sync_directory(target.path)
        self._landed = True

    async def _finish_channels(self) -> None:
        for channel in (self._source, self._forward):
            if channel is not None:
                await asyncio.to_thread(channel.finish)

    def _result(self, receiver: Receiver, warnings: list[str]) -> LoadResult:
        proven = ["the block section has come to its end; images are flushed and closed"]
        if isinstance(receiver.end, DeviceState) and self._options.forward is None:
            warnings.append("RAM and device state were in the stream too, and were skipped")
        if self._options.forward is not None:
            proven.append(
                f"all the rest of the stream was passed on to {self._options.forward}; whether the guest was taken "
                "over there, that QEMU tells (query-migrate, query-status)"
            )
        return LoadResult(
            outcome="loaded",
            machine=receiver.machine,
            disks=[_told(target) for target in self._targets],
            forwarded=self._options.forward,
            proven=proven,
            warnings=warnings,
        )

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await run_blocking(work, self._control)


def _flush(target: _Target) -> None:
    try:
        target.landed.writer.flush()
    except (OSError, ConnectionLost) as error:
        what = f"the image cannot be flushed: {error}"
        raise DestinationWriteError(what, disk=target.name, offset=None, errno=0) from error


def _check_size(landing: Landing, expected: int) -> None:
    if landing.grow is None and landing.size != expected:
        raise MigrationError(f"the image has {landing.size} bytes, expected were {expected}", disk=landing.device)
    end = -(-expected // CHUNK) * CHUNK
    if landing.chunks.end != end:
        raise MigrationError(
            f"its highest block ends at {landing.chunks.end}; of a disk of {expected} bytes it ends at {end}",
            disk=landing.device,
        )


def _told(target: _Target) -> LoadedDisk:
    landing, image = target.landed, target.prepared.image
    missing = list(landing.chunks.missing(landing.size))
    return LoadedDisk(
        name=target.name,
        image=image.path,
        format=image.format,
        virtual_size=landing.size,
        size_known=target.size_known,
        created=target.prepared.created is not None,
        blocks=landing.chunks.blocks,
        zero_blocks=landing.chunks.zero_blocks,
        written=landing.written,
        zeroed=landing.zeroed,
        missing=sum(each.length for each in missing),
        first_missing=missing[0].offset if missing else None,
    )


def _mark(path: str) -> Path:
    return Path(path + MARK)


def _recognized(name: str, path: str) -> str:
    """Raw, unless it looks like something else: then the user must say which it is, for a guest could have made it
    look so."""
    looks = images.recognized(path)
    if looks != "raw":
        raise Refused(
            f"{path} looks like {looks}", disk=name, advice=f"say which it is: --format {looks} or --format raw"
        )
    return looks
