"""`load`: a migration stream of the old wire format into images; or on to a new QEMU, the images beside it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from qemu_blkmig.destination.protocol import Image
from qemu_blkmig.errors import BlkmigError, Refused, UsageError
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.load_images import LoadImage, land, plan, prepare
from qemu_blkmig.job.load_options import LoadOptions
from qemu_blkmig.job.load_result import LoadResult, judge, told
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.stream.blocking import run_blocking
from qemu_blkmig.stream.channel import SOCKETS, Channel, check, open_source, open_target
from qemu_blkmig.stream.events import DeviceState
from qemu_blkmig.stream.receiver import Receiver
from qemu_blkmig.stream.survey import survey

PERCENT_STEP = 10

_T = TypeVar("_T")


async def load(options: LoadOptions, reporter: Reporter, interrupts: Interrupts) -> LoadResult:
    """Load a stream. Raises a `BlkmigError` that tells what became of the images."""
    control = Control()
    loading = _Load(options, reporter, control)
    with interrupts.watching():
        try:
            return await loading.whole()
        except (Exception, asyncio.CancelledError) as error:
            state = await loading.give_up()
            failure = _explained(error, interrupts)
            failure.state = failure.state or state
            raise failure from error
        finally:
            control.close()


def _explained(error: BaseException, interrupts: Interrupts) -> BlkmigError:
    if isinstance(error, BlkmigError):
        return error
    if (interrupt := interrupts.error()) is not None:
        return interrupt
    raise error


def _needing_size(plain: Mapping[str, Image]) -> list[str]:
    """Devices whose images must have their size from the beginning, and do not know it."""
    return [name for name, image in plain.items() if not image.size and image.format != "raw"]


class _Load:
    def __init__(self, options: LoadOptions, reporter: Reporter, control: Control) -> None:
        self._options = options
        self._reporter = reporter
        self._control = control
        self._source: Channel | None = None
        self._forward: Channel | None = None
        self._images: list[LoadImage] = []
        self._landed = False
        self._percent = 0

    async def whole(self) -> LoadResult:
        """All of it."""
        self._reporter.stage("prepare")
        receiver = await self._open()
        self._reporter.stage("load")
        await self._in_thread(receiver.receive_disks)
        warnings = judge(self._images, self._options)
        await land(self._images, self._control)
        self._landed = True
        self._reporter.stage("device state")
        await self._in_thread(receiver.pass_rest)
        for channel in (self._source, self._forward):
            if channel is not None:
                await asyncio.to_thread(channel.finish)
        return self._result(receiver, warnings)

    async def give_up(self) -> str:
        """After a failure: let go of everything, remove what was created. What has become of the images, in words."""
        for channel in (self._source, self._forward):
            if channel is not None:
                channel.abandon()
        return "; ".join([await self._images_now(), *self._without_forwarded_file()])

    def _without_forwarded_file(self) -> list[str]:
        """A file that only a part was passed on to is removed: its name promises a whole stream. In words."""
        forward = self._options.forward
        if self._forward is None or forward is None or check(forward)[0] != "file":
            return []
        path = Path(check(forward)[1])
        path.unlink(missing_ok=True)
        return [f"{path} was removed again"]

    async def _images_now(self) -> str:
        if self._landed:
            return (
                "the images are complete and closed; if the source says that it completed, its guest is paused "
                "there (postmigrate) and only the destination QEMU can tell whether it has taken over"
                if self._options.forward
                else "the images are complete and closed"
            )
        return "; ".join([await image.give_up() for image in self._images]) or "nothing was touched"

    async def _open(self) -> Receiver:
        """The source, the images, and where the rest goes, each opened once the one before it is."""
        options = self._options
        kind, _ = check(options.source)
        if options.forward is not None:
            check(options.forward)
        plain = await asyncio.to_thread(plan, options)
        if kind in (*SOCKETS, "exec"):
            self._require_sizes(plain)
        source = self._source = await self._in_thread(
            lambda: open_source(options.source, self._control, self._reporter.note)
        )
        sizes = await self._missing_sizes(source, plain)
        await self._in_thread(lambda: prepare(plain, sizes, options.source, self._images))
        if options.forward is not None:
            forward = options.forward
            self._forward = await self._in_thread(lambda: open_target(forward))
        landings = {image.device: await image.open() for image in self._images}
        loop = asyncio.get_running_loop()

        def on_progress(percent: int) -> None:
            loop.call_soon_threadsafe(self._tell_percent, percent)

        return Receiver(
            source,
            landings,
            self._control,
            page_size=options.page_size,
            forward=self._forward,
            on_progress=on_progress,
        )

    async def _missing_sizes(self, source: Channel, plain: Mapping[str, Image]) -> dict[str, int]:
        """What the stream's highest blocks tell of sizes; where it is a file, and an image needs to know beforehand."""
        if not _needing_size(plain):
            return {}
        if not source.is_file:
            self._require_sizes(plain)
        gathered, found = await self._in_thread(
            lambda: survey(source, self._control, page_size=self._options.page_size)
        )
        if found.flaw is not None:
            raise Refused(f"the stream cannot be loaded: {found.flaw}")
        os.lseek(source.descriptor, 0, os.SEEK_SET)
        return {name: device.end for name, device in gathered.maps.devices.items()}

    def _require_sizes(self, plain: Mapping[str, Image]) -> None:
        """Nobody need connect, nor a command begin, to be told this. Raises `UsageError`."""
        if unknown := _needing_size(plain):
            raise UsageError(
                f"the size of {', '.join(map(repr, unknown))} must be given (--size): an image of format "
                f"{self._options.format} cannot grow with the stream"
            )

    def _tell_percent(self, percent: int) -> None:
        """What the sender says of its progress, in steps."""
        if percent // PERCENT_STEP > self._percent // PERCENT_STEP:
            self._reporter.note(f"the sender has read {percent} % of its disks")
        self._percent = max(self._percent, percent)

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
            disks=[told(image) for image in self._images],
            forwarded=self._options.forward,
            proven=proven,
            warnings=warnings,
        )

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await run_blocking(work, self._control)
