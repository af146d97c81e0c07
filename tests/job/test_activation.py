"""A destination whose guest stays paused takes its disks, or that it did not is told; two real QEMUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qemu_blkmig.destination import locks
from qemu_blkmig.errors import DestinationFailed
from qemu_blkmig.job.activation import activate
from qemu_blkmig.qmp.features import probe
from qemu_blkmig.qmp.guest import run_state
from qemu_blkmig.qmp.ram import RamMigration
from tests.qmp.conftest import MakeImage, Qemu, StartQemu


async def arrived(start: StartQemu, images: list[Path], before_the_end: Callable[[], object] = bool) -> Qemu:
    """A destination QEMU to which a paused guest was migrated."""

    def disk(image: Path) -> list[str]:
        return ["-drive", f"file={image},format=qcow2,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0"]

    source = await start(*disk(images[0]), paused=True)
    destination = await start(*disk(images[1]), "-S", "-incoming", "defer")
    ram = RamMigration(source.monitor, destination.monitor)
    await ram.start(downtime=0.3, bandwidth=None)
    await ram.wait_paused()
    before_the_end()
    await ram.proceed()
    await ram.wait_completed()
    return destination


async def idle(images: Sequence[str]) -> Sequence[str]:
    return [image for image in images if not locks.in_use(image)]


async def test_a_paused_destination_holds_its_images(start_qemu: StartQemu, make_image: MakeImage) -> None:
    images = [make_image("source"), make_image("destination")]
    destination = await arrived(start_qemu, images)
    await activate(destination.monitor, idle, [str(images[1])])
    assert locks.in_use(images[1])
    assert await run_state(destination.monitor) != "running"


async def test_a_destination_that_cannot_take_its_disks_is_told_of(
    start_qemu: StartQemu, make_image: MakeImage
) -> None:
    images = [make_image("source"), make_image("destination")]
    with images[1].open("rb") as foreign:
        destination = await arrived(start_qemu, images, lambda: locks.lock_as_writer(foreign.fileno()))
        if not (await probe(destination.monitor)).set_active:
            # It has tried and failed at the migration's end, and does not try again.
            foreign.close()
        with pytest.raises(DestinationFailed, match="activate its disks"):
            await activate(destination.monitor, idle, [str(images[1])])
