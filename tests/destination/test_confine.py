"""What a confined agent (`receive --root`) does not do, whatever it is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import get_args

import pytest

from qemu_blkmig.destination import images, protocol, qemu_nbd
from qemu_blkmig.destination.confine import HARMLESS, NO_BOUNDS, Bounds
from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.destination.service import Service
from qemu_blkmig.nbd.address import X509, Psk, TcpAddress, UnixAddress

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with a link that leads out of it, beside a secret."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    made = tmp_path / "root"
    made.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "secret").write_bytes(bytes(MIB))
    (made / "link").symlink_to(tmp_path / "outside")
    (made / "secret").symlink_to(tmp_path / "secret")
    return made


async def tell(_: object) -> None:
    """Nobody listens."""


@pytest.fixture
async def service(root: Path) -> AsyncIterator[Service]:
    """The operations of an agent confined to `root`."""
    made = Service(tell, Bounds([str(root)]))
    await made.perform(protocol.Hello("0", protocol.PROTOCOL, "cafe"))
    yield made
    await made.end(remove=True)


def image(path: object, **settings: object) -> protocol.Image:
    """A raw image to be made, but for `settings`."""
    return protocol.Image(**{"disk": "d", "path": str(path), "format": "raw", "size": MIB, "create": True} | settings)  # type: ignore[arg-type]


def qemu_img(root: Path, image_format: str, *options: str) -> None:
    """Make an image of 1 MiB, `made` in `root`."""
    command = ["qemu-img", "create", "-q", "-f", image_format, *options, "made", "1M"]
    subprocess.run(command, check=True, cwd=root)


async def refused(service: Service, op: protocol.Operation, word: str = "out of bounds") -> None:
    """Assert that the agent refuses `op`."""
    outcome = await service.perform(op)
    assert isinstance(outcome, protocol.Failure) and outcome.kind == "refused", outcome
    assert word in outcome.what


@pytest.mark.parametrize(
    "path", ["outside/x", "root/../outside/x", "root/link/x", "root/secret", "rootless/x", "root\0/x"]
)
async def test_no_path_leads_out(service: Service, root: Path, path: str) -> None:
    there = str(root.parent / path)
    created = protocol.Created(there, 1, 1)
    for op in (
        protocol.Inspect([image(there)]),
        protocol.Prepare([image(there)]),
        protocol.Prepare([image(root / "good"), image(there, disk="e")]),
        protocol.Discard([created]),
        protocol.Held([there]),
        protocol.Files([there]),
        protocol.Mark("cafe", [there], "complete"),
        protocol.BaseDigest("d", there, "raw", None),
        protocol.BaseDigests("d", there, "raw", 0, 512, 512, "sha256"),
        protocol.Identify(there),
        protocol.Open("d", UnixAddress(there), "export", 1, 1, 4096, 4096),
        protocol.Open("d", TcpAddress("127.0.0.1", 1, X509(str(root.parent))), "export", 1, 1, 4096, 4096),
    ):
        await refused(service, op)
    assert not (root / "good").exists()
    assert not list((root.parent / "outside").iterdir())


async def test_what_lies_within_is_served(service: Service, root: Path) -> None:
    (root / "sub").mkdir()
    assert isinstance(await service.perform(protocol.Prepare([image(root / "sub/../disk")])), protocol.PrepareReply)
    assert (root / "disk").exists()


@pytest.mark.parametrize("name", ["../secret", "secret", "json:{}", "nbd:unix:/x"])
async def test_no_backing_file_leads_out(service: Service, root: Path, name: str) -> None:
    backing = protocol.Backing(name, "raw")
    overlay = image(root / "overlay", format="qcow2", backing=backing)
    await refused(service, protocol.Prepare([overlay]), "")
    assert not (root / "overlay").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["-b", "../secret", "-F", "raw"],
        ["-o", "data_file=../outside/data,data_file_raw=on"],
        ["-o", "data_file=data,data_file_raw=on"],
    ],
)
async def test_no_header_of_an_image_leads_out(service: Service, root: Path, options: list[str]) -> None:
    """A relative data file is one in the agent's working directory, which is out of the root."""
    qemu_img(root, "qcow2", *options)
    await refused(service, protocol.Prepare([image(root / "made", format="qcow2", create=False)]))
    overlay = image(root / "overlay", format="qcow2", backing=protocol.Backing("made", "qcow2"))
    await refused(service, protocol.Inspect([overlay]))
    await refused(service, protocol.BaseDigest("d", str(root / "made"), "qcow2", "sha256"))


