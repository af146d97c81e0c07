"""One disk into a stream: chunks from a real NBD server, in order, whole, while the reader is slow or goes away."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import ConnectionLost, MigrationError
from qemu_blkmig.nbd.connection import connect
from qemu_blkmig.nbd.control import Cancelled, Control
from qemu_blkmig.nbd.plan import ALLOCATION
from qemu_blkmig.nbd.pump import Limits
from qemu_blkmig.nbd.throttle import Throttle
from qemu_blkmig.stream.channel import Channel, open_target
from qemu_blkmig.stream.disk_sender import DiskSender, zero_or_data
from qemu_blkmig.stream.events import CHUNK, Block
from qemu_blkmig.stream.sender import StreamSender
from tests.nbd.servers import nbdkit
from tests.stream.streams import decode, disks

SIZE = 24 * CHUNK + 1536


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data in every chunk, but for a hole from chunk 4 to 10, one within chunk 12, and zeroes in chunk 20."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.write(os.urandom(4 * CHUNK))
        file.seek(10 * CHUNK)
        file.write(os.urandom(2 * CHUNK + 4096))
        file.seek(13 * CHUNK - 4096)
        file.write(os.urandom(7 * CHUNK + 4096) + bytes(CHUNK) + os.urandom(3 * CHUNK + 1536))
    return path


@pytest.fixture
def control() -> Iterator[Control]:
    made = Control()
    yield made
    made.close()


def sending(
    socket: Path, channel: Channel, *, zero_blocks: bool = True, refuse_tail: bool = False
) -> tuple[StreamSender, DiskSender]:
    stream = StreamSender(channel, machine="pc", footers=True, zero_blocks=zero_blocks, total=SIZE)
    connections = [connect(socket, "", contexts=[ALLOCATION]) for _ in range(2)]
    sender = DiskSender(
        "disk", "d", connections, stream, Throttle(),
        limits=Limits(2, CHUNK), classify=zero_or_data, refuse_tail=refuse_tail,
    )  # fmt: skip
    return stream, sender


@pytest.mark.parametrize("zero_blocks", [True, False])
@pytest.mark.parametrize("to", ["file", "slow pipe"])
def test_the_stream_holds_the_disk_and_the_figures_account_for_it(
    tmp_path: Path, image: Path, control: Control, zero_blocks: bool, to: str
) -> None:
    place = f"file:{tmp_path}/s" if to == "file" else f"exec:sleep 0.2; dd bs=64k >{tmp_path}/s 2>/dev/null"
    channel = open_target(place)
    with nbdkit(tmp_path, "file", str(image)) as socket:
        stream, sender = sending(socket, channel, zero_blocks=zero_blocks)
        stream.begin(control)
        sender.copy([Extent(0, 16 * CHUNK), Extent(16 * CHUNK, SIZE - 16 * CHUNK)], control, bulk=True)
        sender.disconnect()
    stream.end_part(control)
    stream.finish(control)
    channel.finish()
    events = decode((tmp_path / "s").read_bytes())
    held = disks(events)["d"]
    assert b"".join(held[at] for at in sorted(held))[:SIZE] == image.read_bytes()
    assert sum(event.zero for event in events if isinstance(event, Block)) == (7 if zero_blocks else 0)
    tally = control.tally
    assert (tally.copied, tally.zeroed, tally.skipped) == (SIZE - 7 * CHUNK, 7 * CHUNK, 0)
    assert sender.sent == (18 if zero_blocks else 25) * CHUNK


@pytest.mark.parametrize("extent", [Extent(64 << 10, CHUNK), Extent(0, 64 << 10), Extent(CHUNK, CHUNK - 512)])
def test_what_is_not_made_of_whole_chunks_is_not_sent(
    tmp_path: Path, image: Path, control: Control, extent: Extent
) -> None:
    """A record has a whole chunk's payload: what a part of one is padded with would go over the rest of it."""
    channel = open_target(f"file:{tmp_path}/s")
    with nbdkit(tmp_path, "file", str(image)) as socket:
        _, sender = sending(socket, channel)
        with pytest.raises(ValueError, match="not made of whole chunks"):
            sender.copy([extent], control, bulk=False)
        sender.disconnect()
    channel.abandon()
    assert not (tmp_path / "s").stat().st_size


def test_a_tail_that_a_qemu_cannot_load_ends_the_copy(tmp_path: Path, image: Path, control: Control) -> None:
    channel = open_target(f"file:{tmp_path}/s")
    with nbdkit(tmp_path, "file", str(image)) as socket:
        _, sender = sending(socket, channel, refuse_tail=True)
        with pytest.raises(MigrationError, match="its last 1536 bytes are not zero"):
            sender.copy([Extent(16 * CHUNK, SIZE - 16 * CHUNK)], control, bulk=True)
        sender.disconnect()
    channel.abandon()


def test_a_reader_that_goes_away_ends_the_copy(tmp_path: Path, image: Path, control: Control) -> None:
    channel = open_target("exec:head -c 3000000 >/dev/null")
    with nbdkit(tmp_path, "file", str(image)) as socket:
        _, sender = sending(socket, channel)
        with pytest.raises(ConnectionLost, match="cannot be written"):
            sender.copy([Extent(0, SIZE)], control, bulk=True)
        sender.disconnect()
    channel.abandon()


def test_a_reader_that_does_not_read_can_be_got_away_from(tmp_path: Path, image: Path, control: Control) -> None:
    channel = open_target("exec:sleep 600")
    threads = threading.active_count()
    with nbdkit(tmp_path, "file", str(image)) as socket:
        _, sender = sending(socket, channel)
        canceller = threading.Timer(0.3, control.cancel)
        canceller.start()
        with pytest.raises(Cancelled):
            sender.copy([Extent(0, SIZE)], control, bulk=True)
        canceller.join()
        sender.disconnect()
    channel.abandon()
    assert threading.active_count() == threads
