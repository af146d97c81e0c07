"""One migration that a test does its worst to, and the judges of what became of the guest."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import replace

from integration.lab import Disk, Format, Guest, Hardware, Lab, LabError, leftovers_in_qemu, wait_until
from integration.listened import Listened, held_at
from integration.processes import WATCHDOG, holding
from integration.tool import COMMAND, Outcome, assert_nothing_left, assert_writes_soundly
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20
SLOW = ("--bandwidth", "4M", "--granularity", "4k")
"""Bulk and RAM take seconds on the bench's guest, and rounds still converge."""


class Attempt(Listened):
    """A running `migrate` (or another command); its stderr is read as it comes.

    `hold`: the moment (integration.held) at which it is to be held; `block`: with its event loop blocked.
    """

    def __init__(
        self,
        lab: Lab,
        source: Guest,
        *options: object,
        hold: str | None = None,
        block: bool = False,
        launch: bool = True,
        verb: str = "migrate",
    ) -> None:
        self.lab = lab
        self.source = source
        self.destination = lab.destination(source)
        for left in (self.destination.serial, self.destination.pid_file):
            left.unlink(missing_ok=True)
        go = lab.directory / "go"
        command = [*lab.entering, *(COMMAND if hold is None else held_at(hold, go, block=block))]
        # A busy machine is no stall, and would hunt for the usual downtime for minutes. From one more than a second the
        # last round would be given more than its 10 s. Of two such options the last counts.
        calm = ("--max-rounds", "1000", "--downtime", "1000")
        command += [verb, f"qmp:{source.qmp}", lab.place, "--progress=json", *calm]
        if launch:
            command += ["--launch", source.launch_command(lab.target)]
        super().__init__([*command, *map(str, options)], go)

    def child(self, *words: str) -> int:
        """The pid of a process of this test whose command line holds all the words."""
        found: list[int] = []

        def is_there() -> bool:
            found[:] = holding(self.lab.processes(), *words)
            return bool(found)

        wait_until(is_there, f"a process with {words}", 10)
        return found[0]

    def agent(self) -> int:
        """The pid of the agent at the destination."""
        return self.child(*self.lab.agent_words)

    def watchdog(self) -> int:
        """The pid of the watchdog."""
        return self.child(WATCHDOG)

    def job(self) -> str:
        """The job's name."""
        return next(path.parent.name for path in self.lab.state.glob("*/record.json"))

    def assert_source_has_it(self) -> None:
        """Assert that the guest runs on at the source, soundly, never ran at the destination, and nothing is left."""
        assert not self.destination.running(), "the destination QEMU is still there"
        assert "blkmig ack" not in self.destination.console(), "the guest ran at the destination"
        assert_writes_soundly(self.source)
        assert_nothing_left(self.lab, self.source)
        assert not list(self.lab.target.iterdir()), "images were left at the destination"

    def assert_given_up(self, *, suspended: bool) -> None:
        """Assert that the guest is at the source as ever, and the job gone, or suspended, and then given up, too."""
        if suspended:
            self.assert_suspended()
        else:
            self.assert_source_has_it()

    def assert_suspended(self) -> None:
        """Assert that the guest runs on at the source, soundly, and the job waits to be resumed; then give it up."""
        assert not self.destination.running(), "the destination QEMU is still there"
        assert "blkmig ack" not in self.destination.console(), "the guest ran at the destination"
        assert_writes_soundly(self.source)
        job = self.job()
        assert "suspended" in command("jobs", lab=self.lab).stdout
        assert list(self.lab.target.iterdir()), "nothing was kept"
        command("cleanup", job, lab=self.lab).succeeded()
        self.assert_source_has_it()

    def assert_destination_has_it(self) -> None:
        """Assert that the source QEMU is gone, and the guest runs soundly at the destination; end it."""
        wait_until(lambda: not self.source.running(), "the end of the source QEMU", 20)
        assert_writes_soundly(self.destination)
        assert_nothing_left(self.lab, self.destination)
        self.destination.kill()


class Bench:
    """A laboratory whose guest is shared by tests that must leave it running; a new one is booted where it is not."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._guest: Guest | None = None
        self._kind = ""

    def guest(self, kind: str = "raw") -> Guest:
        """A guest that writes to a disk of 16 MiB.

        `kind`: raw or qcow2; scsi: raw, and a second disk that can be unplugged; quits: raw, and its QEMU ends when it
        is powered off.
        """
        if self._guest is None or kind != self._kind or not self._is_well(self._guest):
            self._tidy()
            self._kind = kind
            self._guest = self.lab.boot(self._disks(kind), Orders(rate=100, span=4 * MIB), self._hardware(kind))
            self._guest.wait_for_writing()
        return self._guest

    def _disks(self, kind: str) -> list[Disk]:
        number = len(self.lab.guests)
        form: Format = "qcow2" if kind == "qcow2" else "raw"
        disks = [self.lab.disk(f"disk{number}", 16 * MIB, form, data=[(8 * MIB, 4 * MIB)])]
        if kind == "scsi":
            disks.append(replace(self.lab.disk(f"second{number}", MIB), bus="scsi"))
        return disks

    def _hardware(self, kind: str) -> Hardware:
        actions = "panic=pause" if kind == "quits" else "panic=pause,shutdown=pause"
        return Hardware(extra=("-action", actions, "-device", "pvpanic-pci"))

    def _is_well(self, guest: Guest) -> bool:
        with contextlib.suppress(LabError):
            settled = not self.lab.processes() and not list(self.lab.state.glob("*/record.json"))
            return guest.running() and guest.status() == "running" and settled and not leftovers_in_qemu(guest)
        return False

    def _tidy(self) -> None:
        """What a failed test left must not fail the next one."""
        for guest in self.lab.guests:
            with contextlib.suppress(LabError):
                guest.kill()
        for pid in self.lab.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.lab.put_in_order()

    def attempt(self, *options: object, kind: str = "raw", hold: str | None = None, block: bool = False) -> Attempt:
        """Start to migrate the guest."""
        return Attempt(self.lab, self.guest(kind), *options, hold=hold, block=block)

    def attempt_at(self, moment: str, *options: object, kind: str = "raw") -> Attempt:
        """Start to migrate the guest; it has come to `moment`: "bulk", in mid-copy, or one of integration.held."""
        if moment == "bulk":
            attempt = self.attempt("--bandwidth", "1M", *options, kind=kind)
            attempt.wait_copying()
        else:
            attempt = self.attempt(*SLOW if moment == "moving RAM" else (), *options, kind=kind, hold=moment)
            attempt.wait_held()
        return attempt


def kill(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)


def kill_all(*pids: int) -> bool:
    """Kill them; whether any was still there: the end of one may be another's, too."""
    killed = False
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed = True
    return killed


def command(*arguments: str, lab: Lab | None = None) -> Outcome:
    """Run another command of the tool, such as `jobs`; on the source's host of `lab`."""
    enter = lab.entering if lab is not None else ()
    done = subprocess.run([*enter, *COMMAND, *arguments], capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)
