"""What a load has brought, and what the blocks that came prove: an old QEMU may say that it sent all, and have not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from qemu_blkmig.errors import MigrationError
from qemu_blkmig.job.load_images import LoadImage
from qemu_blkmig.job.load_options import LoadOptions
from qemu_blkmig.stream.events import CHUNK
from qemu_blkmig.stream.receiver import Landing
from qemu_blkmig.units import show_bytes


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


def judge(loaded: Sequence[LoadImage], options: LoadOptions) -> list[str]:
    """What the blocks that came do not prove; raises `MigrationError` where the user asked for proof."""
    return [warning for image in loaded for warning in _judge(image, options)]


def told(image: LoadImage) -> LoadedDisk:
    """The figures of one image."""
    landing, prepared = image.landing, image.prepared
    missing = list(landing.chunks.missing(landing.size))
    return LoadedDisk(
        name=image.device,
        image=image.path,
        format=prepared.image.format,
        virtual_size=landing.size,
        size_known=image.size_known,
        created=prepared.created is not None,
        blocks=landing.chunks.blocks,
        zero_blocks=landing.chunks.zero_blocks,
        written=landing.written,
        zeroed=landing.zeroed,
        missing=sum(each.length for each in missing),
        first_missing=missing[0].offset if missing else None,
    )


def _judge(image: LoadImage, options: LoadOptions) -> Iterator[str]:
    landing = image.landing
    expected = options.expected_size_of(image.device)
    if expected is not None:
        _check_size(landing, expected)
    if not landing.chunks.blocks and not image.size_known:
        raise MigrationError(
            "no block of it came: the stream has no such device, and nothing tells how large it is",
            disk=image.device, advice="--list shows the names in a stream; --size NAME=SIZE makes an image of zeroes",
        )  # fmt: skip
    if not image.device:
        what = (
            "the device has no name, as with a source whose disks are -blockdev: all disks of such a source come "
            "under it, mixed; if there is more than one, the image is worthless"
        )
        if options.require_complete:
            raise MigrationError(f"{what} (--require-complete)", disk=image.device)
        yield what
    missing = list(landing.chunks.missing(landing.size))
    if missing:
        what = (
            f"{show_bytes(sum(each.length for each in missing))} of {show_bytes(landing.size)} never came, "
            f"the first of it at {missing[0].offset}"
        )
        if options.require_complete:
            raise MigrationError(f"{what} (--require-complete)", disk=image.device)
        if not options.incremental:
            yield (
                f"disk {image.device}: {what}: the stream is incremental, or its sender ended too early (an old QEMU "
                "says completed all the same); --incremental says that this is meant, --require-complete makes it an "
                "error"
            )
    if not image.size_known:
        yield (
            f"disk {image.device}: its size was not given; {landing.size} bytes is where its highest block ends, and "
            "the stream does not tell what may have been beyond it"
        )


def _check_size(landing: Landing, expected: int) -> None:
    if landing.grow is None and landing.size != expected:
        raise MigrationError(f"the image has {landing.size} bytes, expected were {expected}", disk=landing.device)
    end = -(-expected // CHUNK) * CHUNK
    if landing.chunks.end != end:
        raise MigrationError(
            f"its highest block ends at {landing.chunks.end}; of a disk of {expected} bytes it ends at {end}",
            disk=landing.device,
        )
