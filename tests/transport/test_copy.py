"""Copies through a real agent, from real QEMU exports into raw and qcow2 images."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from pathlib import Path
from typing import cast

import pytest

from qemu_blkmig import errors
from qemu_blkmig.destination import protocol
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.job.compare import Comparison
from qemu_blkmig.nbd.address import Export, UnixAddress
from qemu_blkmig.nbd.digests import SLICE
from qemu_blkmig.transport.client import AgentClient, CopyCancelled
from tests.nbd.servers import Monitor, qemu_export
from tests.transport.conftest import GIB, KIB, MIB, bulk, dirty, image, opened, opening


def patchwork(path: Path, size: int, seed: int = 1) -> None:
    """A sparse file with data, holes and written zeroes at odd places, its last sector data."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(20):
            offset, length = rng.randrange(size), rng.randrange(1, 300 * KIB)
            length = min(length, size - offset)
            file.seek(offset)
            file.write(rng.choice([rng.randbytes(length), bytes(length)]))
        file.seek(size - 512)
        file.write(rng.randbytes(512))


def same(first: Path, second: Path, formats: tuple[str, str] = ("raw", "raw")) -> bool:
    """Whether the two images read alike."""
    command = ["qemu-img", "compare", "-q", "-f", formats[0], "-F", formats[1], str(first), str(second)]
    return subprocess.run(command, check=False).returncode == 0


def guest_does(qmp: Monitor, listening: Path, *commands: str) -> None:
    """Have qemu-io carry out the commands on the exported node, as a guest would."""
    qmp("block-export-add", type="nbd", id="w", name="w", **{"node-name": "node", "writable": True})
    script = [argument for command in commands for argument in ("-c", command)]
    uri = f"nbd+unix:///w?socket={listening}"
    subprocess.run(["qemu-io", "-f", "raw", *script, uri], check=True, stdout=subprocess.DEVNULL)


async def compared(agent: AgentClient, listening: Path, size: int) -> list[Extent]:
    """What differs between both sides of disk `d`, as `--verify full` finds it; nothing of it is mended."""
    comparison = Comparison(agent, {"d": Export(UnixAddress(str(listening)), "disk")}, "xxh3-128")
    try:
        found = await comparison.all_differing("d", size, size)
        await comparison.require_equal("d", found)
    finally:
        comparison.close()
    return found


async def test_when_too_much_differs_to_be_mended_no_more_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Extent] = []

    async def differs(_: Comparison, __: str, extent: Extent, ___: int) -> list[Extent]:
        asked.append(extent)
        return [extent]

    monkeypatch.setattr(Comparison, "_differing", differs)
    found = await Comparison(cast(AgentClient, None), {}, "xxh3-128").all_differing("d", 10 * SLICE, SLICE)
    assert sum(extent.length for extent in found) == max(extent.end for extent in asked) == 2 * SLICE


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("size", [512, 4096, 64 * KIB + 512, 9 * MIB + 1536, 64 * MIB])
@pytest.mark.parametrize("kind", ["bulk", "dirty"])
async def test_every_size_arrives_whole(
    agent: AgentClient, tmp_path: Path, size: int, image_format: str, kind: str
) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    patchwork(source, size)
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(destination, size, format=image_format), opening(listening, connections=2))
        copy = bulk((0, size)) if kind == "bulk" else dirty((0, size))
        reply = await agent.expect(copy, protocol.CopyReply)
        await compared(agent, listening, size)
        await agent.request(protocol.Close("d"))
    assert reply.copied + reply.zeroed + reply.skipped == size
    assert same(source, destination, ("raw", image_format))


async def test_an_existing_image_full_of_old_data_becomes_equal(agent: AgentClient, tmp_path: Path) -> None:
    size = 20 * MIB + 512
    source, destination = tmp_path / "source", tmp_path / "destination"
    patchwork(source, size)
    destination.write_bytes(os.urandom(size))
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(destination, size, create=False), opening(listening))
        await agent.request(bulk((0, size)))
        await agent.request(protocol.Close("d"))
    assert same(source, destination)


