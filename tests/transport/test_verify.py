"""What was written is read back by a real agent: what lies there otherwise is found, what was not written is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec import structs

from qemu_blkmig import errors
from qemu_blkmig.destination import protocol
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.local import LocalHost
from tests.nbd.servers import qemu_export
from tests.transport.conftest import KIB, MIB, bulk, dirty, image, opened, opening
from tests.transport.test_copy import guest_does, overlay, patchwork, same

UNIT = 64 * KIB
TIB = 1 << 40


async def read_back(agent: AgentClient, limit: int = 256 * MIB) -> tuple[int, list[tuple[int, int]]]:
    """Verify all there is: (bytes checked, extents that differ)."""
    checked, differ = 0, []
    while True:
        reply = await agent.expect(protocol.Verify("d", limit), protocol.VerifyReply)
        checked += reply.checked
        differ += reply.differ
        if not reply.checked:
            return checked, differ


def flip(path: Path, at: int, image_format: str = "raw") -> None:
    """Turn the bits of the byte `at` of the disk in an image that is in use."""
    if image_format == "raw":
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 255]))
        return
    told = subprocess.run(
        ["qemu-img", "map", "-U", "--output=json", "-f", image_format, path], capture_output=True, check=True, text=True
    )
    for extent in json.loads(told.stdout):
        if extent["start"] <= at < extent["start"] + extent["length"]:
            flip(path, extent["offset"] + at - extent["start"])


def write_over(path: Path, image_format: str, what: str) -> None:
    """Have qemu-io write to an image."""
    subprocess.run(["qemu-io", "-f", image_format, "-c", what, str(path)], check=True, stdout=subprocess.DEVNULL)


def qcow2(path: Path, *commands: str, size: int, options: Sequence[object] = ()) -> None:
    """A qcow2 image that qemu-io has carried out the commands on."""
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", *map(str, options), path, str(size)], check=True)
    script = [argument for command in commands for argument in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *script, path], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("size", [512, 64 * KIB + 512, 9 * MIB + 1536])
@pytest.mark.parametrize("unit", [4 * KIB, 64 * KIB])
async def test_every_size_is_verified_whole(
    agent: AgentClient, tmp_path: Path, size: int, image_format: str, unit: int
) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    patchwork(source, size)
    with qemu_export(tmp_path, source) as (listening, qmp):
        new = image(destination, size, format=image_format)
        await opened(agent, new, opening(listening, connections=2, hash="xxh3-128", hash_unit=unit))
        reply = await agent.expect(bulk((0, size)), protocol.CopyReply)
        checked, differ = await read_back(agent)
        assert not differ and reply.copied <= checked <= size
        last = (size - 1) // unit * unit
        guest_does(qmp, listening, f"write -z {last} {size - last}")
        await agent.request(dirty((last, size - last)))
        assert await read_back(agent) == (size - last, [])
        await agent.request(protocol.Close("d"))
    assert same(source, destination, ("raw", image_format))
    assert sorted(path.name for path in tmp_path.iterdir() if "hashes" in path.name) == []


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_what_somebody_else_changes_after_it_was_written_is_found_and_told_by_place(
    agent: AgentClient, tmp_path: Path, image_format: str
) -> None:
    size = 16 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(os.urandom(size))
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(destination, size, format=image_format), opening(listening, hash="xxh3-128"))
        await agent.request(bulk((0, size)))
        await agent.request(protocol.Flush("d"))
        flip(destination, 5 * MIB + 1, image_format)
        flip(destination, 9 * MIB, image_format)
        assert await read_back(agent, MIB) == (size, [(5 * MIB, UNIT), (9 * MIB, UNIT)])
        reply = await agent.expect(protocol.Verify("d", MIB), protocol.VerifyReply)
        assert (reply.checked, reply.left, reply.differ) == (0, 2 * UNIT, [])
        await agent.request(dirty((5 * MIB, UNIT), (9 * MIB, UNIT)))
        assert await read_back(agent) == (2 * UNIT, [])
        await agent.request(protocol.Close("d"))
    assert same(source, destination, ("raw", image_format))


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_what_is_stable_is_read_back_beside_the_first_pass(
    agent: AgentClient, tmp_path: Path, image_format: str
) -> None:
    size, stable = 16 * MIB + 512, 8 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(os.urandom(size))
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(destination, size, format=image_format), opening(listening, hash="xxh3-128"))
        await agent.request(bulk((0, stable)))
        await agent.request(protocol.Flush("d"))
        flip(destination, 5 * MIB + 1, image_format)
        await agent.request(protocol.Bandwidth(MIB))
        copy = asyncio.create_task(agent.request(bulk((stable, size - stable))))
        reply = await agent.expect(protocol.Verify("d", 256 * MIB, below=stable), protocol.VerifyReply)
        assert (reply.checked, reply.differ) == (stable, [(5 * MIB, UNIT)])
        again = await agent.expect(protocol.Verify("d", 256 * MIB, below=stable), protocol.VerifyReply)
        assert (again.checked, again.differ) == (0, [])
        assert not copy.done()
        await agent.request(protocol.Bandwidth(None))
        await copy
        assert await read_back(agent) == (size - stable, [])
        await agent.request(dirty((5 * MIB, UNIT)))
        assert await read_back(agent) == (UNIT, [])
        await agent.request(protocol.Close("d"))
    assert same(source, destination, ("raw", image_format))


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_nothing_is_written_where_something_is_being_read_back(
    agent: AgentClient, tmp_path: Path, image_format: str
) -> None:
    size = 32 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(os.urandom(size))
    with qemu_export(tmp_path, source) as (listening, qmp):
        await opened(agent, image(destination, size, format=image_format), opening(listening, hash="xxh3-128"))
        await agent.request(bulk((0, size)))
        await agent.request(protocol.Flush("d"))
        guest_does(qmp, listening, f"write -P 7 0 {size}")
        for at in range(0, size, 2 * MIB):
            verify = agent.expect(protocol.Verify("d", 4 * MIB, below=size), protocol.VerifyReply)
            reply, _ = await asyncio.gather(verify, agent.request(dirty((at, 2 * MIB))))
            assert not reply.differ
        assert (await read_back(agent))[1] == []
        reply = await agent.expect(protocol.Verify("d", MIB), protocol.VerifyReply)
        assert (reply.checked, reply.left) == (0, 0)
        await agent.request(protocol.Close("d"))
    assert same(source, destination, ("raw", image_format))


async def test_what_was_changed_after_it_had_been_read_back_is_not_seen(agent: AgentClient, tmp_path: Path) -> None:
    """The limit of "verified as written": each unit is read back once for each time that it is written."""
    size = 4 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(os.urandom(size))
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(destination, size), opening(listening, hash="xxh3-128"))
        await agent.request(bulk((0, size)))
        assert await read_back(agent) == (size, [])
        flip(destination, MIB)
        assert await read_back(agent) == (0, [])


async def test_zeroes_over_old_data_are_verified_and_zeroes_on_a_fresh_image_need_not_be(
    agent: AgentClient, tmp_path: Path
) -> None:
    size = 16 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    with source.open("wb") as file:
        file.truncate(size)
        file.write(os.urandom(MIB))
    destination.write_bytes(os.urandom(size))
    with qemu_export(tmp_path, source) as (listening, qmp):
        await opened(agent, image(destination, size, create=False), opening(listening, hash="xxh3-128"))
        await agent.request(bulk((0, size)))
        flip(destination, 8 * MIB + 7)
        assert await read_back(agent) == (size, [(8 * MIB, UNIT)])
        guest_does(qmp, listening, f"write -z 0 {MIB}")
        await agent.request(dirty((0, MIB), (8 * MIB, UNIT)))
        assert await read_back(agent) == (MIB + UNIT, [])
        await agent.request(protocol.Close("d"))
        assert same(source, destination)
        fresh = tmp_path / "fresh"
        await opened(agent, image(fresh, size), opening(listening, hash="xxh3-128"))
        await agent.request(bulk((0, size)))
        checked, differ = await read_back(agent)
        assert checked <= MIB and not differ and fresh.stat().st_blocks * 512 <= MIB
        await agent.request(protocol.Close("d"))


async def test_sparse_stays_sparse_where_units_are_read_whole(agent: AgentClient, tmp_path: Path) -> None:
    size = 16 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    with source.open("wb") as file:
        file.truncate(size)
        for n in range(40):
            file.seek(n * 300 * KIB // 4096 * 4096)
            file.write(os.urandom(4096))
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(destination, size), opening(listening, hash="xxh3-128"))
        await agent.request(bulk((0, size)))
        assert (await read_back(agent))[1] == []
        closed = await agent.expect(protocol.Close("d"), protocol.CloseReply)
    assert same(source, destination)
    assert closed.allocated <= source.stat().st_blocks * 512 + 16 * KIB


async def test_what_is_left_to_a_shared_base_is_no_part_of_it(agent: AgentClient, tmp_path: Path) -> None:
    top, destination = overlay(tmp_path), tmp_path / "destination"
    new = image(destination, 8 * MIB, format="qcow2", backing=protocol.Backing("base.qcow2", "qcow2"))
    with qemu_export(tmp_path, top, driver="qcow2") as (listening, _):
        await opened(agent, new, opening(listening, private_layers=1, hash="xxh3-128"))
        reply = await agent.expect(bulk((0, 8 * MIB)), protocol.CopyReply)
        assert (reply.copied, reply.zeroed, reply.skipped) == (MIB, MIB, 6 * MIB)
        assert await read_back(agent) == (2 * MIB, [])
        await agent.request(protocol.Close("d"))
    assert same(top, destination, ("qcow2", "qcow2"))


async def test_units_that_an_overlay_allocates_in_part_are_written_whole(agent: AgentClient, tmp_path: Path) -> None:
    base, top, destination = tmp_path / "base.qcow2", tmp_path / "top.qcow2", tmp_path / "destination"
    qcow2(base, "write -P 1 0 8M", size=8 * MIB)
    small = ("-o", "cluster_size=4k", "-b", base, "-F", "qcow2")
    qcow2(top, "write -P 2 4k 4k", "write -z 1M 4k", "write -P 3 2M 128k", size=8 * MIB, options=small)
    backing = protocol.Backing("base.qcow2", "qcow2")
    for unit, copied, zeroed in ((4 * KIB, 132 * KIB, 4 * KIB), (UNIT, 128 * KIB + 2 * UNIT - 4 * KIB, 4 * KIB)):
        new = image(destination, 8 * MIB, format="qcow2", cluster_size=4 * KIB, backing=backing)
        with qemu_export(tmp_path, top, driver="qcow2") as (listening, _):
            await opened(agent, new, opening(listening, private_layers=1, hash="xxh3-128", hash_unit=unit))
            reply = await agent.expect(bulk((0, 8 * MIB)), protocol.CopyReply)
            assert (reply.copied, reply.zeroed) == (copied, zeroed)
            assert (await read_back(agent))[1] == []
            await agent.request(protocol.Close("d"))
        assert same(top, destination, ("qcow2", "qcow2"))
        destination.unlink()


async def test_a_huge_sparse_disk_is_verified_in_flat_memory(agent: AgentClient, tmp_path: Path) -> None:
    size = 16 * TIB
    source, destination = tmp_path / "source.qcow2", tmp_path / "destination.qcow2"
    writes = [f"write -P {n + 1} {n * TIB + n * 6 * MIB} 2M" for n in range(16)]
    qcow2(source, *writes, size=size, options=("-o", "cluster_size=2M"))
    new = image(destination, size, format="qcow2", cluster_size=2 * MIB)
    with qemu_export(tmp_path, source, driver="qcow2") as (listening, _):
        await opened(agent, new, opening(listening, hash="xxh3-128"))
        for n in range(16):
            await agent.request(bulk((n * TIB, 128 * MIB)))
        assert await read_back(agent) == (32 * MIB, [])
        peak = Path(f"/proc/{agent.pid}/status").read_text().split("VmHWM:")[1].split()[0]
        await agent.request(protocol.Close("d"))
    assert int(peak) < 100 * KIB


async def test_digests_are_of_what_was_read_so_a_writer_that_writes_something_else_is_found(
    agent: AgentClient, tmp_path: Path
) -> None:
    """The destination is a device that changes what it is given: only digests from the way in tell."""
    size = 2 * MIB
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size))
    with qemu_export(tmp_path, source) as (listening, _):
        destination = tmp_path / "destination"
        await opened(agent, image(destination, size), opening(listening, hash="sha256"))
        await agent.request(bulk((0, size)))
        destination.write_bytes(bytes(size))
        assert await read_back(agent) == (size, [(0, size)])


async def test_extents_that_are_not_whole_units_and_tables_that_make_no_sense_are_refused(
    agent: AgentClient, tmp_path: Path
) -> None:
    size = MIB + 512
    source = tmp_path / "source"
    source.write_bytes(bytes(size))
    with qemu_export(tmp_path, source) as (listening, _):
        await agent.request(protocol.Prepare([image(tmp_path / "destination", size)]))
        for wrong in (512, 96 * KIB, 2 * MIB):
            with pytest.raises(errors.Refused, match="out of bounds"):
                await agent.request(opening(listening, hash="xxh3-128", hash_unit=wrong))
        await agent.request(opening(listening, hash="xxh3-128"))
        for extent in ((512, UNIT), (0, 512), (MIB - UNIT, UNIT + 256)):
            with pytest.raises(errors.Refused, match="whole units"):
                await agent.request(dirty(extent))
        await agent.request(dirty((MIB - UNIT, UNIT + 512)))
        for limit in (0, 2 << 30):
            with pytest.raises(errors.Refused, match="cannot be read back at once"):
                await agent.request(protocol.Verify("d", limit))


async def begun(new: protocol.Image, listening: Path) -> tuple[AgentClient, protocol.Image]:
    """An agent that fills the image, and keeps it; the image as the next agent is to take it up."""
    first = await LocalHost().start_agent()
    prepared = await first.expect(protocol.Prepare([new], "cafe"), protocol.PrepareReply)
    await first.request(opening(listening, hash="xxh3-128"))
    await first.request(protocol.Keep())
    return first, structs.replace(new, identity=prepared.identities[0])


async def taken_up(kept: protocol.Image, listening: Path) -> AgentClient:
    """The next agent, that goes on with it."""
    again = await LocalHost().start_agent()
    await again.request(protocol.Prepare([kept], "cafe"))
    await again.request(opening(listening, hash="xxh3-128"))
    return again


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_what_a_killed_agent_had_written_is_told_to_the_next_one_as_far_as_it_lies_there(
    tmp_path: Path, image_format: str
) -> None:
    size = 16 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(os.urandom(7 * MIB) + bytes(2 * MIB) + os.urandom(7 * MIB))
    new = image(destination, size, format=image_format)
    with qemu_export(tmp_path, source) as (listening, _):
        first, kept = await begun(new, listening)
        await first.request(bulk((0, 12 * MIB)))
        await first.request(protocol.Flush("d"))
        first.kill("by the test")
        await first.abandon()
        flip(destination, 5 * MIB + 1, image_format)
        again = await taken_up(kept, listening)
        reply = await again.expect(protocol.Arrived("d", 4 * MIB, 256 * MIB), protocol.ArrivedReply)
        assert reply.extents[0] == (4 * MIB, MIB) and reply.extents[1][0] == 5 * MIB + UNIT
        assert sum(reply.extents[-1]) == 12 * MIB
        for wrong in (UNIT + 512, size, -UNIT):
            with pytest.raises(errors.Refused):
                await again.request(protocol.Arrived("d", wrong, MIB))
        await again.abandon()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "holds", ["the same", "the same but for a byte", "the same but for a half", "nothing", "something else"]
)
async def test_an_image_that_holds_anothers_data_is_not_gone_on_with(
    tmp_path: Path, image_format: str, holds: str
) -> None:
    size = 16 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(os.urandom(size))
    new = image(destination, size, format=image_format)
    with qemu_export(tmp_path, source) as (listening, _):
        first, kept = await begun(new, listening)
        await first.request(bulk((0, 8 * MIB)))
        await first.request(protocol.Flush("d"))
        await first.abandon()
        if holds.endswith("byte"):
            flip(destination, 5 * MIB + 1, image_format)
        elif holds.endswith("half"):
            write_over(destination, image_format, "write -P 7 0 4M")
        elif holds != "the same":
            write_over(destination, image_format, "write -z 0 8M" if holds == "nothing" else "write -P 7 0 8M")
        again = await taken_up(kept, listening)
        recognized = again.request(protocol.Recognize("d", 8 * MIB))
        if holds.startswith("the same"):
            await recognized
        else:
            with pytest.raises(errors.Refused, match="another's"):
                await recognized
        with pytest.raises(errors.Refused, match="beyond"):
            await again.request(protocol.Recognize("d", size + 512))
        await again.abandon()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_what_the_guest_had_written_anew_before_the_host_crashed_is_not_anothers(
    tmp_path: Path, image_format: str
) -> None:
    """The host had stored the data of a round that was not flushed, but not yet the hashes of it."""
    size = 8 * MIB
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(os.urandom(size))
    new = image(destination, size, format=image_format)
    with qemu_export(tmp_path, source) as (listening, _):
        first, kept = await begun(new, listening)
        await first.request(bulk((0, size)))
        await first.request(protocol.Flush("d"))
        (hashes,) = tmp_path.glob(".*-hashes")
        before = hashes.read_bytes()
        with source.open("r+b") as file:
            file.write(os.urandom(size))
        await first.request(dirty((0, size)))
        await first.abandon()
        with hashes.open("r+b") as file:
            file.write(before)
        again = await taken_up(kept, listening)
        await again.request(protocol.Recognize("d", size))
        assert not (await again.expect(protocol.Arrived("d", 0, size), protocol.ArrivedReply)).extents
        await again.abandon()


async def test_hashes_of_an_earlier_recording_are_gone_before_a_new_one_can_begin(tmp_path: Path) -> None:
    """They would prove that what was read then lies there, and nobody knows what the guest has written since."""
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(os.urandom(MIB))
    new = image(destination, MIB)
    with qemu_export(tmp_path, source) as (listening, _):
        first, kept = await begun(new, listening)
        await first.request(bulk((0, MIB)))
        await first.abandon()
        for compared, prevented in ((True, None), (False, errors.Refused)):
            agent = await LocalHost().start_agent()
            await agent.request(protocol.Prepare([structs.replace(kept, compared=compared)], "cafe"))
            with pytest.raises(prevented) if prevented else contextlib.nullcontext():
                await agent.request(opening(listening, hash="xxh3-128"))
            # Killed before it was told to keep anything.
            agent.kill("by the test")
            await agent.abandon()


async def test_nothing_is_verified_where_nothing_was_hashed(agent: AgentClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(MIB))
    with qemu_export(tmp_path, source) as (listening, _):
        await opened(agent, image(tmp_path / "destination", MIB), opening(listening))
        with pytest.raises(errors.Refused, match="nothing was hashed"):
            await agent.request(protocol.Verify("d", MIB))


async def test_a_low_bandwidth_does_not_cut_units(agent: AgentClient, tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(os.urandom(256 * KIB))
    with qemu_export(tmp_path, source) as (listening, _):
        new = image(destination, 256 * KIB)
        await opened(agent, new, opening(listening, hash="xxh3-128", hash_unit=128 * KIB))
        await agent.request(protocol.Bandwidth(256 * KIB))
        await agent.request(bulk((0, 256 * KIB)))
        assert await read_back(agent) == (256 * KIB, [])
