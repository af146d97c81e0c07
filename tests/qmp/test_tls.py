"""The source's exports over TCP, with TLS: a real QEMU, who may connect and who may not."""

from __future__ import annotations

import array
import asyncio
import fcntl
import logging
import stat
import termios
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from qemu_blkmig.errors import ConnectionLost, Refused
from qemu_blkmig.job.datapath import DataPath, parse_data_path
from qemu_blkmig.job.datapath_made import open_data_path
from qemu_blkmig.job.place import Local
from qemu_blkmig.nbd.address import X509, Psk, TcpAddress
from qemu_blkmig.nbd.connection import connect
from qemu_blkmig.qmp import tls
from qemu_blkmig.qmp.exports import ExportServer
from qemu_blkmig.qmp.removal import remove_all
from tests.certificates import make_certificates
from tests.qmp.conftest import MakeImage, Qemu, StartQemu

NAME = "blkmig-1a2b-tls"


@pytest.fixture
async def qemu(start_qemu: StartQemu, make_image: MakeImage) -> AsyncIterator[Qemu]:
    """A QEMU with a disk of 8 MiB on node d."""
    yield await start_qemu("-blockdev", f"driver=qcow2,node-name=d,file.driver=file,file.filename={make_image('disk')}")


async def serve(qemu: Qemu, runtime: Path, path: DataPath) -> ExportServer:
    address = await open_data_path(path, qemu.monitor, Local("/there"), NAME, runtime)
    server = ExportServer(qemu.monitor, address, NAME if path.tls else None)
    await server.start()
    await server.add("e", "d")
    return server


async def size(address: TcpAddress) -> int:
    def look() -> int:
        connection = connect(address, "e")
        try:
            buffer = bytearray(4096)
            assert connection.read_now(memoryview(buffer), 0) == 0
            return connection.size
        finally:
            connection.close()

    return await asyncio.to_thread(look)


async def objects(qemu: Qemu) -> list[str]:
    there = await qemu.user.execute("qom-list", {"path": "/objects"})
    return [each["name"] for each in there if each["name"].startswith("blkmig")]


def tcp(server: ExportServer) -> TcpAddress:
    assert isinstance(server.address, TcpAddress)
    return server.address


async def test_a_disk_is_read_with_the_job_s_key_and_with_no_other(qemu: Qemu, tmp_path: Path) -> None:
    server = await serve(qemu, tmp_path, DataPath(tls=True))
    address = tcp(server)
    assert address.host == "127.0.0.1" and address.port > 0 and isinstance(address.tls, Psk)
    assert await size(address) == 8 << 20
    for stranger in (
        msgspec.structs.replace(address, tls=Psk(NAME, "00" * 32)),
        msgspec.structs.replace(address, tls=Psk("somebody", address.tls.key)),
        msgspec.structs.replace(address, tls=None),
    ):
        with pytest.raises(ConnectionLost, match=f"127.0.0.1:{address.port}"):
            await size(stranger)
    assert await size(address) == 8 << 20
    await server.stop()
    assert await objects(qemu) == []
    with pytest.raises(ConnectionLost, match="Connection refused"):
        await size(address)


@pytest.mark.parametrize(("knows_aes", "suite"), [(True, 0x1301), (False, 0x1303)])
async def test_data_is_encrypted_by_what_the_processor_is_quick_at(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knows_aes: bool, suite: int
) -> None:
    """RFC 8446, B.4: TLS_AES_128_GCM_SHA256 or TLS_CHACHA20_POLY1305_SHA256."""
    monkeypatch.setattr(tls, "knows_aes", lambda: knows_aes)
    server = await serve(qemu, tmp_path, DataPath(tls=True))
    answers = bytearray()

    async def relay(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        there, to_there = await asyncio.open_connection("127.0.0.1", tcp(server).port)

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: bytearray) -> None:
            while data := await reader.read(1 << 16):
                seen += data
                writer.write(data)
            writer.close()

        await asyncio.gather(pass_on(client, to_there, bytearray()), pass_on(there, to_client, answers))

    between = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with between:
        port = between.sockets[0].getsockname()[1]
        assert await size(msgspec.structs.replace(tcp(server), port=port)) == 8 << 20
    # A record of a handshake, of it the ServerHello: version and random, then the session's id, then the suite.
    hello = answers.index(b"\x16\x03\x03")
    assert answers[hello + 5] == 2
    session = hello + 9 + 2 + 32
    after = session + 1 + answers[session]
    assert int.from_bytes(answers[after : after + 2], "big") == suite
    await server.stop()


