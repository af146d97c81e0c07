"""Has the kernel write an image's pages out beside the copying, so that a flush finds little left to do.

Left to itself the kernel keeps what was written in memory until a flush or a limit of its own comes; storage is then
idle while data arrives, and busy while the copying waits.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

STRETCH = 8 << 20
"""Bytes written between two calls: long enough to be written in one go, short against what a flush waits for."""

_WRITE = 2  # SYNC_FILE_RANGE_WRITE of <linux/fs.h>


def begin_writing(descriptor: int) -> None:
    """Have the kernel begin to write what it holds; what it cannot write is told by the next flush."""
    whole = ctypes.c_int64(0)
    ctypes.CDLL(None).sync_file_range(descriptor, whole, whole, _WRITE)


class WriteBack:
    """Of the file or block device that `descriptor` is open on; it keeps a duplicate until `stop`.

    It starts writing only; what is stable is for fsync alone to say. A thread does it, because the call blocks while
    the device's queue is full.
    """

    def __init__(self, descriptor: int, begin: Callable[[int], None] = begin_writing) -> None:
        self._descriptor = os.dup(descriptor)
        self._begin = begin
        self._unstarted = 0
        self._wanted = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="write-back", daemon=True)
        self._thread.start()

    def wrote(self, count: int) -> None:
        """`count` bytes more are in the page cache."""
        self._unstarted += count
        if self._unstarted >= STRETCH:
            self._unstarted = 0
            self._wanted.set()

    def stop(self) -> None:
        """Nothing is begun any more."""
        self._stopping = True
        self._wanted.set()
        self._thread.join()
        os.close(self._descriptor)

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            # First: an end that is told from now on sets it again.
            self._wanted.clear()
            if self._stopping:
                return
            self._begin(self._descriptor)