async def test_sparse_stays_sparse(agent: AgentClient, tmp_path: Path) -> None:
    size = 64 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    patchwork(source, size)
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(destination, size), opening(listening))
        await agent.request(bulk((0, size)))
        closed = await agent.expect(protocol.Close("d"), protocol.CloseReply)
    assert closed.allocated == destination.stat().st_blocks * 512
    assert closed.allocated <= source.stat().st_blocks * 512


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_what_was_dirtied_to_zero_becomes_zero(agent: AgentClient, tmp_path: Path, image_format: str) -> None:
    size = 16 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(os.urandom(size))
    with qemu_export(tmp_path, source) as (listening, qmp):
        await opened(agent, image(destination, size, format=image_format), opening(listening))
        await agent.request(bulk((0, size)))
        guest_does(qmp, listening, f"discard {2 * MIB} {4 * MIB}", f"write -z {8 * MIB} {128 * KIB}")
        extents = ((2 * MIB, 4 * MIB), (8 * MIB, 128 * KIB))
        reply = await agent.expect(dirty(*extents), protocol.CopyReply)
        await agent.request(protocol.Close("d"))
    assert (reply.copied, reply.zeroed, reply.skipped) == (0, 4 * MIB + 128 * KIB, 0)
    assert same(source, destination, ("raw", image_format))


async def test_a_second_bulk_copy_zeroes_what_the_first_wrote(agent: AgentClient, tmp_path: Path) -> None:
    size = 16 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(os.urandom(size))
    with qemu_export(tmp_path, source) as (listening, qmp):
        await opened(agent, image(destination, size), opening(listening))
        await agent.request(bulk((0, size)))
        guest_does(qmp, listening, f"discard {2 * MIB} {4 * MIB}")
        await agent.request(bulk((0, size)))
        await agent.request(protocol.Close("d"))
    assert same(source, destination)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_ranges_asked_for_ahead_arrive_whole_and_are_flushed_beside_the_copying(
    agent: AgentClient, tmp_path: Path, image_format: str
) -> None:
    size, part = 24 * MIB + 512, 3 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    patchwork(source, size)
    ranges = [(start, min(part, size - start)) for start in range(0, size, part)]
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(destination, size, format=image_format), opening(listening, hash="xxh3-128"))
        copies = [asyncio.create_task(agent.expect(bulk(each), protocol.CopyReply)) for each in ranges]
        flushes = [asyncio.create_task(agent.request(protocol.Flush("d"))) for _ in range(3)]
        replies = await asyncio.gather(*copies)
        await asyncio.gather(*flushes)
        assert [each.copied + each.zeroed + each.skipped for each in replies] == [length for _, length in ranges]
        verified = await agent.expect(protocol.Verify("d", GIB), protocol.VerifyReply)
        await agent.request(protocol.Close("d"))
    assert not verified.differ and not verified.left
    assert same(source, destination, ("raw", image_format))


async def test_a_range_that_does_not_follow_on_the_one_under_way_is_refused_and_one_after_it_is_not(
    agent: AgentClient, tmp_path: Path
) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(os.urandom(16 * MIB))
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(destination, 16 * MIB), opening(listening))
        await agent.request(protocol.Bandwidth(MIB))
        first = asyncio.create_task(agent.request(bulk((0, 4 * MIB))))
        await asyncio.sleep(0)
        for other in (bulk((8 * MIB, MIB)), dirty((4 * MIB, MIB)), bulk((0, MIB))):
            with pytest.raises(errors.Refused, match="under way"):
                await agent.request(other)
        await agent.request(protocol.Bandwidth(None))
        await first
        await agent.request(bulk((8 * MIB, MIB)))
        await agent.request(dirty((0, MIB)))


async def test_a_cancel_ends_the_range_under_way_and_those_asked_for_after_it(
    agent: AgentClient, tmp_path: Path
) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(os.urandom(16 * MIB))
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(destination, 16 * MIB), opening(listening))
        await agent.request(protocol.Bandwidth(64 * KIB))
        copies = [asyncio.create_task(agent.request(bulk((start * MIB, MIB)))) for start in range(4)]
        await asyncio.sleep(0)
        await agent.request(protocol.Cancel("d"))
        ended = await asyncio.gather(*copies, return_exceptions=True)
        assert all(isinstance(each, CopyCancelled) for each in ended)
        await agent.request(protocol.Bandwidth(None))
        await agent.request(bulk((0, 16 * MIB)))
        await agent.request(protocol.Close("d"))
    assert same(source, destination)


async def test_thousands_of_scattered_small_extents_arrive(agent: AgentClient, tmp_path: Path) -> None:
    size = 512 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    extents = [(n * 128 * KIB, 64 * KIB) for n in range(4000)]
    with source.open("wb") as file:
        file.truncate(size)
        for offset, length in extents[::2]:
            file.seek(offset)
            file.write(os.urandom(length))
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(destination, size), opening(listening))
        reply = await agent.expect(dirty(*extents), protocol.CopyReply)
        await agent.request(protocol.Close("d"))
    assert (reply.copied, reply.zeroed) == (2000 * 64 * KIB, 2000 * 64 * KIB)
    assert same(source, destination)


