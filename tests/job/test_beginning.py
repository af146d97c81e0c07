"""What leads to the destination is begun early, and never outlives what began it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen

import pytest

from qemu_blkmig.cli import main
from qemu_blkmig.job import beginning
from qemu_blkmig.job.beginning import Beginning
from qemu_blkmig.job.place import Local
from qemu_blkmig.transport.local import LocalHost
from qemu_blkmig.transport.starting import start


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
    monkeypatch.setattr(beginning, "start", begun.append)
    assert main.main(["copy", "qmp:/run/vm.qmp", f"local:{tmp_path}", *wrong]) == 2
    assert not begun