@pytest.mark.parametrize("when", ["locked", "opened"])
@pytest.mark.parametrize("layer", ["image", "base"])
async def test_a_header_that_is_rewritten_after_it_was_checked_leads_out_no_more(
    service: Service, root: Path, monkeypatch: pytest.MonkeyPatch, when: str, layer: str
) -> None:
    """Who has the key may connect twice: as the image's writer, too, until it is locked."""
    qemu_img(root, "qcow2", "-o", f"data_file={root.parent}/outside/data,data_file_raw=on")
    evil = (root / "made").read_bytes()
    (root / "made").unlink()
    qemu_img(root, "qcow2")
    overlay = protocol.Backing("made", "qcow2")
    wanted = image(root / "made", format="qcow2", create=False)
    if layer == "base":
        wanted = image(root / "overlay", format="qcow2", backing=overlay)
    module, name = (images, "prepare") if when == "locked" else (qemu_nbd, "start")
    work = getattr(module, name)

    def rewritten_before(*arguments: object, **options: object) -> object:
        (root / "made").write_bytes(evil)
        return work(*arguments, **options)

    monkeypatch.setattr(module, name, rewritten_before)
    prepared = await service.perform(protocol.Prepare([wanted]))
    if when == "opened":
        assert isinstance(prepared, protocol.PrepareReply)
        source = UnixAddress(str(root / "nobody"))
        prepared = await service.perform(protocol.Open("d", source, "export", 1, 1, 4096, 4096))
    assert isinstance(prepared, protocol.Failure) and "out of bounds" in prepared.what, prepared
    assert not service._disks or when == "opened"


