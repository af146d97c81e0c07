"""A process told for certain: by pid and start time, so that a pid that was given anew is never taken for it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

import msgspec


class ProcessId(msgspec.Struct, frozen=True):
    """A process of this machine; `start` is its start time in clock ticks since boot (proc(5), stat field 22)."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has `pid` now; None if there is none or it is a zombie.

        A zombie whose other threads still end is not gone: they hold its files, and QEMU's image locks with them.
        """
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return None
        # Its name may be any bytes: the kernel cuts it, in the midst of a letter, too.
        fields = stat[stat.rindex(")") + 2 :].split()
        threads, start = int(fields[17]), int(fields[19])
        return None if fields[0] in "ZX" and threads <= 1 else cls(pid, start)

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return ProcessId.of(self.pid) == self

    def kill(self, timeout: float, *, group: bool = False) -> bool:
        """End the process by SIGKILL and wait until it is gone; False if it still is there after `timeout` seconds.

        `group`: with it all of its process group, for what we started in a session of its own.
        """
        with contextlib.ExitStack() as stack:
            try:
                pidfd = os.pidfd_open(self.pid)
            except ProcessLookupError:
                return True
            stack.callback(os.close, pidfd)
            if not self.alive:
                return True
            with contextlib.suppress(ProcessLookupError):
                if group:
                    os.killpg(os.getpgid(self.pid), signal.SIGKILL)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(timeout * 1000)
            return not self.alive
