"""The launch command: a shell's, but without a shell that lingers."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_blkmig.destination.launching import Launcher, in_place_of_the_shell
from qemu_blkmig.errors import Refused


@pytest.mark.parametrize("command", ["true", "/bin/true -drive 'file=a;b'", 'true "a && b" c=d'])
def test_a_single_program_takes_the_place_of_the_shell(command: str) -> None:
    assert in_place_of_the_shell(command) == f"exec {command}"


@pytest.mark.parametrize(
    "command",
    ["cd / && true", "true; true", "true > log", "true\ntrue", "cd /", "$QEMU -m 1", "true a#b && c"],
)
def test_everything_else_is_left_to_the_shell(command: str) -> None:
    assert in_place_of_the_shell(command) == command


async def _ended(command: str, directory: Path) -> None:
    launcher = Launcher("unclosed")
    try:
        launcher.launch(command, str(directory))
        await launcher.go()
    finally:
        launcher.forget()


async def test_a_command_that_is_none_is_refused_in_the_shell_s_words(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"ended.*Unterminated quoted string"):
        await _ended("true 'x", tmp_path)