async def test_a_base_that_is_rewritten_after_it_was_checked_is_not_read(
    service: Service, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu_img(root, "qcow2", "-b", "../secret", "-F", "raw")
    evil = (root / "made").read_bytes()
    (root / "made").unlink()
    qemu_img(root, "qcow2")
    start = qemu_nbd.start_reading

    async def rewritten_before(*arguments: str) -> qemu_nbd.QemuNbd:
        (root / "made").write_bytes(evil)
        return await start(*arguments)

    monkeypatch.setattr(qemu_nbd, "start_reading", rewritten_before)
    await refused(service, protocol.BaseDigest("d", str(root / "made"), "qcow2", "sha256"))


async def test_what_a_raw_image_may_seem_to_be_leads_nowhere(service: Service, root: Path) -> None:
    """Asked what it is, qemu-img opens the files that a VMDK's descriptor names."""
    (root.parent / "pipe").touch()
    descriptor = f'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 1 FLAT "{root.parent}/pipe" 0\n'
    (root / "seems").write_bytes(descriptor.encode().ljust(4096, b"\0"))
    reply = await service.perform(protocol.Inspect([image(root / "seems", create=False)]))
    assert isinstance(reply, protocol.InspectReply)
    (problem,) = reply.problems
    assert problem.what.endswith("holds 4096 bytes, the disk has 1048576")


async def test_formats_whose_headers_we_do_not_know_are_refused(service: Service, root: Path) -> None:
    qemu_img(root, "vmdk")
    await refused(service, protocol.Prepare([image(root / "made", format="vmdk", create=False)]), "format vmdk")


async def test_nothing_is_launched_and_nobody_is_ended(service: Service, root: Path) -> None:
    await refused(service, protocol.Launch("touch launched", str(root)), "launches no programs")
    await refused(service, protocol.FindProgram("sh", str(root)), "launches no programs")
    own = ProcessId.of(os.getpid())
    assert own is not None
    await refused(service, protocol.Alive(own), "none of this job's")
    await refused(service, protocol.EndProcess(own, group=True), "none that this job launched")


async def test_what_was_launched_with_permission_may_be_ended(root: Path) -> None:
    service = Service(tell, Bounds([str(root)], launch=True))
    await service.perform(protocol.Hello("0", protocol.PROTOCOL, "cafe"))
    await refused(service, protocol.Launch("true", "/"))
    launched = await service.perform(protocol.Launch("sleep 60; true", str(root)))
    assert isinstance(launched, protocol.Launched)
    later = Service(tell, Bounds([str(root)], launch=True))
    await later.perform(protocol.Hello("0", protocol.PROTOCOL, "cafe"))
    assert await later.perform(protocol.EndProcess(launched.process, group=True)) == protocol.AliveReply(alive=False)
    await later.perform(protocol.Bye())
    await service.end(remove=True)
    assert not list(root.parent.glob("blkmig-*"))


@contextlib.contextmanager
def qemu(root: Path, *options: str) -> Iterator[tuple[str, ProcessId]]:
    """A QEMU without a guest, a group of its own, whose QMP socket is in `root`."""
    path = root / "qmp"
    command = ["qemu-system-x86_64", "-M", "none", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off"]
    process = subprocess.Popen([*command, *options], start_new_session=True)
    try:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.02)
        found = ProcessId.of(process.pid)
        assert found is not None
        yield str(path), found
    finally:
        process.kill()
        process.wait()
        path.unlink(missing_ok=True)


async def test_a_guest_that_runs_there_with_its_socket_within_the_root_is_not_ended(
    service: Service, root: Path
) -> None:
    with qemu(root) as (path, running):
        assert await service.perform(protocol.Identify(path)) == protocol.Identified(running)
        for group in (True, False):
            await refused(service, protocol.EndProcess(running, group=group), "none that this job launched")
        assert running.alive
        assert await service.perform(protocol.Alive(running)) == protocol.AliveReply(alive=True)


async def test_a_qemu_that_waits_for_a_migration_may_be_ended_also_by_a_later_agent_of_the_job_and_alone(
    service: Service, root: Path
) -> None:
    with qemu(root, "-incoming", "defer") as (path, waits):
        while not service._launcher.waited():
            assert await service.perform(protocol.Identify(path)) == protocol.Identified(waits)
        later, other = Service(tell, Bounds([str(root)])), Service(tell, Bounds([str(root)]))
        await later.perform(protocol.Hello("0", protocol.PROTOCOL, "cafe"))
        await other.perform(protocol.Hello("0", protocol.PROTOCOL, "beef"))
        await refused(other, protocol.EndProcess(waits), "none that this job launched")
        await refused(later, protocol.EndProcess(waits, group=True), "none that this job launched")
        assert await later.perform(protocol.EndProcess(waits)) == protocol.AliveReply(alive=False)
        await later.perform(protocol.Bye())
        await other.end(remove=True)
    assert not list(root.parent.glob("blkmig-cafe-qemu-*"))


@pytest.mark.parametrize(
    "answers", [b"", b"nonsense\n", b"[]\n", b'{"QMP": {}}\n{"return": {}}\n{"return": []}\n', b"x" * (2 << 20)]
)
async def test_what_is_no_qemu_is_not_taken_for_one_that_waits(service: Service, root: Path, answers: bytes) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answers)
        writer.close()

    server = await asyncio.start_unix_server(answer, root / "qmp")
    own = ProcessId.of(os.getpid())
    assert await service.perform(protocol.Identify(str(root / "qmp"))) == protocol.Identified(own)
    assert own is not None
    await refused(service, protocol.EndProcess(own), "none that this job launched")
    server.close()


CLIENT = "198.51.100.7"


async def connecting(root: Path, host: str, **bounds: object) -> protocol.Outcome:
    """What an agent answers that is to read from `host`, and has the ssh client's address."""
    service = Service(tell, Bounds([str(root)], **bounds))  # type: ignore[arg-type]
    await service.perform(protocol.Hello("0", protocol.PROTOCOL, "cafe"))
    psk = Psk("user", "00" * 32)
    outcome = await service.perform(protocol.Open("d", TcpAddress(host, 1, psk), "export", 1, 1, 4096, 4096))
    await service.end(remove=True)
    return outcome


@pytest.mark.parametrize("host", ["198.51.100.8", "127.0.0.1", "localhost", "::1", "198.51.100.7.", "", "0"])
@pytest.mark.parametrize("client", [CLIENT, None, "UNKNOWN"])
async def test_a_confined_agent_is_no_way_to_connect_anywhere(root: Path, host: str, client: str | None) -> None:
    outcome = await connecting(root, host, client=client)
    assert isinstance(outcome, protocol.Failure) and outcome.kind == "refused"
    assert f"does not connect to {host}" in outcome.what
    assert "--allow-connect" in outcome.what


