"""The destination's QEMU: started by us or already waiting, with a disk for each that is migrated."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from qemu_blkmig.errors import BlkmigError, ConnectionLost, DestinationFailed, Refused
from qemu_blkmig.job.process import ProcessId
from qemu_blkmig.job.record import Job
from qemu_blkmig.qmp.disks import Disk, Inventory, inventory
from qemu_blkmig.qmp.monitor import Monitor

WHO = "destination QEMU"
START = 30.0
"""Seconds in which a launched QEMU must open its QMP socket."""
OUTPUT = 4000
"""Bytes of a failed QEMU's last output that are shown."""


class TargetQemu:
    """A QEMU that waits for a migration; once claimed, it never starts the guest by itself (see `settle`)."""

    def __init__(self, monitor: Monitor, process: ProcessId | None, output: IO[bytes] | None) -> None:
        self.monitor = monitor
        self.process = process
        self._output = output

    @classmethod
    async def attach(cls, path: str) -> TargetQemu:
        """The QEMU that already waits at the QMP socket `path`. Raises `Refused` if it doesn't wait."""
        monitor = await Monitor.connect(path, who=WHO)
        try:
            return await cls._waiting(monitor, None)
        except BaseException:
            await monitor.close()
            raise

    @classmethod
    async def launch(cls, job: Job, command: str, directory: Path) -> TargetQemu:
        """Run the shell command, with what makes QEMU wait for us appended. Raises `Refused` with what it said.

        A process id is in the job's record before the program runs: the shell waits for our word. Once QEMU answers,
        the record names QEMU itself, whatever the command did in between.
        """
        qmp = job.runtime / "target.qmp"
        output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the QEMU does
        waiting = ["-S", "-incoming", "defer", "-qmp", f"unix:{qmp},server=on,wait=off"]
        script = f'read go && exec </dev/null && {in_place_of_the_shell(command.strip())} "$@"'
        # Not asyncio's: that kills what still runs when the loop is closed (seen with Python 3.13).
        process = await asyncio.to_thread(
            subprocess.Popen, ["/bin/sh", "-c", script, "sh", *waiting],
            stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=directory, start_new_session=True,
        )  # fmt: skip
        job.record.target_launched = True
        job.record.target_qmp = str(qmp)
        job.record.target_process = ProcessId.of(process.pid)
        job.save()
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(b"go\n")
        monitor = await cls._connect(qmp, process, output)
        target = await cls._waiting(monitor, output)
        job.record.target_process = target.process or job.record.target_process
        job.save()
        return target

    @classmethod
    async def _connect(cls, qmp: Path, process: subprocess.Popen[bytes], output: IO[bytes]) -> Monitor:
        deadline = asyncio.get_running_loop().time() + START
        while asyncio.get_running_loop().time() < deadline:
            if qmp.exists():
                with contextlib.suppress(Refused, ConnectionLost):
                    return await Monitor.connect(str(qmp), who=WHO)
            if process.poll() not in (None, 0):
                raise Refused(
                    f"the --launch command ended with status {process.returncode}: {_tail(output)}",
                    advice="try the command by hand in the destination directory; we append "
                    "-S -incoming defer -qmp unix:SOCKET,server=on,wait=off",
                )
            await asyncio.sleep(0.02)
        raise Refused(
            f"the --launch command did not open a QMP socket within {START:.0f} s: {_tail(output)}",
            advice='a wrapper script must pass the arguments on that we append: exec qemu-system-... "$@"',
        )

    @classmethod
    async def _waiting(cls, monitor: Monitor, output: IO[bytes] | None) -> TargetQemu:
        status = await monitor.execute("query-status")
        if status["status"] != "inmigrate":
            raise Refused(
                f"the {WHO} does not wait for a migration (run state {status['status']})",
                advice="start it with -incoming defer",
            )
        pid = monitor.peer_pid
        return cls(monitor, ProcessId.of(pid) if pid else None, output)

    async def inventory(self) -> Inventory:
        """The disks that it waits with."""
        return await inventory(self.monitor)

    async def claim(self) -> None:
        """From now on the guest starts here only when we say so: `stop` clears a waiting QEMU's autostart."""
        await self.monitor.execute("stop")

    async def start_guest(self) -> None:
        """Let the guest run here. Its return is the proof that the disks could be activated (FACTS.md)."""
        await self.monitor.execute("cont")

    def describe(self, error: BlkmigError) -> DestinationFailed:
        """`error` with what the QEMU last said, where we can hear it."""
        if self._output is None:
            return DestinationFailed(f"{error}; what it said is where its output goes")
        return DestinationFailed(f"{error}; {_tail(self._output)}")

    async def close(self) -> None:
        """Let go of it; it runs on."""
        await self.monitor.close()
        if self._output is not None:
            self._output.close()


def counterpart(disk: Disk, candidates: Sequence[Disk]) -> Disk | None:
    """The destination's disk for `disk`: the same device of the guest, told by its qdev path, else by its drive id."""
    for key in ("qdev", "device", "name"):
        own = getattr(disk, key)
        found = [other for other in candidates if own and getattr(other, key) == own]
        if len(found) == 1:
            return found[0]
    return None


def _tail(output: IO[bytes]) -> str:
    output.seek(0, 2)
    output.seek(max(0, output.tell() - OUTPUT))
    said = output.read().decode(errors="replace").strip()
    return f"it said: {said}" if said else "it said nothing"


def in_place_of_the_shell(command: str) -> str:
    """`command`, with `exec` where it is just a program and its arguments: no shell then waits beside the QEMU."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.commenters = ""
    words = list(lexer)
    compound = "\n" in command or any(set(word) <= set("();<>|&") for word in words)
    return command if compound or shutil.which(words[0]) is None else f"exec {command}"


def program_missing(command: str) -> str | None:
    """The program that the launch command begins with, if it is a plain name that cannot be found."""
    program = shlex.split(command)[0]
    if "=" in program:
        return None
    found = subprocess.run(["/bin/sh", "-c", 'command -v -- "$1" >/dev/null', "sh", program], check=False)
    return program if found.returncode else None
