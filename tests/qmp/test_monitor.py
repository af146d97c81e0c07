"""The QMP connection: errors that tell what is wrong with a socket, events, and the loss of a QEMU."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from qemu_blkmig.errors import ConnectionLost, Refused
from qemu_blkmig.qmp.monitor import CommandFailed, NoAnswer
from qemu_blkmig.qmp.socket import SocketMonitor
from tests.qmp.conftest import StartQemu


async def refusal(path: Path, patience: float = 5.0) -> str:
    with pytest.raises(Refused) as caught:
        await SocketMonitor.connect(str(path), who="source QEMU", timeout=patience)
    assert caught.value.advice
    return str(caught.value)


def listener(path: Path, backlog: int = 1) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen(backlog)
    return made


async def test_no_such_socket(tmp_path: Path) -> None:
    assert "there is no QMP socket at" in await refusal(tmp_path / "none")


async def test_a_stale_socket_has_no_listener(tmp_path: Path) -> None:
    listener(tmp_path / "stale").close()
    assert "no process listens at" in await refusal(tmp_path / "stale")


async def test_a_plain_file_is_not_a_socket(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "not a socket" in await refusal(tmp_path / "file")


async def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    assert "more than the 107" in await refusal(tmp_path / ("x" * 120))


async def test_a_socket_in_use_by_another_client(start_qemu: StartQemu) -> None:
    qemu = await start_qemu()
    assert "in use by another client" in await refusal(Path(qemu.second_socket), patience=0.2)


async def test_a_full_backlog_is_waited_for_no_longer_than_asked(tmp_path: Path) -> None:
    with listener(tmp_path / "busy", 0), socket.socket(socket.AF_UNIX) as first:
        first.connect(str(tmp_path / "busy"))
        assert "in use by another client" in await refusal(tmp_path / "busy", patience=0.2)


@pytest.mark.parametrize(
    "greeting", [b"NBDMAGICIHAVEOPT\0\0", b"QEMU 7.2.0 monitor\r\n(qemu) ", b'{"hello": 1}\n', b"{\n"]
)
async def test_a_socket_that_is_not_qmp(tmp_path: Path, greeting: bytes) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(greet, tmp_path / "other")
    async with server:
        assert "does not speak QMP" in await refusal(tmp_path / "other")


async def test_a_server_that_hangs_up_at_once(tmp_path: Path) -> None:
    server = await asyncio.start_unix_server(lambda reader, writer: writer.close(), tmp_path / "shut")
    async with server:
        assert "closed the connection" in await refusal(tmp_path / "shut")


async def test_a_refused_command_tells_class_and_description(start_qemu: StartQemu) -> None:
    qemu = await start_qemu()
    with pytest.raises(CommandFailed, match="source QEMU refused nonsense") as caught:
        await qemu.monitor.execute("nonsense")
    assert caught.value.command == "nonsense"
    assert caught.value.error_class == "CommandNotFound"


async def test_the_loss_of_qemu_ends_commands_events_and_waits(start_qemu: StartQemu) -> None:
    qemu = await start_qemu()
    with qemu.monitor.events("STOP") as events:
        await qemu.monitor.execute("stop")
        waiting = asyncio.create_task(qemu.monitor.wait_lost())
        qemu.process.kill()
        await waiting
        assert qemu.monitor.lost
        assert (await events.get()).name == "STOP"
        for _ in range(2):
            with pytest.raises(ConnectionLost, match="source QEMU is gone"):
                await events.get(1)
    with pytest.raises(ConnectionLost, match="source QEMU is gone"):
        await qemu.monitor.execute("query-status")


async def test_an_event_that_does_not_come_is_a_timeout(start_qemu: StartQemu) -> None:
    qemu = await start_qemu()
    with qemu.monitor.events("RESUME") as events, pytest.raises(TimeoutError):
        await events.get(0.05)


async def test_a_qemu_that_does_not_answer_keeps_its_connection(start_qemu: StartQemu) -> None:
    qemu = await start_qemu()
    qemu.process.send_signal(signal.SIGSTOP)
    with pytest.raises(NoAnswer, match="did not answer query-status"):
        await qemu.monitor.execute("query-status", timeout=0.1)
    qemu.process.send_signal(signal.SIGCONT)
    assert (await qemu.monitor.execute("query-status"))["running"]


async def test_descriptors_passed_at_once_keep_their_names(start_qemu: StartQemu, tmp_path: Path) -> None:
    qemu = await start_qemu()
    files = [tmp_path / f"file{number}" for number in range(4)]
    descriptors = [os.open(file, os.O_RDWR | os.O_CREAT) for file in files]
    await asyncio.gather(*(qemu.monitor.pass_fd(fd, f"n{number}") for number, fd in enumerate(descriptors)))
    for number, fd in enumerate(descriptors):
        os.close(fd)
        assert files[number].stat().st_size == 0
        dump = {"paging": False, "protocol": f"fd:n{number}", "begin": 0, "length": 4096}
        await qemu.monitor.execute("dump-guest-memory", dump)
        assert files[number].stat().st_size > 0


async def test_close_is_idempotent(start_qemu: StartQemu) -> None:
    qemu = await start_qemu()
    await asyncio.gather(qemu.monitor.close(), qemu.monitor.close())
    await qemu.monitor.close()
    assert qemu.monitor.lost
