"""The programs of other packages that we run, and what to say where one is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

SERVING = ("qemu-img", "qemu-nbd", "setpriv")
"""What it takes to read or write an image by qemu-nbd."""
_PACKAGES = {"qemu-img": "qemu-utils", "qemu-nbd": "qemu-utils", "setpriv": "util-linux"}


def missing(programs: Iterable[str]) -> list[str]:
    """In words, each of `programs` that is not to be found."""
    return [
        f"the program {program} is not in PATH (Debian's package {_PACKAGES[program]} has it)"
        for program in programs
        if shutil.which(program) is None
    ]
