"""Loop devices for tests."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def loop_device(file: Path, size: int, sector: int) -> Iterator[Path]:
    """A block device of `size` bytes, with sectors of `sector` bytes, over a new `file`."""
    with file.open("wb") as made:
        made.truncate(size)
    command = ["losetup", "--find", "--show", "--sector-size", str(sector), str(file)]
    device = subprocess.check_output(command, text=True).strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
