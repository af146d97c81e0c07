"""What leads to the destination is begun early, and never outlives what began it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from subprocess import Popen

import pytest

from qemu_blkmig.cli import main, resume_command
from qemu_blkmig.errors import Interrupted, Refused
from qemu_blkmig.job import beginning
from qemu_blkmig.job.beginning import Beginning
from qemu_blkmig.job.place import Local, Ssh
from qemu_blkmig.places import STATE_VARIABLE
from qemu_blkmig.transport import route
from qemu_blkmig.transport.local import LocalHost
from qemu_blkmig.transport.route import COMMAND_VARIABLE, BegunConnection
from qemu_blkmig.transport.starting import start
from qemu_blkmig.virt.connection import Connection

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}\n'


def test_an_agent_that_nobody_took_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Popen[bytes]] = []

    def noted(command: Sequence[str]) -> Popen[bytes]:
        begun.append(start(command))
        return begun[-1]

    monkeypatch.setattr(beginning, "start", noted)
    with pytest.raises(RuntimeError), Beginning(Local("/new")):
        raise RuntimeError
    (agent,) = begun
    assert agent.returncode is not None


async def test_the_first_agent_is_the_one_that_was_begun() -> None:
    with Beginning(Local("/new")) as begun:
        agent = begun.take_agent()
        assert agent is not None and begun.take_agent() is None
        host = LocalHost(None, agent)
        first, second = await host.start_agent(), await host.start_agent()
        try:
            assert first.pid == agent.pid != second.pid
        finally:
            await first.close()
            await second.close()


async def test_one_that_has_died_meanwhile_is_told_like_any_other() -> None:
    with Beginning(Local("/new")) as begun:
        agent = begun.take_agent()
    assert agent is not None
    agent.kill()
    with pytest.raises(Exception, match="killed by SIGKILL"):
        await LocalHost(None, agent).start_agent()


@pytest.mark.parametrize(
    "wrong", [["--retry", "-1"], ["--metrics-listen", "nowhere"], ["--downtime", "0"], ["--data", "udp://"]]
)
def test_nothing_is_begun_where_the_command_line_makes_no_sense(
    wrong: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []
    state = tmp_path / "state"
    monkeypatch.setenv(STATE_VARIABLE, str(state))
    for module in (beginning, route):
        monkeypatch.setattr(module, "start", begun.append)
    for place in (f"local:{tmp_path}", "ssh://hostb/new"):
        assert main.main(["copy", "qmp:/run/vm.qmp", place, *wrong]) == 2
    assert not begun and not state.exists()


async def test_a_source_that_nobody_took_is_let_go_and_one_that_is_not_there_is_told_to_who_takes_it(
    tmp_path: Path,
) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        asked.set()
        with contextlib.suppress(ConnectionResetError):
            # No answer ever comes.
            while await reader.read(4096):
                pass
        writer.close()
        left.set()

    server = await asyncio.start_unix_server(greet, tmp_path / "vm.qmp")
    with Beginning(Local("/new")) as begun:
        async with begun.reaching(str(tmp_path / "vm.qmp")):
            await asyncio.wait_for(asked.wait(), 10)
        await asyncio.wait_for(left.wait(), 10)
        server.close()
        async with begun.reaching(str(tmp_path / "missing.qmp")):
            source = begun.take_source()
            assert source is not None
            with pytest.raises(Refused, match="there is no QMP socket"):
                await source


async def test_the_destination_s_libvirt_is_connected_to_early_and_let_go_where_nobody_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[str] = []

    class Reached:
        def __init__(self, uri: str) -> None:
            self.uri = uri

        async def close(self) -> None:
            closed.append(self.uri)

    async def reach(uri: str, _who: str) -> Reached:
        if uri == "qemu+ssh://nobody/system":
            raise Refused("cannot connect")
        return Reached(uri)

    monkeypatch.setattr(Connection, "open", reach)
    with Beginning(Local("/new")) as begun:
        async with begun.reaching(None, "qemu+ssh://hostb/system"):
            reached = begun.take_libvirt()
            assert reached is not None and begun.take_libvirt() is None
            assert (await reached).uri == "qemu+ssh://hostb/system"
        assert not closed
        async with begun.reaching(None, "qemu+ssh://hostc/system"):
            await asyncio.sleep(0.1)
        assert closed == ["qemu+ssh://hostc/system"]
        async with begun.reaching(None, "qemu+ssh://nobody/system"):
            await asyncio.sleep(0.1)
        async with begun.reaching(None, "qemu+ssh://nobody/system"):
            reached = begun.take_libvirt()
            assert reached is not None
            with pytest.raises(Refused, match="cannot connect"):
                await reached


def test_a_signal_while_the_program_is_loaded_is_no_other_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))

    async def never_done(*_told: object, **_more: object) -> None:
        await asyncio.Event().wait()

    def interrupted(_wanted: object) -> Callable[..., Awaitable[None]]:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        return never_done

    monkeypatch.setattr(resume_command, "work_of", interrupted)
    code = main.main(["copy", f"qmp:{tmp_path}/vm.qmp", f"local:{tmp_path}"])
    told = capsys.readouterr().err
    assert code == 128 + signal.SIGTERM and "interrupted by SIGTERM" in told and "nothing was touched" in told
    assert "Traceback" not in told


def test_what_ssh_has_started_ends_with_it_and_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    proxy = tmp_path / "proxy"
    ssh = f"""sh -c 'case "$*" in *-G*) ;; *) sleep 60 & echo $! >{proxy}; wait ;; esac' ssh"""
    monkeypatch.setenv(COMMAND_VARIABLE, ssh)
    with pytest.raises(RuntimeError), Beginning(Ssh("hostb", "/new")):
        while not (proxy.exists() and proxy.read_text().endswith("\n")):
            time.sleep(0.01)
        raise RuntimeError
    pid = proxy.read_text().strip()
    assert not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    assert not list((tmp_path / "state").iterdir())


def test_an_ssh_that_is_no_command_line_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.setenv(COMMAND_VARIABLE, "ssh -o 'x")
    assert main.main(["copy", "qmp:/run/vm.qmp", "ssh://hostb/new"]) == 2
    assert not list((tmp_path / "state").glob("*"))


def test_a_signal_ends_a_connection_that_nobody_took_and_its_job_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    # Says nothing of its ciphers, and never comes to connect.
    monkeypatch.setenv(COMMAND_VARIABLE, """sh -c 'case "$*" in *-G*) ;; *) exec sleep 60 ;; esac' ssh""")
    begun: list[BegunConnection] = []
    with pytest.raises(Interrupted, match="SIGTERM"), Beginning(Ssh("hostb", "/new")) as early:
        begun += filter(None, [early._connection])
        assert list((tmp_path / "state").iterdir())
        signal.raise_signal(signal.SIGTERM)
    (connection,) = begun
    assert connection.connection.returncode is not None and not connection.stands.result()
    assert not list((tmp_path / "state").iterdir())
