"""What may be done to a migration from outside, by name: processes killed, network and hosts failing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from integration.far import FarLab
from integration.lab import LabError
from integration.luck import Attempt, kill_all
from integration.processes import WATCHDOG, holding

Strike = Callable[[Attempt, ExitStack], bool]
"""Does it, if what it is done to is there (else False); undoing it is left to the stack."""


def strike(fault: str, attempt: Attempt, mending: ExitStack) -> bool:
    """Do `fault`, one of `NEAR` or `FAR`; False if what it would be done to is not there (any more)."""
    if attempt.process.poll() is not None:
        return False
    with contextlib.suppress(LabError, ProcessLookupError):
        return (NEAR | FAR)[fault](attempt, mending)
    return False


def _find(attempt: Attempt, *words: str) -> list[int]:
    return holding(attempt.lab.processes(), *words)


def _signal_tool(attempt: Attempt, number: int) -> bool:
    attempt.signal(number)
    return True


def _kill_both(attempt: Attempt, _: ExitStack) -> bool:
    """Coordinator and watchdog, neither of which may act upon the other's end."""
    attempt.signal(signal.SIGSTOP)
    kill_all(*_find(attempt, WATCHDOG))
    attempt.signal(signal.SIGKILL)
    return True


PIDFD_GETFD = 438
"""The system call (pidfd_getfd(2), Linux 5.6)."""


def _break_nbd(attempt: Attempt, _: ExitStack) -> bool:
    """Shut down the agent's connections to the source's disks, of which nobody is told but by their end."""
    return any(_shut_down(pid, "nbd") for pid in _find(attempt, *attempt.lab.agent_words))


def _shut_down(pid: int, word: str) -> bool:
    """Shut down the connections of process `pid` whose peer's address holds `word`; whether there were any."""
    process = os.pidfd_open(pid)
    try:
        done = False
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if not str(entry.readlink()).startswith("socket:"):
                continue
            descriptor = ctypes.CDLL(None).syscall(PIDFD_GETFD, process, int(entry.name), 0)
            with contextlib.suppress(OSError), socket.socket(fileno=descriptor) as connection:
                if word in str(connection.getpeername()):
                    connection.shutdown(socket.SHUT_RDWR)
                    done = True
        return done
    finally:
        os.close(process)


def _far(attempt: Attempt) -> FarLab:
    lab = attempt.lab
    if not isinstance(lab, FarLab):
        raise LabError("there is no other host")
    return lab


def _cut(attempt: Attempt, mending: ExitStack) -> bool:
    network = _far(attempt).network
    network.down()
    mending.callback(network.up)
    return True


def _cut_for(seconds: float) -> Strike:
    def cut(attempt: Attempt, _: ExitStack) -> bool:
        _far(attempt).network.cut(seconds)
        return True

    return cut


def _lose_packets(attempt: Attempt, _: ExitStack) -> bool:
    with _far(attempt).network.losing(0.2):
        time.sleep(10)
    return True


def _throttle(attempt: Attempt, _: ExitStack) -> bool:
    network = _far(attempt).network
    network.limit(1)
    time.sleep(10)
    network.limit(None)
    return True


def _reset(attempt: Attempt, mending: ExitStack) -> bool:
    mending.enter_context(_far(attempt).network.resetting())
    return True


def _power_off(attempt: Attempt, mending: ExitStack) -> bool:
    hosts = _far(attempt).hosts
    hosts.power_off()
    mending.callback(hosts.boot)
    return True


def _reboot(attempt: Attempt, _: ExitStack) -> bool:
    _far(attempt).hosts.reboot()
    return True


NEAR: dict[str, Strike] = {
    "nothing": lambda _attempt, _mending: True,
    "coordinator": lambda attempt, _: _signal_tool(attempt, signal.SIGKILL),
    "hangup": lambda attempt, _: _signal_tool(attempt, signal.SIGHUP),
    "interrupt": lambda attempt, _: _signal_tool(attempt, signal.SIGINT),
    "agent": lambda attempt, _: kill_all(*_find(attempt, *attempt.lab.agent_words)),
    "watchdog": lambda attempt, _: kill_all(*_find(attempt, WATCHDOG)),
    "both": _kill_both,
    "nbd": _break_nbd,
    "qemu-nbd": lambda attempt, _: kill_all(*_find(attempt, "qemu-nbd")),
    "destination": lambda attempt, _: kill_all(*([attempt.destination.pid] if attempt.destination.running() else [])),
    "source": lambda attempt, _: kill_all(attempt.source.pid),
}
"""On one host or two; "both": coordinator and watchdog; "nbd": the connections over which the disks are read."""
FAR: dict[str, Strike] = {
    "cut": _cut,
    "cut-1": _cut_for(1),
    "cut-30": _cut_for(30),
    "loss": _lose_packets,
    "throttle": _throttle,
    "reset": _reset,
    "sshd": lambda attempt, _: _far(attempt).network.kill_connections() > 0,
    "ssh": lambda attempt, _: kill_all(*_find(attempt, "ssh ", "hostb")),
    "power": _power_off,
    "reboot": _reboot,
}
"""Only with a `FarLab`; "cut-30": for 30 s; "loss": a fifth of all packets, and "throttle": 1 Mbit/s, for 10 s; "cut",
"reset", "power": until what is struck has ended."""
HARMLESS = ("nothing", "cut-1")
"""What a migration outlives."""
