"""What goes wrong: full destinations, bad sectors, killed servers and agents, cancelled and throttled copies."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest

import qemu_blkmig
from qemu_blkmig import errors
from qemu_blkmig.destination import images, locks, protocol
from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.destination.service import Service, failure
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.ports import CopyKind
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.transport.client import AgentClient, CopyCancelled, error_of
from qemu_blkmig.transport.local import LocalHost
from qemu_blkmig.transport.mover import RemoteMover
from qemu_blkmig.transport.starting import start
from tests.nbd.servers import nbdkit, qemu_export, running
from tests.transport.conftest import KIB, MIB, bulk, dirty, image, opened, opening


@contextlib.contextmanager
def small_file_system(directory: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes; needs root."""
    mounted = directory / "small"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted)], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


IMPATIENT = """
from qemu_blkmig.destination import agent
from qemu_blkmig.nbd import pump
pump._PATIENCE = 0.2
agent.main()
"""
"""An agent that gives up a source sooner than others."""


def children(pid: int) -> list[int]:
    """The process ids of the children of `pid`."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def gone(pid: int) -> None:
    """Return when the process has exited (a zombie has)."""
    while ProcessId.of(pid) is not None:  # noqa: ASYNC110 - no event tells of the end of an agent's child
        await asyncio.sleep(0.02)


async def moving(agent: AgentClient) -> None:
    """Return when a copy under way has told of progress."""
    heard = asyncio.Event()
    agent.on_progress = lambda progress: heard.set() if progress.copied else None
    await heard.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_full_destination_is_told_with_its_errno(agent: AgentClient, tmp_path: Path, image_format: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(16 * MIB))
    with small_file_system(tmp_path, 6 * MIB) as small, qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(small / "destination", 16 * MIB, format=image_format), opening(listening))
        with pytest.raises(errors.DestinationWriteError, match="No space left") as caught:
            await agent.request(bulk((0, 16 * MIB)))
        await agent.abandon()
        assert list(small.iterdir()) == []
    assert (caught.value.errno, caught.value.disk) == (errno.ENOSPC, "d")


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_bad_sector_is_told_with_its_exact_offset(
    agent: AgentClient, tmp_path: Path, image_format: str
) -> None:
    bad = 5 * MIB + 3 * 512
    script = f"if [ $(( $4 + $3 )) -gt {bad} ] && [ $4 -lt {bad + 512} ]; then echo EIO >&2; exit 1; fi; "
    script += 'dd if=/dev/zero bs=$3 count=1 status=none | tr "\\0" x'
    size = f"get_size=echo {16 * MIB}"
    with nbdkit(tmp_path, "eval", size, f"pread={script}") as listening:
        destination = image(tmp_path / "destination", 16 * MIB, format=image_format)
        await opened(agent, destination, opening(listening, export=""))
        with pytest.raises(errors.SourceReadError, match="Input/output error") as caught:
            await agent.request(bulk((0, 16 * MIB)))
        assert (caught.value.offset, caught.value.disk) == (bad, "d")
        reply = await agent.expect(dirty((0, 4 * MIB)), protocol.CopyReply)
        await agent.abandon()
    assert reply.copied == 4 * MIB


async def test_reads_that_fail_now_and_then_are_repeated(agent: AgentClient, tmp_path: Path) -> None:
    source, size = tmp_path / "source", 4 * MIB
    source.write_bytes(os.urandom(size))
    failing = f"if [ $3 -gt {64 * KIB} ]; then echo EIO >&2; exit 1; fi; "
    script = failing + f"dd if={source} bs=512 skip=$(( $4 / 512 )) count=$(( $3 / 512 )) status=none"
    with nbdkit(tmp_path, "eval", f"get_size=echo {size}", f"pread={script}") as listening:
        await opened(agent, image(tmp_path / "destination", size), opening(listening, export=""))
        await agent.request(bulk((0, size)))
        await agent.request(protocol.Close("d"))
    assert (tmp_path / "destination").read_bytes() == source.read_bytes()


async def test_random_read_errors_end_the_copy_and_not_the_agent(agent: AgentClient, tmp_path: Path) -> None:
    options = ["--filter=error", "pattern", f"size={64 * MIB}", "error-pread=EIO", "error-pread-rate=100%"]
    with nbdkit(tmp_path, *options) as listening:
        await opened(agent, image(tmp_path / "destination", 64 * MIB), opening(listening, export=""))
        for extent in ((0, 64 * MIB), (8 * MIB, MIB)):
            with pytest.raises(errors.SourceReadError) as caught:
                await agent.request(bulk(extent))
            assert caught.value.offset == extent[0]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_source_killed_in_mid_copy_is_lost(agent: AgentClient, tmp_path: Path, image_format: str) -> None:
    listening = tmp_path / "source.sock"
    command = ["nbdkit", "-f", "--unix", str(listening), "--filter=delay", "pattern", f"size={64 * MIB}", "rdelay=50ms"]
    with running(command, listening) as source:
        destination = image(tmp_path / "destination", 64 * MIB, format=image_format)
        await opened(agent, destination, opening(listening, export="", request_size=256 * KIB))
        copying = asyncio.ensure_future(agent.request(bulk((0, 64 * MIB))))
        await moving(agent)
        source.kill()
        with pytest.raises(errors.ConnectionLost):
            await copying
        with pytest.raises(errors.ConnectionLost):
            await agent.request(bulk((0, MIB)))


async def test_nobody_at_the_source_is_an_error(agent: AgentClient, tmp_path: Path) -> None:
    with pytest.raises(errors.ConnectionLost, match=r"nobody\.sock"):
        await opened(agent, image(tmp_path / "destination", MIB), opening(tmp_path / "nobody.sock"))


async def test_a_killed_agent_takes_its_server_along_and_leaves_no_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    agent = await LocalHost().start_agent()
    with nbdkit(tmp_path, "--filter=delay", "pattern", f"size={64 * MIB}", "rdelay=50ms") as listening:
        destination = image(tmp_path / "destination", 64 * MIB, format="qcow2")
        await opened(agent, destination, opening(listening, export="", request_size=256 * KIB))
        assert not list(tmp_path.glob("blkmig-*"))
        [server] = children(agent.pid)
        copying = asyncio.ensure_future(agent.request(bulk((0, 64 * MIB))))
        await moving(agent)
        os.kill(agent.pid, signal.SIGKILL)
        with pytest.raises(errors.DestinationFailed, match="SIGKILL"):
            await copying
        await gone(server)
        assert not locks.in_use(tmp_path / "destination")
    await agent.abandon()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("how", ["eof", "SIGTERM", "SIGHUP"])
async def test_an_agent_left_in_mid_copy_removes_what_it_made_and_exits(
    tmp_path: Path, image_format: str, how: str
) -> None:
    agent = await LocalHost().start_agent()
    with nbdkit(tmp_path, "--filter=delay", "pattern", f"size={64 * MIB}", "rdelay=50ms") as listening:
        destination = image(tmp_path / "destination", 64 * MIB, format=image_format)
        await opened(agent, destination, opening(listening, export="", request_size=256 * KIB))
        servers = children(agent.pid)
        copying = asyncio.ensure_future(agent.request(bulk((0, 64 * MIB))))
        await moving(agent)
        if how == "eof":
            await agent.abandon()
        else:
            os.kill(agent.pid, signal.Signals[how])
        with pytest.raises((errors.DestinationFailed, CopyCancelled)):
            await copying
        await agent.abandon()
        for server in servers:
            await gone(server)
    assert not (tmp_path / "destination").exists()


async def test_an_existing_or_a_closed_image_is_never_removed(tmp_path: Path) -> None:
    agent = await LocalHost().start_agent()
    there = tmp_path / "there"
    there.write_bytes(bytes(MIB))
    made = image(tmp_path / "made", MIB)
    await agent.request(protocol.Prepare([image(there, MIB, create=False), image(tmp_path / "made", MIB, disk="e")]))
    await agent.request(protocol.Close("e"))
    await agent.abandon()
    assert there.exists()
    assert Path(made.path).exists()


@pytest.mark.parametrize("rate", [None, 64 * KIB])
async def test_a_cancelled_copy_ends_and_the_next_goes_on(agent: AgentClient, tmp_path: Path, rate: int | None) -> None:
    with nbdkit(tmp_path, "--filter=delay", "pattern", f"size={64 * MIB}", "rdelay=50ms") as listening:
        await opened(
            agent, image(tmp_path / "destination", 64 * MIB), opening(listening, export="", request_size=256 * KIB)
        )
        await agent.request(protocol.Bandwidth(rate))
        copying = asyncio.ensure_future(agent.request(bulk((0, 64 * MIB))))
        await moving(agent)
        await agent.request(protocol.Cancel("d"))
        with pytest.raises(CopyCancelled):
            await copying
        await agent.request(protocol.Bandwidth(None))
        reply = await agent.expect(bulk((0, MIB)), protocol.CopyReply)
    assert reply.copied == MIB


async def test_cancelling_the_mover_waits_until_nothing_is_in_flight(agent: AgentClient, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--filter=delay", "pattern", f"size={64 * MIB}", "rdelay=50ms") as listening:
        await opened(
            agent, image(tmp_path / "destination", 64 * MIB), opening(listening, export="", request_size=256 * KIB)
        )
        mover = RemoteMover(agent)
        copying = asyncio.ensure_future(mover.copy("d", [Extent(0, 64 * MIB)], CopyKind.BULK))
        await moving(agent)
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying
        report = await mover.copy("d", [Extent(0, MIB)], CopyKind.DIRTY)
        await mover.flush("d")
        await agent.request(protocol.Close("d"))
    assert report.copied == MIB


async def test_a_source_that_does_not_answer_cannot_hold_up_a_cancel(tmp_path: Path) -> None:
    agent = await LocalHost(begun=start([sys.executable, "-c", IMPATIENT])).start_agent()
    with nbdkit(tmp_path, "--filter=delay", "pattern", f"size={64 * MIB}", "rdelay=600") as listening:
        await opened(agent, image(tmp_path / "destination", 64 * MIB), opening(listening, export=""))
        copying = asyncio.ensure_future(agent.request(bulk((0, 64 * MIB))))
        await asyncio.sleep(0.1)
        await agent.request(protocol.Cancel())
        with pytest.raises(CopyCancelled):
            await copying
        await agent.abandon()


async def test_a_second_copy_of_a_disk_meanwhile_is_refused(agent: AgentClient, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "pattern", f"size={4 * MIB}") as listening:
        await opened(agent, image(tmp_path / "destination", 4 * MIB), opening(listening, export=""))
        await agent.request(protocol.Bandwidth(64 * KIB))
        copying = asyncio.ensure_future(agent.request(bulk((0, 4 * MIB))))
        await asyncio.sleep(0)
        with pytest.raises(errors.Refused, match="under way"):
            await agent.request(bulk((0, MIB)))
        await agent.request(protocol.Bandwidth(None))
        await copying


async def test_the_local_server_killed_in_mid_copy_is_a_write_error(agent: AgentClient, tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--filter=delay", "pattern", f"size={64 * MIB}", "rdelay=50ms") as listening:
        destination = image(tmp_path / "destination", 64 * MIB, format="qcow2")
        await opened(agent, destination, opening(listening, export="", request_size=256 * KIB))
        copying = asyncio.ensure_future(agent.request(bulk((0, 64 * MIB))))
        await moving(agent)
        [server] = children(agent.pid)
        os.kill(server, signal.SIGKILL)
        with pytest.raises(errors.DestinationWriteError):
            await copying
        with pytest.raises(errors.DestinationWriteError):
            await agent.request(protocol.Flush("d"))


async def test_a_line_that_is_no_request_ends_the_agent(tmp_path: Path) -> None:
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qemu_blkmig.destination.agent"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    answer, _ = await agent.communicate(b'{"id": 7, "op": {"type": "explode"}}\nnonsense\n')
    assert b'"id":7' in answer and b'"refused"' in answer
    assert agent.returncode == 2


async def test_what_would_be_overwritten_is_told(agent: AgentClient, tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(bytes(MIB))
    wanted = [image(tmp_path / "there", MIB), image(tmp_path / "new", MIB, disk="e")]
    reply = await agent.expect(protocol.Inspect(wanted), protocol.InspectReply)
    assert (reply.problems, reply.there) == ([], [str(tmp_path / "there")])


def test_the_advice_of_a_refusal_crosses_to_the_coordinator() -> None:
    refused = errors.Refused("libnbd is missing", advice="install it")
    assert error_of(failure(refused)).advice == "install it"


async def test_an_agent_s_end_is_told_though_no_descriptor_is_to_be_had(
    agent: AgentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pidfd_open", Mock(side_effect=OSError(errno.EMFILE, "Too many open files")))
    agent.kill()
    with pytest.raises(errors.DestinationFailed, match="SIGKILL"):
        async with time_limit(20):
            await agent.request(protocol.Ping())


async def test_an_image_that_cannot_be_removed_does_not_leave_the_others_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_up = images.give_up

    def troubled(prepared: images.Prepared, *, untouched: bool) -> None:
        if prepared.image.disk == "a":
            raise OSError(errno.EROFS, "Read-only file system")
        give_up(prepared, untouched=untouched)

    monkeypatch.setattr(images, "give_up", troubled)
    service = Service(AsyncMock())
    there = await service.perform(protocol.Hello(qemu_blkmig.__version__, protocol.PROTOCOL, "1a2b"))
    assert isinstance(there, protocol.HelloReply)
    wanted = [image(tmp_path / disk, MIB, disk=disk) for disk in ("a", "b")]
    assert isinstance(await service.perform(protocol.Prepare(wanted)), protocol.PrepareReply)
    await service.end(remove=True)
    assert not (tmp_path / "b").exists()
    assert not Path(there.runtime).exists()
