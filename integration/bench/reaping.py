"""An init for a bench: libvirt waits for a QEMU that it ends until that is gone, and a zombie is not.

Containers and small machines often have no process that reaps what is orphaned; hosts of guests have one.
"""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""prctl(2)."""


def go_on_under_an_init() -> None:
    """Return in a child; this process reaps whatever is orphaned below it, and ends when the child does, as it does."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if not child:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        ended, status = os.wait()
        if ended == child:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
