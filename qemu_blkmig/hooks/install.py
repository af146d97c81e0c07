"""Puts the hook where libvirt looks for it, beside the hooks that are there; and takes it away again.

libvirt runs `qemu`, and since 6.5 then all executable files of `qemu.d/` in order, each with the XML that the one
before it printed. It looks for them when it starts, or reloads its configuration: the first hook of all counts only
from then on (seen with 9.0). Older ones know `qemu` only: then a hook that is there is set aside, and run by ours.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import msgspec

from qemu_blkmig.errors import Refused
from qemu_blkmig.hooks import qemu as hook
from qemu_blkmig.places import state_directory

DIRECTORY = Path("/etc/libvirt/hooks")
NAME = "50-qemu-blkmig"
ASIDE = "qemu.before-qemu-blkmig"
_MARK = "libvirt's hook of qemu-blkmig"
_DAEMONS = ("virtqemud", "libvirtd")
_DIRECTORIES_SINCE = (6, 5)


class Standing(msgspec.Struct, frozen=True):
    """How the hook stands. `path`: where it is. `current`: it is this version's. `before`: the hook that it runs first.

    `others`: hooks of others. `notes`: what is to be done, or known.
    """

    installed: bool
    path: str | None
    current: bool
    state_directory: str | None
    before: str | None
    others: list[str]
    notes: list[str] = []


def install(directory: Path = DIRECTORY, *, way: Literal["auto", "directory", "chain"] = "auto") -> Standing:
    """Install the hook, or bring it up to date. Raises `Refused` where that does not work; then all is as before."""
    there = _ours(directory)
    alone = not (any(_executables(directory)) or there)
    chain = way == "chain" or (way == "auto" and not _has_directories(directory))
    place = there or (directory / "qemu" if chain else directory / "qemu.d" / NAME)
    chained = place == directory / "qemu"
    aside = directory / ASIDE
    try:
        place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            if chained and os.path.lexists(place) and there is None:
                if os.path.lexists(aside):
                    raise Refused(f"{aside} is in the way", advice="look at it, and move it elsewhere")
                # A link: at no moment is there no hook at `qemu`.
                os.link(place, aside, follow_symlinks=False)
                undo.callback(aside.unlink)
            _write(place, aside if chained and os.path.lexists(aside) else None)
            undo.pop_all()
    except OSError as error:
        raise Refused(f"the hook cannot be installed in {directory}: {error}") from error
    found = status(directory)
    note = "libvirt has had no hook until now: `systemctl reload libvirtd` (or virtqemud) makes it look for hooks"
    return msgspec.structs.replace(found, notes=[*([note] if alone else []), *found.notes])


def remove(directory: Path = DIRECTORY) -> Standing:
    """Take the hook away; one that was set aside is put back. Raises `Refused`."""
    place = _ours(directory)
    if place is not None:
        aside = directory / ASIDE
        try:
            if place == directory / "qemu" and os.path.lexists(aside):
                aside.rename(place)
            else:
                place.unlink()
                with contextlib.suppress(OSError):
                    if place.parent != directory:
                        place.parent.rmdir()
        except OSError as error:
            raise Refused(f"{place} cannot be removed: {error}") from error
    return status(directory)


def status(directory: Path = DIRECTORY) -> Standing:
    """How the hook stands."""
    place = _ours(directory)
    others = [str(path) for path in _executables(directory) if path != place]
    if place is None:
        return Standing(False, None, False, None, None, others)
    text = place.read_text(errors="replace")
    state, before = _setting(text, "STATE"), _setting(text, "BEFORE")
    current = _body(text) == _body(Path(hook.__file__).read_text())
    notes = [] if current else ["it is another version's: `qemu-blkmig hooks install` brings it up to date"]
    if not os.access(place, os.X_OK):
        notes.append(f"{place} is not executable: libvirt does not run it")
    if state != str(state_directory()):
        notes.append(f"it looks into {state} for block devices and expected domains, but jobs here use "
                     f"{state_directory()}")  # fmt: skip
    if before and not os.access(before, os.X_OK):
        notes.append(f"the hook that was there before, {before}, is gone: it is not run")
    return Standing(True, str(place), current, state, before or None, others, notes)


def _ours(directory: Path) -> Path | None:
    for path in (directory / "qemu.d" / NAME, directory / "qemu", *sorted(directory.glob("qemu.d/*"))):
        with contextlib.suppress(OSError):
            if path.is_file() and _MARK in path.read_text(errors="replace")[:200]:
                return path
    return None


def _executables(directory: Path) -> list[Path]:
    candidates = [directory / "qemu", *sorted(directory.glob("qemu.d/*"))]
    return [path for path in candidates if path.is_file() and os.access(path, os.X_OK)]


def _has_directories(directory: Path) -> bool:
    """Whether libvirt looks into `qemu.d`: it tells nothing but its version."""
    for daemon in _DAEMONS:
        try:
            told = subprocess.run([daemon, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):
            continue
        if found := re.search(r"\b(\d+)\.(\d+)\.\d+", told):
            return (int(found[1]), int(found[2])) >= _DIRECTORIES_SINCE
    return (directory / "qemu.d").is_dir()


def _text(before: Path | None) -> str:
    text = Path(hook.__file__).read_text()
    for name, value in (("STATE", str(state_directory())), ("BEFORE", str(before) if before else "")):
        head, tail = re.split(rf"^{name} = .*$", text, maxsplit=1, flags=re.MULTILINE)
        text = f"{head}{name} = {value!r}{tail}"
    return re.sub(r"^#!.*", f"#!{_interpreter()} -IS", text, count=1)


def _interpreter() -> str:
    usual = "/usr/bin/python3"
    return usual if os.access(usual, os.X_OK) else os.path.realpath(sys.executable)


def _setting(text: str, name: str) -> str:
    found = re.search(rf"^{name} = (['\"])(.*)\1$", text, re.MULTILINE)
    return found[2] if found else ""


def _body(text: str) -> str:
    return re.sub(r"^(#!|STATE = |BEFORE = ).*$", "", text, flags=re.MULTILINE)


def _write(place: Path, before: Path | None) -> None:
    """Write it aside, see that it runs (but not what it runs), put it in place at once. Raises `Refused`, `OSError`."""
    # libvirt runs whatever is executable in qemu.d.
    aside = (place.parent.parent if place.parent.name == "qemu.d" else place.parent) / ".qemu-blkmig-hook.new"
    try:
        aside.write_text(_text(None))
        aside.chmod(0o755)
        words = ["none", "reconnect", "begin", "-"]
        tried = subprocess.run([aside, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if tried.returncode:
            raise Refused(f"the hook does not run here: {tried.stderr.strip()}")
        aside.write_text(_text(before))
        aside.rename(place)
    finally:
        aside.unlink(missing_ok=True)
