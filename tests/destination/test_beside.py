"""What may go on beside reading back, and what may not: by an agent's operations, and storage that is slow to read."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qemu_blkmig.destination import protocol
from qemu_blkmig.destination.service import Service
from qemu_blkmig.destination.writers import RawWriter
from tests.nbd.servers import qemu_export
from tests.transport.conftest import MIB, bulk, dirty, image, opening

SIZE, STABLE = 16 * MIB, 8 * MIB


DIGESTS = protocol.Digests("d", 0, MIB, MIB, "sha256")


async def tell(_: object) -> None:
    """Nobody listens."""


class Slow:
    """Readings wait until `go_on`; `begun` once one does."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        read = RawWriter.read

        def slowly(writer: RawWriter, into: memoryview, offset: int) -> None:
            self.begun.set()
            self.go_on.wait(60)
            read(writer, into, offset)

        patch.setattr(RawWriter, "read", slowly)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """An agent whose disk `d` is brought over, and stable, up to `STABLE`."""
    (tmp_path / "source").write_bytes(os.urandom(SIZE))
    made = Service(tell)
    with qemu_export(tmp_path, tmp_path / "source") as (listening, _):
        for op in (
            protocol.Prepare([image(tmp_path / "destination", SIZE)]),
            opening(listening, hash="xxh3-128"),
            bulk((0, STABLE)),
            protocol.Flush("d"),
        ):
            assert not isinstance(await made.perform(op), protocol.Failure)
        yield made
        await made.perform(protocol.Close("d"))
        await made.end(remove=True)


async def reading(service: Service, slow: Slow) -> asyncio.Task[protocol.Outcome]:
    """What is stable is being read back."""
    verify = asyncio.create_task(service.perform(protocol.Verify("d", SIZE, below=STABLE)))
    assert await asyncio.to_thread(slow.begun.wait, 10)
    return verify


@pytest.mark.parametrize("op", [bulk((STABLE, SIZE - STABLE)), protocol.Flush("d")], ids=["copy", "flush"])
async def test_the_first_pass_goes_on_beside_it(
    service: Service, op: protocol.Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    verify = await reading(service, slow)
    async with asyncio.timeout(30):
        assert not isinstance(await service.perform(op), protocol.Failure)
    assert not verify.done()
    slow.go_on.set()
    reply = await verify
    assert isinstance(reply, protocol.VerifyReply) and reply.checked and not reply.differ


@pytest.mark.parametrize(
    ("op", "urgent"),
    [
        (dirty((SIZE - MIB, MIB)), True),
        (bulk((0, SIZE)), True),
        (protocol.Verify("d", SIZE), False),
        (protocol.Arrived("d", 0, SIZE), False),
        (protocol.Recognize("d", STABLE), False),
        (DIGESTS, True),
        (protocol.Close("d"), False),
    ],
    ids=["round", "anew", "verify", "arrived", "recognize", "digests", "close"],
)
async def test_all_else_waits_for_it_and_copies_for_no_more_than_a_part(
    service: Service, op: protocol.Operation, urgent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    verify = await reading(service, slow)
    other = asyncio.create_task(service.perform(op))
    assert not (await asyncio.wait([other], timeout=0.5))[0]
    slow.go_on.set()
    replies = await asyncio.gather(verify, other)
    assert not [each for each in replies if isinstance(each, protocol.Failure)]
    assert isinstance(replies[0], protocol.VerifyReply) and (replies[0].checked < STABLE) is urgent


def lost(_writer: RawWriter) -> None:
    """A flush that fails."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


async def test_what_is_read_back_is_flushed_before_and_a_flush_that_fails_then_is_told_by_the_next_one(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of what it could not write once only."""
    assert not isinstance(await service.perform(bulk((STABLE, MIB))), protocol.Failure)
    with monkeypatch.context() as patch:
        patch.setattr(RawWriter, "flush", lost)
        told = await service.perform(protocol.Verify("d", SIZE))
    assert isinstance(told, protocol.Failure) and "cannot be flushed" in told.what
    assert await service.perform(protocol.Flush("d")) == told
    assert not isinstance(await service.perform(protocol.Flush("d")), protocol.Failure)


async def test_nothing_is_told_to_have_arrived_that_may_not_be_stable(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who wrote it may have been killed before it was flushed."""
    with monkeypatch.context() as patch:
        patch.setattr(RawWriter, "flush", lost)
        told = await service.perform(protocol.Arrived("d", 0, SIZE))
    assert isinstance(told, protocol.Failure) and "cannot be flushed" in told.what
    assert isinstance(await service.perform(protocol.Flush("d")), protocol.Failure)
    assert isinstance(await service.perform(protocol.Arrived("d", 0, SIZE)), protocol.ArrivedReply)


async def test_where_the_table_of_hashes_finds_no_room_that_is_told_and_where_it_is(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where storage copies on write, what is overwritten needs room too."""

    def full(_descriptor: int, _data: object, _offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        told = await service.perform(protocol.Verify("d", SIZE))
    what = f"the hashes of what is written cannot be stored in {tmp_path}: No space left on device"
    assert told == protocol.Failure("destination-write", what, "d", None, errno.ENOSPC)


async def test_an_agent_that_ends_waits_for_what_is_read_and_for_no_more(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    verify = await reading(service, slow)
    end = asyncio.create_task(service.end(remove=True))
    assert not (await asyncio.wait([end], timeout=0.5))[0]
    slow.go_on.set()
    await end
    reply = await verify
    assert isinstance(reply, protocol.VerifyReply) and 0 < reply.checked < STABLE
