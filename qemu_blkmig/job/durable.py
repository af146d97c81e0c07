"""A small file that is written anew again and again, durably, and never in the event loop: storage may stall.

A coordinator whose loop stood still for it could not tell its watchdog that it lives, nor give a guest back.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from qemu_blkmig.stable import sync_entry


class DurableFile:
    """Versions of the file at `path` come to be in the order in which they were told, by one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=path.stem)

    def write(self, content: bytes, *, synced: bool) -> Future[None]:
        """Have it hold `content`, or what it held before: written aside, synced, renamed, directory synced.

        Not `synced` it outlives any process, and this host only from soon after the future is done: XFS may leave an
        empty file where one that was not synced was renamed. The future raises `OSError`.
        """
        written = self._thread.submit(self._write, content, synced)
        if not synced:
            self._thread.submit(self._sync)
        return written

    def finish(self) -> None:
        """Return when all that was told has been tried."""
        self._thread.submit(lambda: None).result()

    def _write(self, content: bytes, synced: bool) -> None:
        aside = self._path.with_suffix(".new")
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        aside.rename(self._path)
        if synced:
            sync_entry(self._path)

    def _sync(self) -> None:
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        sync_entry(self._path)
