"""Completion offers, in real shells, what the parsers know; names of jobs and domains it finds without any Python."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from manuals.completion import PLACES, completion, main
from manuals.parsers import programs, subcommands

Press = Callable[[str], str]
LIMIT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make manuals` writes for shells, a state directory with one job, and a virsh with one domain."""
    folder = tmp_path_factory.mktemp("completion")
    main(folder)
    (folder / "state" / "1a2b3c4d").mkdir(parents=True)
    (folder / "state" / "1a2b3c4d" / "record.json").touch()
    (folder / "state" / "history").mkdir()
    virsh = folder / "bin" / "virsh"
    virsh.parent.mkdir()
    virsh.write_text("#!/bin/sh\n[ \"$*\" = '--quiet list --all --name' ] && echo webserver\n")
    virsh.chmod(0o755)
    return folder


@pytest.fixture(params=["bash", "zsh", "fish"])
def press(request: pytest.FixtureRequest, folder: Path) -> Press:
    """Type something and press Tab; what the shell then shows, or offers."""
    shell: str = request.param
    if shutil.which(shell) is None:
        pytest.fail(f"{shell} is missing: scripts/setup installs it")
    script = folder / PLACES[shell].format(program="qemu-blkmig")
    environment = {
        "QEMU_BLKMIG_STATE_DIR": str(folder / "state"),
        "TERM": "dumb",
        "HOME": str(folder),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    if shell == "fish":
        return lambda text: _run_fish(script, text, environment)
    return lambda text: _type(shell, script, text, environment)


def _run_fish(script: Path, text: str, environment: dict[str, str]) -> str:
    command = f"source {script}; complete --do-complete '{text}'"
    shown = pexpect.run(f'fish --no-config -c "{command}"', env=environment, timeout=LIMIT)
    return str(shown.decode())


def _type(shell: str, script: Path, text: str, environment: dict[str, str]) -> str:
    """Bash and zsh offer only to somebody who types."""
    options = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}[shell]
    before = {
        "bash": f"bind 'set page-completions off'; bind 'set bell-style none'; source {script}",
        "zsh": f"fpath=({script.parent} $fpath); autoload -Uz compinit; compinit -D -u; unsetopt beep prompt_sp",
    }[shell]
    terminal = pexpect.spawn(shell, options, env=environment, timeout=LIMIT, encoding="utf-8", dimensions=(200, 200))
    try:
        terminal.sendline(f"{before}; PS1='rea''dy> '")
        terminal.expect("ready> ")
        terminal.send(f"{text}\t\t")
        # Where nothing is offered, nothing comes: an end that is always shown.
        terminal.send("\x15echo en''d\r")
        terminal.expect("end\r")
        return str(terminal.before)
    finally:
        terminal.close(force=True)


def test_commands_are_offered(press: Press) -> None:
    shown = press("qemu-blkmig ")
    for command in subcommands(programs()["qemu-blkmig"]):
        assert command in shown


def test_options_of_a_command_are_offered_and_no_others(press: Press) -> None:
    shown = press("qemu-blkmig set --")
    assert "--bandwidth" in shown and "--downtime" in shown
    assert "--launch" not in shown


def test_choices_are_offered(press: Press) -> None:
    shown = press("qemu-blkmig migrate --verify ")
    assert "written" in shown and "full" in shown


def test_jobs_are_offered_by_name(press: Press) -> None:
    shown = press("qemu-blkmig status ")
    assert "1a2b3c4d" in shown and "history" not in shown


def test_domains_are_offered_by_name(press: Press) -> None:
    assert "webserver" in press("qemu-blkmig guard ")


def test_files_are_offered_where_one_is_wanted(press: Press, tmp_path: Path) -> None:
    (tmp_path / "domain-definition.xml").touch()
    assert "domain-definition.xml" in press(f"qemu-blkmig guard --xml {tmp_path}/domain-")


@pytest.mark.parametrize("shell", PLACES)
def test_every_program_has_completion(shell: str) -> None:
    for program, parser in programs().items():
        assert program in completion(parser, shell)
