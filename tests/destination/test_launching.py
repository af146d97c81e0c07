"""The launch command: a shell's, but without a shell that lingers."""

from __future__ import annotations

import pytest

from qemu_blkmig.destination.launching import in_place_of_the_shell


@pytest.mark.parametrize("command", ["true", "/bin/true -drive 'file=a;b'", 'true "a && b" c=d'])
def test_a_single_program_takes_the_place_of_the_shell(command: str) -> None:
    assert in_place_of_the_shell(command) == f"exec {command}"


@pytest.mark.parametrize(
    "command",
    ["cd / && true", "true; true", "true > log", "true\ntrue", "cd /", "$QEMU -m 1", "true a#b && c"],
)
def test_everything_else_is_left_to_the_shell(command: str) -> None:
    assert in_place_of_the_shell(command) == command
