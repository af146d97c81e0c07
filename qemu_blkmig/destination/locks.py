"""Who has an image open: QEMU's image locks, and the job lock that keeps two agents off one image.

Locks belong to the open file description and vanish with it, so a killed agent leaves none behind
(FACTS.md, "Image locks of QEMU").
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

_FLOCK = "hhqqi4x"
_WRITES = 101
_SHARES_NO_WRITING = 201
JOB = 1000
"""The byte that an agent locks of the image that it fills."""
_QEMUS = range(100, 300)
"""All bytes that QEMU locks, for what it does (100 on) and for what it lets nobody do (200 on)."""


def lock_job(descriptor: int) -> bool:
    """Claim the image for this agent until `descriptor` (open for writing) is closed; False if another has it."""
    return _set(descriptor, fcntl.F_WRLCK, JOB)


def lock_as_writer(descriptor: int) -> bool:
    """Keep every QEMU from writing the image, until `descriptor` (open for reading) is closed.

    False, and nothing is held, if a QEMU or another such writer has the image open for writing. Byte 200 is never
    touched: a QEMU with `-incoming` needs it.
    """
    taken = _set(descriptor, fcntl.F_RDLCK, _WRITES) and _set(descriptor, fcntl.F_RDLCK, _SHARES_NO_WRITING)
    if taken and not (_held_elsewhere(descriptor, _WRITES) or _held_elsewhere(descriptor, _SHARES_NO_WRITING)):
        return True
    for byte in (_WRITES, _SHARES_NO_WRITING):
        _set(descriptor, fcntl.F_UNLCK, byte)
    return False


def lock_as_reader(descriptor: int) -> bool:
    """Keep every QEMU from writing the image, which is only read here, until `descriptor` is closed.

    False, and nothing is held, if a QEMU or a writer that locks like it has the image open for writing.
    """
    if _set(descriptor, fcntl.F_RDLCK, _SHARES_NO_WRITING) and not _held_elsewhere(descriptor, _WRITES):
        return True
    _set(descriptor, fcntl.F_UNLCK, _SHARES_NO_WRITING)
    return False


def in_use(path: str | Path) -> bool:
    """Whether a QEMU (or one who locks like it) has the image open as an active writer. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _held_elsewhere(descriptor, _WRITES)
    finally:
        os.close(descriptor)


def in_use_by_job(path: str | Path) -> bool:
    """Whether an agent has claimed the image. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _held_elsewhere(descriptor, JOB)
    finally:
        os.close(descriptor)


def used(path: str | Path) -> bool:
    """Whether a QEMU (or one who locks like it) has the image open in whatever way, reading too. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _QEMUS.start, len(_QEMUS), 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
        return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(descriptor)


def _set(descriptor: int, kind: int, byte: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _held_elsewhere(descriptor: int, byte: int) -> bool:
    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
