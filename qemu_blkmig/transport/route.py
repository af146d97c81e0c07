"""The processes of ssh that lead to a host. No event loop is needed to start them.

One `ssh` is the connection (ssh_config(5), ControlMaster), which dies with the thread that started it; all others go
through it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import IO

from qemu_blkmig.errors import UsageError
from qemu_blkmig.transport.ciphers import preferred_ciphers
from qemu_blkmig.transport.starting import end, end_group, start

COMMAND_VARIABLE = "QEMU_BLKMIG_SSH"
"""Environment: the ssh to use, with options, as a shell would read it; "ssh" without it."""
CONNECT = 15
"""Seconds in which a host must take a connection."""
ALIVE = 15
"""Seconds of silence after which a connection is given up."""
END = 1.0
"""Seconds in which what ssh has said last is read."""
STANDS = "qemu-blkmig-connected"
_OPTIONS = {
    "BatchMode": "yes",
    "ClearAllForwardings": "yes",
    "ConnectTimeout": str(CONNECT),
    "ControlPersist": "no",
    "ExitOnForwardFailure": "yes",
    "ForkAfterAuthentication": "no",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "LocalCommand": f"echo {STANDS}",
    "PermitLocalCommand": "yes",
    "RemoteCommand": "none",
    "ServerAliveCountMax": "3",
    "ServerAliveInterval": str(ALIVE // 3),
    "SessionType": "none",
    "Tunnel": "no",
}


def ssh_command() -> list[str]:
    """The user's ssh, with the options that it is to have. Raises `UsageError`."""
    try:
        return shlex.split(os.environ.get(COMMAND_VARIABLE, "")) or ["ssh"]
    except ValueError as error:
        raise UsageError(f"{COMMAND_VARIABLE} is no command line: {error}") from error


CONTROL_LIMIT = 107 - 17
"""Most bytes of a control socket's path: ssh appends some while it makes it (sun_path holds 107, and a zero)."""


class Route:
    """The way by ssh to the agents on `host`."""

    def __init__(self, host: str, user: str | None, port: int | None, remote_command: str) -> None:
        """`remote_command`: how qemu-blkmig is called there, in words of the login shell."""
        self.host = host
        self.remote_command = remote_command
        self._account = [*(["-l", user] if user else []), *(["-p", str(port)] if port else [])]
        self._ssh = ssh_command()

    def ciphers(self) -> list[str]:
        """Options by which the connection prefers quick ciphers. Blocks a moment."""
        return preferred_ciphers(self._ssh, self._account, self.host)

    def start_connection(self, control: str, ciphers: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start to connect; what goes through the connection finds it by the path `control`. Raises `OSError`.

        Once it stands it says `STANDS` on its stdout.
        """
        options = [word for name, value in _OPTIONS.items() for word in ("-o", f"{name}={value}")]
        return start(
            [
                "setpriv", "--pdeathsig", "KILL", *self._ssh, "-M", "-N", "-T", "-a", "-x", "-S", control,
                *options, *ciphers, *self._account, "--", self.host,
            ],
            # LocalCommand is run by it; an account without a login shell would have none.
            env=os.environ | {"SHELL": "/bin/sh"},
        )  # fmt: skip

    def start_agent(self, control: str) -> subprocess.Popen[bytes]:
        """Start what leads to an agent; it goes through the connection, and makes none of its own. Raises `OSError`."""
        never = ["-o", "ControlMaster=no", "-o", "ProxyCommand=false", "-o", "BatchMode=yes"]
        never += ["-o", "ClearAllForwardings=yes", "-o", "RemoteCommand=none", "-o", "SessionType=default"]
        words = ["-T", "--", self.host, f"{self.remote_command} receive"]
        return start([*self._ssh, "-a", "-x", "-S", control, *never, *words])

    def forward(self, control: str, direction: str, paths: str) -> list[str]:
        """The command that forwards a socket through the connection."""
        return [*self._ssh, "-S", control, "-O", "forward", direction, paths, "--", self.host]


class BegunConnection:
    """A connection that is being made, and the first agent in it, which is started as soon as it stands."""

    def __init__(self, route: Route, control: str) -> None:
        """Raises `OSError`."""
        self.control = control
        self.stands: Future[bool] = Future()
        """Whether it came to stand; nobody else may read its stdout before."""
        self.agent: subprocess.Popen[bytes] | None = None
        """Known once it stands; None where it could not be started."""
        self.connection = route.start_connection(control, route.ciphers())
        self._thread = threading.Thread(target=self._follow, args=(route,), daemon=True)
        self._thread.start()

    def _follow(self, route: Route) -> None:
        stands = _says_stands(self.connection.stdout)
        try:
            if stands:
                self.agent = route.start_agent(self.control)
        except OSError:
            self.agent = None
        finally:
            self.stands.set_result(stands)

    def end(self) -> None:
        """End all of it; nobody has taken it over."""
        end_group(self.connection.pid)
        self._thread.join(timeout=END)
        for process in (self.connection, self.agent):
            if process is not None:
                end(process)


def _says_stands(stdout: IO[bytes] | None) -> bool:
    """Wait for that word; False: all was said, or `stdout` was closed."""
    with contextlib.suppress(OSError, ValueError):
        return stdout is not None and any(line.strip() == STANDS.encode() for line in stdout)
    return False