async def test_what_has_arrived_in_many_records_is_taken_at_once(qemu: Qemu, tmp_path: Path) -> None:
    server = await serve(qemu, tmp_path, DataPath(tls=True))

    def times_driven() -> int:
        connection = connect(tcp(server), "e")
        arrived: list[tuple[object, int]] = []
        connection.read(memoryview(bytearray(4 << 20)), 0, arrived, None)
        times, waiting = 0, array.array("i", [0])
        while not arrived:
            before = -1
            while waiting[0] != before:
                before = waiting[0]
                time.sleep(0.002)
                fcntl.ioctl(connection.descriptor, termios.FIONREAD, waiting)
            connection.drive()
            times += 1
        connection.close()
        return times

    # In records of 16 KiB they are 256.
    assert await asyncio.to_thread(times_driven) < 64
    await server.stop()


async def test_the_key_is_readable_to_its_user_only_and_shown_nowhere(
    qemu: Qemu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        server = await serve(qemu, tmp_path, DataPath(tls=True))
        address = tcp(server)
        assert isinstance(address.tls, Psk)
        await size(address)
        await server.stop()
    for shown in (caplog.text, repr(address), str(address), repr(address.tls)):
        assert address.tls.key not in shown
    assert stat.S_IMODE((tmp_path / "tls" / "keys.psk").stat().st_mode) == 0o400
    assert stat.S_IMODE((tmp_path / "tls").stat().st_mode) == 0o700


async def test_what_a_killed_job_left_is_removed_with_the_rest(qemu: Qemu, tmp_path: Path) -> None:
    await serve(qemu, tmp_path, DataPath(tls=True))
    assert await objects(qemu) == [NAME]
    removed = await remove_all(qemu.monitor, prefix="blkmig-1a2b", nbd_server_is_ours=False)
    assert f"the object {NAME}" in removed and await objects(qemu) == []


async def test_without_tls_everybody_may_read(qemu: Qemu, tmp_path: Path) -> None:
    server = await serve(qemu, tmp_path, DataPath(tls=False))
    assert await size(tcp(server)) == 8 << 20
    assert not (tmp_path / "tls").exists()
    await server.stop()


async def test_certificates_of_the_user_s_are_checked_on_both_sides(qemu: Qemu, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for place in (ours, theirs):
        place.mkdir()
        make_certificates(place, "IP:127.0.0.1")
    server = await serve(qemu, tmp_path, DataPath(tls=True, host="127.0.0.1", certificates=str(ours)))
    assert await size(tcp(server)) == 8 << 20
    with pytest.raises(ConnectionLost):
        await size(msgspec.structs.replace(tcp(server), tls=X509(str(theirs))))
    await server.stop()


async def test_a_place_without_certificates_is_refused_and_nothing_is_left(qemu: Qemu, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="source QEMU cannot do TLS with /nowhere"):
        await serve(qemu, tmp_path, DataPath(tls=True, certificates="/nowhere"))
    assert await objects(qemu) == []


@pytest.mark.parametrize(
    ("text", "insecure", "path"),
    [
        ("tls://", False, DataPath(True)),
        ("tls://10.0.0.1", False, DataPath(True, "10.0.0.1")),
        ("tls://[fd00::1]:49152", False, DataPath(True, "fd00::1", 49152)),
        ("tcp://hosta:1", True, DataPath(False, "hosta", 1)),
    ],
)
def test_a_way_for_the_data_is_read(text: str, insecure: bool, path: DataPath) -> None:
    assert parse_data_path(text, insecure=insecure) == path
