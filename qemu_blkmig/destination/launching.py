"""The QEMU that waits for the guest: launched, identified, asked after and ended, on the host that it runs on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.errors import Refused

START = 30.0
"""Seconds in which a launched QEMU must open its QMP socket."""
OUTPUT = 4000
"""Bytes of a launched process's last output that are shown."""
PATH_LIMIT = 107
"""Bytes of a unix socket's path (unix(7), less the NUL)."""
_POLL = 0.02
_QMP = "qmp"
_PROCESSES, _WAITED = "processes", "waited"
"""Beside the QMP socket: one line of JSON for each process that was launched there; and alone in its directory, for one
that was not launched, but waited for a migration."""
_ANSWER = 1 << 20
"""Bytes of a QMP server's answers that are read."""


@dataclass
class _Launch:
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    directory: Path


class Launcher:
    """Launches QEMUs for the job `job`; each has a directory of its own, with its QMP socket, that outlives us."""

    def __init__(self, job: str | None) -> None:
        self._job = job
        self._latest: _Launch | None = None

    def launch(self, command: str, directory: str) -> tuple[ProcessId, str]:
        """Have a shell wait for `go`; its process and the QMP socket. Raises `Refused`.

        The shell is replaced by the program where the command is just that, so that its process is QEMU's.
        """
        if self._job is None:
            raise Refused("an agent without a job launches nothing")
        place = Path(tempfile.mkdtemp(prefix=private_prefix(self._job, "qemu")))
        qmp = str(place / _QMP)
        try:
            check_socket_path(qmp)
            # With wait=off QEMU 7.2 now and then greets who connects while it starts, and never reads what is said.
            waiting = ["-S", "-incoming", "defer", "-qmp", f"unix:{qmp},server=on,wait=on"]
            script = f'read go && exec </dev/null && {in_place_of_the_shell(command.strip())} "$@"'
            output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the QEMU does
            # Not asyncio's: that kills what still runs when the loop is closed (seen with Python 3.13).
            process = subprocess.Popen(
                ["/bin/sh", "-c", script, "sh", *waiting],
                stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=directory, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            shutil.rmtree(place, ignore_errors=True)
            raise Refused(f"the --launch command cannot be run in {directory}: {error.strerror}") from error
        except Refused:
            shutil.rmtree(place, ignore_errors=True)
            raise
        self._latest = _Launch(process, output, place)
        found = ProcessId.of(process.pid)
        if found is None:
            raise Refused(f"the --launch command's shell ended at once: {self.output()}")
        _note(place / _PROCESSES, found)
        return found, qmp

    async def go(self) -> ProcessId | None:
        """Run the program; the process that listens once it does. Raises `Refused` with what it said."""
        launch = self._latest
        if launch is None or launch.process.stdin is None or launch.process.stdin.closed:
            raise Refused("nothing was launched")
        with contextlib.suppress(BrokenPipeError), launch.process.stdin as stdin:
            stdin.write(b"go\n")
        deadline = asyncio.get_running_loop().time() + START
        while asyncio.get_running_loop().time() < deadline:
            with contextlib.suppress(Refused):
                found = await asyncio.to_thread(listener, str(launch.directory / _QMP))
                if found is not None:
                    _note(launch.directory / _PROCESSES, found)
                return found
            if launch.process.poll() not in (None, 0):
                raise Refused(
                    f"the --launch command ended with status {launch.process.returncode}: {self.output()}",
                    advice="try the command by hand in the destination directory, followed, as we do, by "
                    "-S -incoming defer -qmp unix:SOCKET,server=on,wait=off",
                )
            await asyncio.sleep(_POLL)
        raise Refused(
            f"the --launch command did not open a QMP socket within {START:.0f} s: {self.output()}",
            advice='a wrapper script must pass the arguments on that we append: exec qemu-system-... "$@"',
        )

    def output(self) -> str:
        """What was launched last has said, its last `OUTPUT` bytes, in words."""
        if self._latest is None:
            return "what it said is where its output goes"
        output = self._latest.output
        output.seek(0, os.SEEK_END)
        output.seek(max(0, output.tell() - OUTPUT))
        lines = output.read().decode(errors="replace").strip().splitlines()
        said = "\n".join(line for line in lines if "info: QEMU waiting for connection on:" not in line)
        return f"it said: {said}" if said else "it said nothing"

    def launched(self) -> set[ProcessId]:
        """All that this job has launched here, by us or by agents before us."""
        return self._noted(_PROCESSES)

    def take(self, process: ProcessId) -> None:
        """A QEMU that somebody else has started waits for this job's guest. Raises `OSError`."""
        if self._job is not None and process not in self.waited():
            _note(Path(tempfile.mkdtemp(prefix=private_prefix(self._job, "qemu"))) / _WAITED, process)

    def waited(self) -> set[ProcessId]:
        """All that this job has taken, by us or by agents before us."""
        return self._noted(_WAITED)

    def _noted(self, name: str) -> set[ProcessId]:
        found: set[ProcessId] = set()
        for place in self._places():
            with contextlib.suppress(OSError, msgspec.DecodeError):
                lines = (place / name).read_bytes().splitlines()
                found.update(msgspec.json.decode(line, type=ProcessId) for line in lines)
        return found

    def forget(self) -> None:
        """Remove the directories of all that this job has launched here, and those of agents that were killed.

        A QEMU goes on without its own.
        """
        for place in self._places("qemu", "agent"):
            shutil.rmtree(place, ignore_errors=True)

    def is_ours(self, path: str) -> bool:
        """Whether `path` lies in a directory of what this job launched."""
        return any(Path(os.path.realpath(path)).is_relative_to(os.path.realpath(place)) for place in self._places())

    def _places(self, *kinds: str) -> Iterator[Path]:
        """The directories, if they are ours: anybody may make one of such a name in a directory for all."""
        if self._job is None:
            return
        for kind in kinds or ("qemu",):
            for place in Path(tempfile.gettempdir()).glob(f"{private_prefix(self._job, kind)}*"):
                with contextlib.suppress(OSError):
                    status = place.lstat()
                    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                        yield place


def listener(path: str) -> ProcessId | None:
    """The process that made the listening unix socket at `path` (unix(7), SO_PEERCRED); None: in another namespace.

    Raises `Refused` with what is wrong with the socket.
    """
    with _connected(path) as connection:
        return _peer(connection)


def waiting(path: str) -> ProcessId | None:
    """The QEMU whose QMP socket is at `path`, if it waits for a migration; None: it does not, or does not say so.

    Raises as `listener`.
    """
    with _connected(path) as connection:
        try:
            if connection.recv(1, socket.MSG_PEEK) != b"{":
                return None
            with connection.makefile("rwb") as stream:
                json.loads(stream.readline(_ANSWER))["QMP"]
                for command in ("qmp_capabilities", "query-status"):
                    stream.write(json.dumps({"execute": command}).encode() + b"\n")
                    stream.flush()
                    answer: dict[str, Any] = {"event": ""}
                    while "event" in answer:
                        answer = json.loads(stream.readline(_ANSWER))
                waits = answer["return"]["status"] == "inmigrate"
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return _peer(connection) if waits else None


@contextlib.contextmanager
def _connected(path: str) -> Iterator[socket.socket]:
    check_socket_path(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        try:
            sock.connect(path)
        except FileNotFoundError as error:
            raise Refused(f"there is no QMP socket at {path}") from error
        except ConnectionRefusedError as error:
            what = "no process listens at" if _is_socket(path) else "not a socket:"
            raise Refused(f"{what} {path}", advice="is that QEMU still running?") from error
        except PermissionError as error:
            raise Refused(
                f"no permission to connect to {path}", advice="run as the user that QEMU runs as, or as root"
            ) from error
        except TimeoutError as error:
            raise Refused(
                f"{path} takes no connection",
                advice="a QMP socket serves one client at a time: close the other one, or give QEMU a second -qmp",
            ) from error
        except (OSError, ValueError) as error:
            raise Refused(f"cannot connect to {path}: {error}") from error
        yield sock


def _peer(connection: socket.socket) -> ProcessId | None:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return ProcessId.of(pid) if pid else None


def check_socket_path(path: str) -> None:
    """Raise `Refused` if `path` is too long for a unix socket's address."""
    if len(os.fsencode(path)) > PATH_LIMIT:
        raise Refused(
            f"the path of a socket is {len(os.fsencode(path))} bytes long, more than the {PATH_LIMIT} that a unix "
            f"socket's address can hold: {path}",
            advice="name a shorter directory for temporary files by TMPDIR, or use a symbolic link",
        )


def in_place_of_the_shell(command: str) -> str:
    """`command`, with `exec` where it is just a program and its arguments: no shell then waits beside the QEMU."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.commenters = ""
    try:
        words = list(lexer)
    except ValueError:
        # The shell tells what is wrong with it.
        return command
    compound = "\n" in command or any(set(word) <= set("();<>|&") for word in words)
    return command if compound or not words or shutil.which(words[0]) is None else f"exec {command}"


def program_missing(command: str, directory: str) -> str | None:
    """The program that the launch command begins with, if it is a plain name that cannot be found in `directory`.

    Raises `Refused` if it is no command.
    """
    try:
        program = shlex.split(command)[0]
    except (ValueError, IndexError) as error:
        raise Refused(f"{command!r} is no command") from error
    if "=" in program:
        return None
    look = ["/bin/sh", "-c", 'command -v -- "$1" >/dev/null', "sh", program]
    found = subprocess.run(look, check=False, cwd=directory if Path(directory).is_dir() else None)
    return program if found.returncode else None


def private_prefix(job: str, kind: str) -> str:
    """What the names of private directories of `job` begin with; `kind`: "agent" or "qemu"."""
    return f"blkmig-{job}-{kind}-"


def _note(path: Path, process: ProcessId) -> None:
    with path.open("ab") as file:
        file.write(msgspec.json.encode(process) + b"\n")


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(Path(path).stat().st_mode)
    except OSError:
        return False
