"""When a process that we have started ends: told by the event loop, without a thread that waits and without a poll."""

from __future__ import annotations

import asyncio
import os
import subprocess


async def ended(process: subprocess.Popen[bytes]) -> int:
    """Return, with its exit status, when `process` has ended."""
    if (status := process.poll()) is not None:
        return status
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Its id is no other's, because it was not waited for yet.
    descriptor = os.pidfd_open(process.pid)
    loop.add_reader(descriptor, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return process.wait()
