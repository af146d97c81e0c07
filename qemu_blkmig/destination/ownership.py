"""Ownership records: beside an image lies a small file that says whether it is the guest's, or not yet, or no more.

    incoming   being filled by a migration: no guest may start from it
    complete   all had arrived and the guest was handed over (or the copy is complete): history, it hinders nothing
    moved      the guest was migrated away: starting it from here would start it a second time, with old disks

The record of `/d/vm.qcow2` is `/d/.vm.qcow2.blkmig`; links are followed first. A block device's lies in the state
directory (`places.state_directory`), under `devices/`. Which side has a guest is decided by the job's record alone
(`job/settle.py`); these files follow it, so a crash between the two is mended when the job is settled.

The standard library only, and little of it: libvirt's hook reads these files and must start within 50 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from qemu_blkmig.places import state_directory

VERSION = 1
STATES = ("incoming", "complete", "moved")


class Damaged(ValueError):
    """A record that cannot be understood; the text names it."""


class Ownership(NamedTuple):
    """What a record says.

    `peer`: where the image comes from (incoming, complete) or went to (moved), as the user knows it. `when`: UTC,
    ISO 8601. `before`: while incoming, what had been recorded of an image that was there already.
    """

    state: str
    job: str
    disk: str
    image: str
    peer: str
    when: str
    before: Mapping[str, Any] | None = None

    def tell(self) -> str:
        """In words, what this means for whoever wants to use the image."""
        match self.state:
            case "incoming":
                return f"{self.image} is incomplete: job {self.job} was filling it from {self.peer} ({self.when})"
            case "moved":
                return f"{self.image} is old: job {self.job} moved its guest away to {self.peer} ({self.when})"
        return f"{self.image} was filled completely by job {self.job} from {self.peer} ({self.when})"


def path_of(image: str) -> Path:
    """Where the record of an image file or block device is, or would be."""
    real = Path(os.path.realpath(image))
    with contextlib.suppress(OSError):
        if stat.S_ISBLK(real.stat().st_mode):
            return _path_of_device(image, real)
    return real.with_name(f".{real.name}.blkmig")


def read(image: str) -> Ownership | None:
    """What is recorded of an image; None: nothing is. Raises `Damaged`, `OSError`."""
    place = path_of(image)
    try:
        told = json.loads(place.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Damaged(f"the ownership record {place} cannot be read: {error}") from error
    return _understood(told, place)


def announce(image: str, job: str, disk: str, peer: str) -> None:
    """Record that `job` is about to fill the image with `disk`. Raises `OSError`."""
    before = None
    with contextlib.suppress(Damaged):
        there = read(image)
        if there is not None:
            before = there.before if there.state == "incoming" and there.job == job else _dump(there)
    _write(Ownership("incoming", job, disk, image, peer, _now(), before))


def complete(image: str, job: str) -> bool:
    """Record that the image holds all and is the guest's; False: it was not `job` that filled it last.

    Safe to repeat. Raises `Damaged`, `OSError`.
    """
    there = read(image)
    if there is None or there.job != job or there.state == "moved":
        return False
    if there.state == "incoming":
        _write(there._replace(state="complete", when=_now(), before=None))
    return True


def move(image: str, job: str, disk: str, peer: str) -> None:
    """Record that the guest of the image was migrated away. Safe to repeat. Raises `OSError`."""
    with contextlib.suppress(Damaged):
        there = read(image)
        if there is not None and (there.state, there.job) == ("moved", job):
            return
    _write(Ownership("moved", job, disk, image, peer, _now()))


def withdraw(image: str, job: str | None = None) -> None:
    """Put back what was recorded before `job` (None: any) announced itself: nothing of it was written, or is left.

    Raises `OSError`.
    """
    with contextlib.suppress(Damaged):
        there = read(image)
        if there is None or there.state != "incoming" or job not in (None, there.job):
            return
        if there.before is not None:
            _write(_understood(there.before, path_of(image)))
        else:
            remove(image)


def remove(image: str) -> None:
    """Forget the image: it is no more. Raises `OSError`."""
    place = path_of(image)
    try:
        place.unlink()
    except FileNotFoundError:
        return
    _sync(place.parent)


def _path_of_device(image: str, real: Path) -> Path:
    """A device has many names, and links to it come and go: one record, whichever name it was written under."""
    devices = _devices()
    with contextlib.suppress(OSError, ValueError):
        for place in sorted(devices.glob("*.blkmig")):
            if os.path.realpath(json.loads(place.read_bytes()).get("image", "")) == str(real):
                return place
    return devices / f"{quote(image, safe='')}.blkmig"


def _devices() -> Path:
    return state_directory() / "devices"


def _write(record: Ownership) -> None:
    place = path_of(record.image)
    if place.parent == _devices():
        place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    aside = place.with_name(f"{place.name}.new")
    try:
        with aside.open("w") as file:
            json.dump(_dump(record), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        aside.rename(place)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    _sync(place.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dump(record: Ownership) -> dict[str, Any]:
    told = {"version": VERSION, **record._asdict()}
    if record.before is None:
        del told["before"]
    return told


def _understood(told: Any, place: Path) -> Ownership:
    if not isinstance(told, dict) or told.get("version") != VERSION or told.get("state") not in STATES:
        raise Damaged(f"the ownership record {place} is of a form that is not known here")
    words: dict[str, Any] = {name: told.get(name) for name in Ownership._fields if name != "before"}
    if not all(isinstance(word, str) for word in words.values()):
        raise Damaged(f"the ownership record {place} lacks something")
    before = told.get("before")
    return Ownership(**words, before=before if isinstance(before, dict) else None)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
