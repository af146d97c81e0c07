"""One move of a random domain between two libvirts in which something breaks at a random moment, and its judgement.

As `integration.cases` does it for plain QEMUs: a seed says it all; after what was broken is mended, the job is resumed
or cleaned up as the tool advises; then exactly one host runs the domain, which had never run on both.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast, get_args

from integration.cases import FAILED, UNDECIDED, Verdict
from integration.hosts import PORT
from integration.lab import Format, LabError, assert_records_sound, wait_until
from integration.listened import PHASES
from integration.luck import kill_all
from integration.network import Network
from integration.processes import WATCHDOG
from integration.tool import COMMAND, Outcome, finish, start
from integration.virtlab import IMAGES, VirtLab
from qemu_blkmig.demo.guest import Orders, Writer

MIB = 1 << 20
SPAN = 4 << 20
PATIENCE = 90.0
"""Seconds in which everything must have come to rest."""
WAITING = ("begun beforehand", "copied", "converged")
"""Moments of `integration.held` at which libvirt's first attempt waits for the first pass to end, or for more."""
MOMENTS = (
    "prepared", "connected", *WAITING, "behind the gate", "last round over", "closed", "decided", "gate to be opened",
    "gate open", "handed over",
)  # fmt: skip
"""Of `integration.held`."""
P2P = ["--p2p", f"--agent=ssh://hostb:{PORT}"]
FATAL = ("source", "destination", "power", "destroy here", "destroy there")
"""What takes the guest along, if it strikes the side that has it."""

Strike = Callable[["_Run", ExitStack], bool]
"""Does it, if what it is done to is there (else False); undoing it is left to the stack."""


@dataclass(frozen=True)
class DomainCase:
    """One run, drawn from a seed: `fault` strikes `after` seconds of `moment`; a job that is left gets `then`."""

    seed: int
    fault: str
    moment: str
    after: float
    then: Literal["resume", "cleanup"]
    sizes: tuple[int, ...]
    format: Format
    orders: Orders
    options: tuple[str, ...]
    line: str = "plain"

    @classmethod
    def draw(cls, seed: int) -> DomainCase:
        """The case of a seed."""
        dice = random.Random(f"libvirt {seed}")
        fault = dice.choice([*FAULTS])
        writer: Writer = dice.choice(get_args(Writer))
        # What a killed QEMU had not yet written of a qcow2's metadata is lost, whoever migrates it.
        form: Format = "raw" if fault in FATAL else dice.choice(("raw", "qcow2"))
        # A guest that writes faster is paused after some rounds.
        slow = ["--bandwidth=4", "--max-rounds=5"]
        tcp = ["--migrateuri=tcp://hostb", "--listen-address=0.0.0.0"]
        more = dice.choice(
            ([], slow, ["--verify=full"], ["--persistent"], ["--undefinesource"], ["--timeout=2"], P2P, tcp)
        )
        return cls(
            seed=seed,
            fault=fault,
            moment=dice.choice((*PHASES[:4], *MOMENTS, *WAITING)),
            after=dice.choice((0.0, dice.uniform(0, 0.3), dice.uniform(0, 1.5))),
            then=dice.choice(("resume", "resume", "resume", "cleanup")),
            sizes=tuple(dice.randrange(1 << 14, 1 << 16) * 512 for _ in range(dice.choice((1, 1, 2, 3)))),
            format=form,
            orders=Orders(writer=writer, rate=dice.choice((50, 200)), span=SPAN),
            options=("--on-stall=pause", *more),
        )


def run(case: DomainCase, lab: VirtLab) -> Verdict:
    """Run one case, and judge it. Raises AssertionError, LabError."""
    return _Run(case, lab).judged()


