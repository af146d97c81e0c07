"""Our exports live on one NBD server that may be somebody else's, and go away for certain."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from qemu_blkmig.errors import Refused, RequestError
from qemu_blkmig.nbd.address import TcpAddress
from qemu_blkmig.nbd.binding import libnbd
from qemu_blkmig.qmp import removal
from qemu_blkmig.qmp.exports import ExportServer
from qemu_blkmig.qmp.removal import remove_all
from tests.qmp.conftest import MakeImage, Qemu, StartQemu


@pytest.fixture
async def qemu(start_qemu: StartQemu, make_image: MakeImage) -> Qemu:
    image = make_image("a.qcow2")
    return await start_qemu(
        "-blockdev", f"driver=qcow2,node-name=a,file.driver=file,file.filename={image}", "-device", "virtio-blk,drive=a"
    )


async def test_a_server_that_runs_already_is_refused_and_left_alone(qemu: Qemu, tmp_path: Path) -> None:
    address = {"type": "unix", "data": {"path": str(tmp_path / "other")}}
    await qemu.user.execute("nbd-server-start", {"addr": address})
    exports = ExportServer(qemu.monitor, tmp_path / "ours")
    with pytest.raises(Refused, match="NBD server already running"):
        await exports.start()
    await exports.stop()
    assert await qemu.server_runs()
    assert not (tmp_path / "ours").exists()


async def test_a_port_can_be_used_again_right_after_the_last_job_on_it(qemu: Qemu) -> None:
    with socket.create_server(("127.0.0.1", 0)) as last, socket.create_connection(last.getsockname()) as client:
        port = last.getsockname()[1]
        last.accept()[0].close()  # the end that closes first waits for a minute, on this port
        assert client.recv(1) == b""
    exports = ExportServer(qemu.monitor, TcpAddress("127.0.0.1", port))
    await exports.start()
    await exports.stop()


async def test_an_export_is_removed_under_its_client(qemu: Qemu, tmp_path: Path) -> None:
    exports = ExportServer(qemu.monitor, tmp_path / "ours")
    await exports.start()
    await exports.add("blkmig-x-data", "a", allocation_depth=True)
    nbd = libnbd()
    handle = nbd.NBD()
    handle.set_export_name("blkmig-x-data")
    handle.add_meta_context("qemu:allocation-depth")
    await asyncio.to_thread(handle.connect_unix, str(tmp_path / "ours"))
    assert handle.can_meta_context("qemu:allocation-depth")
    assert handle.is_read_only()
    await exports.remove("blkmig-x-data")
    assert await qemu.exports() == []
    with pytest.raises(nbd.Error):
        await asyncio.to_thread(handle.pread, 512, 0)
    await exports.remove("blkmig-x-data")
    await exports.stop()
    assert not await qemu.server_runs()
    assert not (tmp_path / "ours").exists()


async def test_the_server_is_kept_for_the_exports_of_others(qemu: Qemu, tmp_path: Path) -> None:
    exports = ExportServer(qemu.monitor, tmp_path / "ours")
    await exports.start()
    await exports.add("blkmig-x-data", "a")
    await qemu.user.execute("block-export-add", {"type": "nbd", "id": "other", "node-name": "a"})
    await exports.stop()
    assert await qemu.exports() == ["other"]


async def test_removal_takes_only_what_is_ours_and_finds_nothing_the_second_time(qemu: Qemu, tmp_path: Path) -> None:
    exports = ExportServer(qemu.monitor, tmp_path / "ours")
    await exports.start()
    await exports.add("blkmig-x-data", "a")
    for name in ("blkmig-x-b1", "blkmig-y-b1", "backup"):
        await qemu.user.execute("block-dirty-bitmap-add", {"node": "a", "name": name})
    arguments = {"node-name": "a", "snapshot-file": str(tmp_path / "s"), "format": "qcow2", "snapshot-node-name": "s"}
    await qemu.user.execute("blockdev-snapshot-sync", arguments)
    await qemu.user.execute("block-dirty-bitmap-add", {"node": "s", "name": "blkmig-x-b2"})
    removed = await remove_all(qemu.monitor, prefix="blkmig-x", nbd_server_is_ours=True)
    assert sorted(removed) == [
        "the NBD server",
        "the bitmap blkmig-x-b1 on node a",
        "the bitmap blkmig-x-b2 on node s",
        "the export blkmig-x-data",
    ]
    assert sorted(await qemu.bitmaps()) == [("a", "backup"), ("a", "blkmig-y-b1")]
    assert await remove_all(qemu.monitor, prefix="blkmig-x", nbd_server_is_ours=True) == []


async def test_removal_leaves_a_server_that_is_not_known_to_be_ours(qemu: Qemu, tmp_path: Path) -> None:
    await ExportServer(qemu.monitor, tmp_path / "ours").start()
    assert await remove_all(qemu.monitor, prefix="blkmig-x", nbd_server_is_ours=False) == []
    assert await qemu.server_runs()


@pytest.mark.parametrize("way", ["unix", "tcp"])
async def test_a_client_that_only_negotiates_does_not_make_qemu_wait_for_ever(
    qemu: Qemu, tmp_path: Path, way: str
) -> None:
    path = str(tmp_path / "ours")
    exports = ExportServer(qemu.monitor, path if way == "unix" else TcpAddress("127.0.0.1", 0))
    await exports.start()
    await exports.add("blkmig-x-data", "a")
    client = socket.socket(socket.AF_UNIX if way == "unix" else socket.AF_INET)
    client.connect(path if way == "unix" else ("127.0.0.1", exports.address.port))  # type: ignore[union-attr]
    assert await asyncio.to_thread(client.recv, 8) == b"NBDMAGIC"
    await exports.stop()
    assert await qemu.exports() == []
    assert await qemu.server_runs(), "its main loop goes on"
    client.close()
    await exports.stop()
    assert not await qemu.server_runs()


async def test_what_a_job_left_is_removed_once_its_last_client_has_gone(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "_CLIENTS", 0.05)
    path = tmp_path / "blkmig-x-1" / "source.nbd"
    path.parent.mkdir()
    await ExportServer(qemu.monitor, path).start()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert await asyncio.to_thread(client.recv, 8) == b"NBDMAGIC"
        with pytest.raises(RequestError, match="still has a client"):
            await remove_all(qemu.monitor, prefix="blkmig-x", nbd_server_is_ours=True)
        assert await qemu.server_runs(), "its main loop goes on"
    monkeypatch.undo()
    assert await remove_all(qemu.monitor, prefix="blkmig-x", nbd_server_is_ours=True) == ["the NBD server"]
