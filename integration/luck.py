"""One migration that a test does its worst to, and the judges of what became of the guest."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from integration.lab import Disk, Format, Guest, Hardware, Lab, LabError, leftovers_in_qemu, wait_until
from integration.tool import COMMAND, Outcome, assert_nothing_left, assert_writes_soundly
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20
PHASES = ("prepare", "bulk", "dirty", "ram", "switchover", "verify", "handover")
SLOW = ("--bandwidth", "4M", "--granularity", "4k")
"""Bulk and RAM take seconds on the bench's guest, and rounds still converge."""


class Attempt:
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
        self._go = lab.directory / "go"
        self._go.unlink(missing_ok=True)
        command = [*lab.entering, *COMMAND]
        if hold is not None:
            held = ("integration.held", hold, "block" if block else "hold", str(self._go))
            command = [*lab.entering, sys.executable, "-m", *held]
        # A busy machine is no stall; of two such options the last counts.
        command += [verb, f"qmp:{source.qmp}", lab.place, "--progress=json", "--max-rounds", "1000"]
        if launch:
            command += ["--launch", source.launch_command(lab.target)]
        self.process = subprocess.Popen(
            [*command, *map(str, options)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        for line in self.process.stderr or ():
            self._said.append(line)

    @property
    def said(self) -> str:
        """Its stderr so far."""
        return "".join(line for line in list(self._said) if '"figures"' not in line)

    def _events(self) -> Iterator[dict[str, Any]]:
        for line in list(self._said):
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        def arrived() -> bool:
            if condition():
                return True
            if self.process.poll() is not None:
                self._listener.join(10)
                if not condition():
                    raise LabError(f"the tool ended before {what}: {self.said}")
            return condition()

        wait_until(arrived, what, detail=lambda: self.said)

    def wait_stage(self, name: str) -> None:
        """Wait until the phase begins."""
        stages = PHASES[PHASES.index(name) :]
        self._wait(lambda: any(event.get("stage") in stages for event in self._events()), f"phase {name}")

    def wait_event(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> None:
        """Wait until it tells such an event."""
        self._wait(lambda: any(wanted(event) for event in self._events()), what)

    def wait_copying(self) -> None:
        """Wait until the bulk pass has begun to copy."""
        self.wait_stage("bulk")
        self._wait(lambda: any(event.get("percent", 0) > 0 for event in self._events()), "progress of the bulk pass")

    def wait_held(self) -> None:
        """Wait until it is held at its moment."""
        self._wait(lambda: any(event["event"] == "held" for event in self._events()), "the moment")

    def go_on(self) -> None:
        """Let it go on from where it is held."""
        self._go.touch()

    def signal(self, signum: int) -> None:
        """Send the coordinator a signal."""
        self.process.send_signal(signum)

    def child(self, *words: str) -> int:
        """The pid of a process of this test whose command line holds all the words."""
        found: list[int] = []

        def is_there() -> bool:
            found[:] = [pid for pid in self.lab.processes() if all(word in command_line(pid) for word in words)]
            return bool(found)

        wait_until(is_there, f"a process with {words}", 10)
        return found[0]

    def agent(self) -> int:
        """The pid of the agent at the destination."""
        return self.child(*self.lab.agent_words)

    def watchdog(self) -> int:
        """The pid of the watchdog."""
        return self.child("qemu_blkmig.job.watchdog")

    def job(self) -> str:
        """The job's name."""
        return next(path.parent.name for path in self.lab.state.glob("*/record.json"))

    def outcome(self) -> Outcome:
        """Wait for its end, and for everybody's who talks to its stderr (the watchdog)."""
        try:
            self.process.wait(timeout=150)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the tool hung: {self.said}") from None
        self._listener.join(60)
        assert not self._listener.is_alive(), f"somebody keeps stderr open: {self.said}"
        stdout = self.process.stdout.read() if self.process.stdout else ""
        return Outcome(self.process.returncode, stdout, self.said)

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


def command_line(pid: int) -> str:
    """The command line of a process; empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def kill(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)


def command(*arguments: str, lab: Lab | None = None) -> Outcome:
    """Run another command of the tool, such as `jobs`; on the source's host of `lab`."""
    enter = lab.entering if lab is not None else ()
    done = subprocess.run([*enter, *COMMAND, *arguments], capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)
