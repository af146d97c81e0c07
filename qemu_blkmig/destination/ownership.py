"""Ownership records: beside an image lies a small file that says whether it is the guest's, or not yet, or no more.

    incoming   being filled by a migration: no guest may start from it
    complete   all had arrived and the guest was handed over (or the copy is complete): history, it hinders nothing
    moved      the guest was migrated away: starting it from here would start it a second time, with old disks

The record of `/d/vm.qcow2` is `/d/.vm.qcow2.blkmig`; links are followed first. A block device's lies in the state
directory (`places.state_directory`), under `devices/`. Which side has a guest is decided by the job's record alone
(`job/settle.py`); these files follow it, so a crash between the two is mended when the job is settled.

libvirt's hook reads these files, too: what it needs for that is in `hooks/qemu.py`, which imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qemu_blkmig.hooks import qemu as hook
from qemu_blkmig.hooks.qemu import Damaged as Damaged
from qemu_blkmig.places import state_directory
from qemu_blkmig.stable import remove_for_good, sync_entry


class Ownership(NamedTuple):
    """What a record says.

    `peer`: where the image comes from (incoming, complete) or went to (moved), as the user knows it. `when`: UTC,
    ISO 8601. `before`: while incoming, what had been recorded of an image that was there already. `domain`, `uuid`:
    libvirt's name and UUID of the guest, where it is one of libvirt's.
    """

    state: str
    job: str
    disk: str
    image: str
    peer: str
    when: str
    before: Mapping[str, Any] | None = None
    domain: str | None = None
    uuid: str | None = None

    def tell(self) -> str:
        """In words, what this means for whoever wants to use the image."""
        return hook.tell(self._asdict())


class Guest(NamedTuple):
    """libvirt's name and UUID of a guest."""

    domain: str
    uuid: str


def path_of(image: str) -> Path:
    """Where the record of an image file or block device is, or would be."""
    return Path(hook.record_path(image, str(state_directory())))


def read(image: str) -> Ownership | None:
    """What is recorded of an image; None: nothing is. Raises `Damaged`, `OSError`."""
    told = hook.read_record(str(path_of(image)))
    return Ownership(**told) if told is not None else None


def announce(image: str, job: str, disk: str, peer: str, guest: Guest | None = None) -> None:
    """Record that `job` is about to fill the image with `disk`, of `guest`. Raises `OSError`."""
    before = None
    with contextlib.suppress(Damaged):
        there = read(image)
        if there is not None:
            before = there.before if there.state == "incoming" and there.job == job else _dump(there)
    _write(_of(Ownership("incoming", job, disk, image, peer, _now(), before), guest))


def complete(image: str, job: str, guest: Guest | None = None) -> bool:
    """Record that the image holds all and is the guest's, `guest`'s where that is known.

    False: it was not `job` that filled it last.
    Safe to repeat. Raises `Damaged`, `OSError`.
    """
    there = read(image)
    if there is None or there.job != job or there.state == "moved":
        return False
    if there.state == "incoming":
        _write(_of(there._replace(state="complete", when=_now(), before=None), guest))
    return True


def move(image: str, job: str, disk: str, peer: str, guest: Guest | None = None) -> None:
    """Record that the guest of the image, `guest`, was migrated away. Safe to repeat. Raises `OSError`."""
    with contextlib.suppress(Damaged):
        there = read(image)
        if there is not None and (there.state, there.job) == ("moved", job):
            return
    _write(_of(Ownership("moved", job, disk, image, peer, _now()), guest))


def withdraw(image: str, job: str | None = None) -> None:
    """Put back what was recorded before `job` (None: any) announced itself: nothing of it was written, or is left.

    Raises `OSError`.
    """
    with contextlib.suppress(Damaged):
        there = read(image)
        if there is None or there.state != "incoming" or job not in (None, there.job):
            return
        if there.before is not None:
            _write(Ownership(**hook.understood(there.before, str(path_of(image)))))
        else:
            remove(image)


def remove(image: str) -> None:
    """Forget the image: it is no more. Raises `OSError`."""
    remove_for_good(path_of(image))


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
    sync_entry(place)


def _of(record: Ownership, guest: Guest | None) -> Ownership:
    return record if guest is None else record._replace(domain=guest.domain, uuid=guest.uuid)


def _dump(record: Ownership) -> dict[str, Any]:
    told = {"version": hook.RECORD_VERSION, **record._asdict()}
    return {name: value for name, value in told.items() if value is not None}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
