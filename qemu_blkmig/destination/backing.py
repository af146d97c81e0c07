"""The backing files of qcow2 images, read off their headers alone.

A name that is no plain file, and a layer whose format its overlay's header does not say, are not gone into, as by
libvirt.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from qemu_blkmig.destination.qcow2 import Header, header_of

_LAYERS = 200


def backing_files(path: str, permitted: Callable[[str], bool]) -> tuple[list[str], bool]:
    """All files below the qcow2 image at `path`, and those with the data of it and of them, as far as they can be told.

    And whether that is all there are. Only `permitted` ones are opened.
    """
    found: list[str] = []
    while len(found) < _LAYERS and permitted(path):
        try:
            header = _header(path)
        except (OSError, ValueError):
            break
        if header is None:
            return found, True
        names = [_plain(name) for name in (header.data_file, header.backing)]
        data, below = (os.path.join(os.path.dirname(path), name) if name else None for name in names)  # noqa: PTH118, PTH120 - strings like the rest
        found += [each for each in (data, below) if each is not None]
        if header.data_apart and data is None:
            break
        if not header.backing:
            return found, True
        if below is None:
            break
        if header.format != "qcow2":
            return found, header.format == "raw"
        path = below
    return found, False


def _header(path: str) -> Header | None:
    """Raises what reading and parsing do."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        kind = os.fstat(descriptor).st_mode
        return header_of(descriptor) if stat.S_ISREG(kind) or stat.S_ISBLK(kind) else None
    finally:
        os.close(descriptor)


def _plain(name: str) -> str | None:
    """The path of a file; None where there is none, or it is no plain file."""
    name = name.removeprefix("file:")
    head, colon, _ = name.partition(":")
    return None if not name or "\0" in name or (colon and "/" not in head) else name
