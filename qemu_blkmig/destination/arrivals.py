"""QEMUs beside us that wait for a guest that is migrated to them, and were told to go on with an image that we fill."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from qemu_blkmig.destination.process import ProcessId


def waiting(images: Collection[str]) -> set[ProcessId]:
    """Those of them that were started since we were: any before is a guest's that has arrived long ago.

    Told by their command lines, which anybody may read, and which name the images before these are opened.
    """
    ourselves = ProcessId.of(os.getpid())
    names = {
        os.fsencode(form) for image in images for name in (image, os.path.realpath(image)) for form in _forms(name)
    }
    named = re.compile(rb"(?<![^\"=,:])(?:" + rb"|".join(map(re.escape, names)) + rb")(?![^\",])")
    found = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"-incoming" in words and any(map(named.search, words)):
                there = ProcessId.of(int(process.name))
                if there is not None and ourselves is not None and there.start >= ourselves.start:
                    found.add(there)
    return found


def _forms(name: str) -> Iterator[str]:
    """How a command line of QEMU's has a file's name: as it is, with its commas doubled, in JSON."""
    yield name
    yield name.replace(",", ",,")
    for ascii_only in (False, True):
        yield json.dumps(name, ensure_ascii=ascii_only)[1:-1]