def overlay(directory: Path) -> Path:
    """FACTS.md's example: base data at 0 and 4 MiB, overlay data at 2 MiB, an explicit zero cluster at 4 MiB."""
    base, top = directory / "base.qcow2", directory / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", base, "8M"], check=True)
    writes = ["-c", "write -P 1 0 1M", "-c", "write -P 1 4M 1M"]
    subprocess.run(["qemu-io", "-f", "qcow2", *writes, base], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", "-b", base, "-F", "qcow2", top], check=True)
    writes = ["-c", "write -P 2 2M 1M", "-c", "write -z 4M 1M"]
    subprocess.run(["qemu-io", "-f", "qcow2", *writes, top], check=True, stdout=subprocess.DEVNULL)
    return top


async def test_with_a_shared_base_only_the_private_layer_is_sent(agent: AgentClient, tmp_path: Path) -> None:
    top, destination = overlay(tmp_path), tmp_path / "destination"
    backing = protocol.Backing("base.qcow2", "qcow2")
    new = image(destination, 8 * MIB, format="qcow2", backing=backing)
    with qemu_export(tmp_path, top, driver="qcow2") as (listening, _):
        await opened(agent, new, opening(listening, private_layers=1))
        reply = await agent.expect(bulk((0, 8 * MIB)), protocol.CopyReply)
        await agent.request(protocol.Close("d"))
    assert (reply.copied, reply.zeroed, reply.skipped) == (MIB, MIB, 6 * MIB)
    assert same(top, destination, ("qcow2", "qcow2"))


async def test_two_private_layers_are_both_sent(agent: AgentClient, tmp_path: Path) -> None:
    top, destination = overlay(tmp_path), tmp_path / "destination"
    with qemu_export(tmp_path, top, driver="qcow2") as (listening, _):
        await opened(agent, image(destination, 8 * MIB), opening(listening, private_layers=2))
        reply = await agent.expect(bulk((0, 8 * MIB)), protocol.CopyReply)
        await agent.request(protocol.Close("d"))
    assert (reply.copied, reply.zeroed, reply.skipped) == (2 * MIB, MIB, 5 * MIB)
    assert same(top, destination, ("qcow2", "raw"))


async def test_a_huge_sparse_disk_costs_what_its_data_costs(agent: AgentClient, tmp_path: Path) -> None:
    size = 64 * GIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    with source.open("wb") as file:
        file.truncate(size)
        for n in range(64):
            file.seek(n * GIB + n * 4096)
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(destination, size), opening(listening))
        for offset in range(0, size, 128 * MIB):
            await agent.request(bulk((offset, 128 * MIB)))
        await compared(agent, listening, size)
        peak = Path(f"/proc/{agent.pid}/status").read_text().split("VmHWM:")[1].split()[0]
        await agent.request(protocol.Close("d"))
    assert int(peak) < 80 * KIB
    assert destination.stat().st_blocks <= source.stat().st_blocks


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_comparing_names_the_first_bytes_that_differ(
    agent: AgentClient, tmp_path: Path, image_format: str
) -> None:
    size = 16 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    patchwork(source, size)
    with qemu_export(tmp_path, source) as (listening, qmp):
        await opened(agent, image(destination, size, format=image_format), opening(listening))
        await agent.request(bulk((0, size)))
        at = 5 * MIB + 1024
        guest_does(qmp, listening, f"write -P 231 {at} 1024", f"write -P 232 {9 * MIB} 512")
        with pytest.raises(errors.ContentsDiffer, match=f"first in bytes {at} to {at + 1023}$") as differ:
            await compared(agent, listening, size)
    assert (differ.value.disk, differ.value.offset) == ("d", at)


async def test_extents_out_of_order_or_beyond_the_end_are_refused(agent: AgentClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(MIB))
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(tmp_path / "destination", MIB), opening(listening))
        for extents in ([(4096, 512), (0, 512)], [(0, 1024), (512, 512)], [(MIB - 512, 1024)], [(0, 0)]):
            with pytest.raises(errors.Refused, match="out of order or beyond"):
                await agent.request(dirty(*extents))


async def test_a_source_of_another_size_is_refused(agent: AgentClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(MIB))
    refused = pytest.raises(errors.Refused, match="the source has 1048576 bytes, the destination 2097152")
    with qemu_export(tmp_path, source) as (listening, _), refused:
        await opened(agent, image(tmp_path / "destination", 2 * MIB), opening(listening))
