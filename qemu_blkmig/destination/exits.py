"""When a process that we have started ends: told by the event loop, without a thread that waits."""

from __future__ import annotations

import asyncio
import os
import subprocess

LOOK = 0.1
"""Seconds between two looks where no descriptor is to be had."""


async def ended(process: subprocess.Popen[bytes]) -> int:
    """Return, with its exit status, when `process` has ended."""
    if (status := process.poll()) is not None:
        return status
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        # Its id is no other's, because it was not waited for yet.
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        while process.poll() is None:  # noqa: ASYNC110 - nothing tells without one
            await asyncio.sleep(LOOK)
        return process.wait()
    loop.add_reader(descriptor, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return process.wait()
