"""The programs of other packages that we run, and what to say where one is missing, or fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

from qemu_blkmig.errors import Refused

USUAL_LIMIT = 60.0
"""Seconds that a qemu-img may take which neither reads nor writes a whole image."""
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


def qemu_img(*arguments: str, limit: float | None = USUAL_LIMIT, descriptors: Sequence[int] = ()) -> str:
    """What it prints, with these of our `descriptors` open in it. Raises `Refused` with its words."""
    try:
        done = subprocess.run(
            ["qemu-img", *arguments], capture_output=True, text=True, errors="backslashreplace", timeout=limit,
            check=False, pass_fds=descriptors,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"qemu-img {arguments[0]}: {error}") from error
    if done.returncode:
        raise Refused(done.stderr.strip() or f"qemu-img {arguments[0]} ended with status {done.returncode}")
    return done.stdout


def image_info(path: str, image_format: str | None) -> dict[str, Any]:
    """What qemu-img tells of an image, whose path it takes for nothing else; None: of the format that it recognizes."""
    of_format = [] if image_format is None else ["-f", image_format]
    told = qemu_img("info", "--force-share", "--output=json", *of_format, os.path.realpath(path))
    info: dict[str, Any] = json.loads(told)
    return info