class _Run:
    """A case under way."""

    def __init__(self, case: DomainCase, lab: VirtLab) -> None:
        self.case, self.lab = case, lab
        disks = [
            lab.disk(f"disk{number}", size, case.format, data=[(0, size // 2)])
            for number, size in enumerate(case.sizes)
        ]
        self.domain = lab.boot(*disks, orders=case.orders)
        self.domain.wait_for_writing(more=20)
        held = case.moment if case.moment in MOMENTS else None
        self.attempt = lab.attempt(self.domain, *case.options, hold=held)
        self.beside: list[subprocess.Popen[str]] = []
        """Commands that were started while it ran, and end with it."""
        self._outcomes: list[Outcome] = []
        self._struck = False

    def judged(self) -> Verdict:
        with ExitStack() as mending:
            self._struck = self._reached() and self._strike(mending)
            self.attempt.go_on()
            outcome = self.attempt.outcome()
        for other in map(finish, self.beside):
            self._assert_true(other.stdout + other.stderr)
        self._take(outcome)
        if self.case.fault == "nothing":
            outcome.succeeded()
        self._finish(outcome)
        self.lab.assert_nothing_left()
        return self._judge(outcome)

    def _reached(self) -> bool:
        """Whether the tool came to the moment, and did not end before it."""
        try:
            if self.case.moment in MOMENTS:
                self.attempt.wait_held()
                threading.Timer(self.case.after + 0.5, self.attempt.go_on).start()
            else:
                self.attempt.wait_stage(self.case.moment)
        except LabError:
            return False
        time.sleep(self.case.after)
        return True

    def _strike(self, mending: ExitStack) -> bool:
        if self.attempt.process.poll() is not None:
            return False
        with contextlib.suppress(LabError, ProcessLookupError):
            return FAULTS[self.case.fault](self, mending)
        return False

    def _take(self, outcome: Outcome) -> None:
        """Judge what holds after each command, what was broken being mended."""
        self._outcomes.append(outcome)
        self._assert_ran_once()
        if outcome.code != UNDECIDED:
            self._wait_for_one(outcome.stderr)
        if outcome.code == FAILED:
            assert self.domain.runs() != ["hostb"], f"the source is told to be the truth: {outcome}"
        self._assert_true(outcome.stderr)

    def _assert_true(self, told: str) -> None:
        """The guest runs where it is told to, and nothing is told that is no user's matter."""
        assert "Traceback" not in told and "defect" not in told, told
        states = "".join(line for line in told.splitlines() if line.startswith(("  now:  ", "job ")))
        for place, host in (("source", "hosta"), ("destination", "hostb")):
            if f"the guest runs at the {place}" in states:
                runs = self.domain.runs()
                assert runs == [host] or (self._may_be_gone and not runs), f"runs on {runs}, but: {told}"

    def _finish(self, outcome: Outcome) -> None:
        """Do what a person does who finds a job left: what was mended is resumed, and what still is left cleaned up."""
        for job in self._jobs():
            promised = re.search(rf"--resume {job}|resume {job}", outcome.stderr) is not None
            if self.case.then == "resume":
                resumed = self.lab.virsh("--resume", job)
                self._take(resumed)
                assert not promised or resumed.code == 0 or self.domain.runs() != ["hosta"], f"resume: {resumed}"
            if job in self._jobs():
                cleaned = self.lab.tool("cleanup", job)
                self._take(cleaned)
                assert cleaned.code == 0, f"cleanup: {cleaned}"
        assert not self._jobs(), "cleanup left jobs"

    def _jobs(self) -> list[str]:
        """The jobs that are left, by the name that begins each line of `jobs`."""
        return [line.split()[0] for line in self.lab.tool("jobs").succeeded().stdout.splitlines()]

    @property
    def _may_be_gone(self) -> bool:
        """Whether what was done may have taken the guest along."""
        return self._struck and self.case.fault in FATAL

    def _wait_for_one(self, said: str) -> list[str]:
        found: list[str] = []

        def settled() -> bool:
            found[:] = self.domain.runs()
            assert len(found) < 2, f"the guest runs on both hosts: {said}"
            return bool(found) or (self._may_be_gone and not self._there_is_one())

        wait_until(settled, "the guest to run on one host", PATIENCE, lambda: f"{self._states()} {said}")
        return found

    def _there_is_one(self) -> bool:
        return any(state not in (None, "shut off") for state in self._states())

    def _states(self) -> list[str | None]:
        return [self.domain.state(far=far) for far in (False, True)]

    def _assert_ran_once(self) -> None:
        """Its records are numbered: had it gone on at the source once the destination ran it, some came twice."""
        here, there = self.domain.console(far=False), self.domain.console(far=True)
        for number in range(len(self.case.sizes)):
            name = f"vd{chr(97 + number)}"
            numbers = [
                [int(seq) for seq in re.findall(rf"^blkmig ack {name} seq (\d+) ", console, re.MULTILINE)]
                for console in (here, there)
            ]
            if all(numbers):
                assert numbers[0][-1] <= numbers[1][0], (
                    f"{name}: hosta had {numbers[0][-1]}, hostb began {numbers[1][0]}"
                )

    def _judge(self, outcome: Outcome) -> Verdict:
        """All that the guest ever said was written is on the disks of the host that has it."""
        runs = self._wait_for_one(outcome.stderr)
        if runs:
            self.domain.wait_for_writing(far=runs == ["hostb"], more=3)
            self._assert_ran_once()
            self.lab.hosts.virsh("destroy", self.domain.name, far=runs == ["hostb"])
            far = runs == ["hostb"]
        else:
            far = bool(self.lab.images_there(self.domain))
        if not far:
            assert not self.lab.images_there(self.domain), "images were left on hostb"
            assert runs or not self.domain.acked(far=True), "hostb, which does not have the guest, ran it"
        for number, disk in enumerate(self.domain.disks):
            image = replace(disk, path=self.lab.outside(disk.path, far=far))
            assert_records_sound(image, self._acked(f"vd{chr(97 + number)}"))
        where = "destination" if far else "source"
        guest = where if runs else f"{where}'s disks"
        return Verdict(self._struck, tuple(self._outcomes), cast(Literal["source", "destination"], guest))

    def _acked(self, name: str) -> int:
        consoles = "".join(self.domain.console(far=far) for far in (False, True))
        return max(map(int, re.findall(rf"^blkmig ack {name} seq (\d+) ", consoles, re.MULTILINE)), default=0)


def _signal(number: int) -> Strike:
    def send(run: _Run, _: ExitStack) -> bool:
        run.attempt.signal(number)
        return True

    return send


def _kill_process(*words: str, far: bool) -> Strike:
    return lambda run, _: kill_all(*run.lab.processes(*words, far=far))


def _kill_qemu(*, far: bool) -> Strike:
    return lambda run, _: kill_all(*run.lab.processes("qemu-system", f"guest={run.domain.name},", far=far))


def _kill_both(run: _Run, mending: ExitStack) -> bool:
    """Coordinator and watchdog, neither of which may act upon the other's end."""
    run.attempt.signal(signal.SIGSTOP)
    kill_all(*run.lab.processes(WATCHDOG, far=False))
    run.attempt.signal(signal.SIGKILL)
    return True


def _stop_libvirtd(*, far: bool) -> Strike:
    def stop(run: _Run, mending: ExitStack) -> bool:
        run.lab.hosts.stop_libvirtd(far=far)
        mending.callback(run.lab.hosts.start_libvirtd, far=far)
        return True

    return stop


def _restart_libvirtd(*, far: bool) -> Strike:
    def restart(run: _Run, _: ExitStack) -> bool:
        run.lab.hosts.stop_libvirtd(far=far)
        run.lab.hosts.start_libvirtd(far=far)
        return True

    return restart


def _cut(run: _Run, mending: ExitStack) -> bool:
    network = Network(run.lab.hosts)
    network.down()
    mending.callback(network.up)
    return True


def _cut_for(seconds: float) -> Strike:
    def cut(run: _Run, _: ExitStack) -> bool:
        Network(run.lab.hosts).cut(seconds)
        return True

    return cut


def _reset(run: _Run, mending: ExitStack) -> bool:
    mending.enter_context(Network(run.lab.hosts).resetting())
    return True


def _cancel(run: _Run, _: ExitStack) -> bool:
    """From another terminal; it may be too late for that, which it is told then."""
    jobs = run.lab.jobs()
    run.beside += [start([*run.lab.entering, *COMMAND, "cancel", job]) for job in jobs]
    return bool(jobs)


def _virsh(command: str) -> Strike:
    """A command of hosta's admin about the domain."""

    def tell(run: _Run, _: ExitStack) -> bool:
        run.lab.hosts.virsh(command, run.domain.name)
        return True

    return tell


def _destroy_there(run: _Run, _: ExitStack) -> bool:
    """An admin of hostb's ends what libvirt has begun there, or what has arrived."""
    wait_until(lambda: run.domain.state(far=True) not in (None, "shut off"), "the domain at hostb", 5)
    run.lab.hosts.virsh("destroy", run.domain.name, far=True)
    return True


def _pause(run: _Run, mending: ExitStack) -> bool:
    """An admin pauses the guest, for a moment; if it cannot be resumed then, until the tool has ended."""
    run.lab.hosts.virsh("suspend", run.domain.name)
    for far in (False, True):
        mending.callback(_without_error, partial(run.lab.hosts.virsh, far=far), "resume", run.domain.name)
    time.sleep(0.5)
    _without_error(run.lab.hosts.virsh, "resume", run.domain.name)
    return True


def _copy_job(run: _Run, mending: ExitStack) -> bool:
    """Somebody mirrors a disk, until the tool has ended."""
    copy = ("--dest", IMAGES / "copied.raw", "--format", "raw", "--transient-job", "--bandwidth", 1)
    run.lab.hosts.virsh("blockcopy", run.domain.name, "vda", *copy)
    mending.callback(_without_error, run.lab.hosts.virsh, "blockjob", run.domain.name, "vda", "--abort")
    return True


def _backup(run: _Run, mending: ExitStack) -> bool:
    """Somebody backs a disk up, which does not end before the tool has."""
    run.lab.hosts.virsh("backup-begin", run.domain.name, "--backupxml", run.lab.backup(IMAGES / "backed-up.raw"))
    mending.callback(_without_error, run.lab.hosts.virsh, "domjobabort", run.domain.name)
    return True


def _without_error(command: Callable[..., object], *words: object) -> None:
    with contextlib.suppress(LabError):
        command(*words)


def _power_off(run: _Run, mending: ExitStack) -> bool:
    run.lab.hosts.power_off()
    mending.callback(run.lab.hosts.boot)
    return True


FAULTS: dict[str, Strike] = {
    "nothing": lambda _run, _mending: True,
    "coordinator": _signal(signal.SIGKILL),
    "hangup": _signal(signal.SIGHUP),
    "interrupt": _signal(signal.SIGINT),
    "watchdog": _kill_process(WATCHDOG, far=False),
    "both": _kill_both,
    "agent": _kill_process("qemu_blkmig", "receive", far=True),
    "qemu-nbd": _kill_process("qemu-nbd", far=True),
    "ssh": _kill_process("ssh ", "hostb", far=False),
    "sshd": lambda run, _: Network(run.lab.hosts).kill_connections() > 0,
    "libvirtd here": _stop_libvirtd(far=False),
    "libvirtd there": _stop_libvirtd(far=True),
    "libvirtd restarted here": _restart_libvirtd(far=False),
    "libvirtd restarted there": _restart_libvirtd(far=True),
    "source": _kill_qemu(far=False),
    "destination": _kill_qemu(far=True),
    "cut": _cut,
    "cut-1": _cut_for(1),
    "cut-30": _cut_for(30),
    "reset": _reset,
    "power": _power_off,
    "cancel": _cancel,
    "abort": _virsh("domjobabort"),
    "destroy here": _virsh("destroy"),
    "destroy there": _destroy_there,
    "pause": _pause,
    "copy job": _copy_job,
    "backup": _backup,
}
"""See `integration.faults`; "here" is hosta."""