@pytest.mark.parametrize(
    ("host", "bounds"),
    [
        (CLIENT, {"client": CLIENT}),
        (f"::ffff:{CLIENT}", {"client": CLIENT}),
        ("2001:db8:0::1", {"client": "2001:db8::1"}),
        ("fe80::1%eth0", {"client": "fe80::1%eth0"}),
        ("localhost", {"connect": True}),
    ],
)
async def test_whom_it_was_called_by_it_may_read_from(root: Path, host: str, bounds: dict[str, object]) -> None:
    outcome = await connecting(root, host, **bounds)
    assert isinstance(outcome, protocol.Failure)
    # The bounds let it pass: it goes on to look for the disk.
    assert "connect" not in outcome.what and outcome.disk == "d"


async def test_without_encryption_it_reads_from_nobody(root: Path) -> None:
    service = Service(tell, Bounds([str(root)], connect=True, client=CLIENT))
    await refused(service, protocol.Open("d", TcpAddress(CLIENT, 1), "e", 1, 1, 4096, 4096), "with TLS only")


def test_each_operation_is_harmless_or_checked(root: Path) -> None:
    checked = {
        protocol.Inspect, protocol.Prepare, protocol.Discard, protocol.Mark, protocol.Held, protocol.Files,
        protocol.Open, protocol.Identify, protocol.Launch, protocol.FindProgram, protocol.Alive, protocol.EndProcess,
        protocol.BaseDigest, protocol.BaseDigests, protocol.Expect, protocol.Below,
        protocol.Certificates, protocol.Handshake,
    }  # fmt: skip
    assert {*HARMLESS} | checked == set(get_args(protocol.Operation))


@pytest.fixture
def stacked(root: Path) -> list[Path]:
    """Images upon each other, of which the topmost alone is within."""
    chain = [root.parent / "lowest", root.parent / "mid", root / "top"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", chain[0], "1M"], check=True)
    for below, above in itertools.pairwise(chain):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", above], check=True)
    return chain


async def test_of_an_image_s_backing_files_it_opens_those_within_only(root: Path, stacked: list[Path]) -> None:
    chain = stacked
    ask = protocol.Below([str(chain[2]), str(chain[1])])
    told = await Service(tell, Bounds([str(root)])).perform(ask)
    assert told == protocol.BelowReply([[str(chain[1])], []], [False, False])
    told = await Service(tell, NO_BOUNDS).perform(ask)
    assert told == protocol.BelowReply([[str(chain[1]), str(chain[0])], [str(chain[0])]], [True, True])


async def test_of_certificates_it_uses_those_within_only(root: Path) -> None:
    confined = Service(tell, Bounds([str(root)]))
    for message in (protocol.Certificates(None, True), protocol.Handshake(None, True, b"", begin=True)):
        await refused(confined, message, f"does not know {type(message).__name__}")
    for message in (protocol.Certificates("/etc/pki", True), protocol.Handshake("/etc/pki", False, b"", begin=True)):
        await refused(confined, message, "/etc/pki is out of bounds")
    assert isinstance(await confined.perform(protocol.Certificates(str(root), True)), protocol.CertificatesReply)


@pytest.fixture
def with_data(root: Path) -> list[Path]:
    """An image, its base, and the file with the base's data."""
    top, base, data = found = [root / "top", root / "base", root / "base.data"]
    made = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*made, "-o", f"data_file={data},data_file_raw=on", base, "1M"], check=True)
    subprocess.run([*made, "-b", f"file:{base}", "-F", "qcow2", top], check=True)
    return found


async def test_of_an_image_the_file_with_its_data_is_told_as_well(with_data: list[Path]) -> None:
    top, base, data = map(str, with_data)
    told = await Service(tell, NO_BOUNDS).perform(protocol.Below([top, base]))
    assert told == protocol.BelowReply([[base, data], [data]], [True, True])


async def test_where_a_header_names_not_all_or_is_no_header_nothing_is_said_to_be_whole(with_data: list[Path]) -> None:
    top, base, _ = with_data
    header = base.read_bytes()
    for damaged in (header.replace(b"DATA", b"none"), header[:90]):
        assert damaged != header
        base.write_bytes(damaged)
        told = await Service(tell, NO_BOUNDS).perform(protocol.Below([str(top)]))
        assert told == protocol.BelowReply([[str(base)]], [False])


async def test_the_name_of_a_job_is_no_path(root: Path) -> None:
    service = Service(tell, Bounds([str(root)]))
    for name in ("../x", "*", "", "a/b", "x" * 100):
        await refused(service, protocol.Hello("0", protocol.PROTOCOL, name), "no name of a job")
