"""One migration of a random guest in which something breaks at a random moment, and its judgement: a seed says it all.

After what was broken is mended, the job is resumed (or cleaned up), as the tool advises; then exactly one side runs
the guest, which had never run at both, with every record that it acknowledged, and nothing of ours is left. Where the
QEMU that had the guest was killed, nobody runs it, and its disks, on the side that the tool told, hold all of it.
"""

from __future__ import annotations

import random
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, get_args

from integration import judges
from integration.far import FarLab
from integration.faults import FAR, HARMLESS, NEAR, strike
from integration.judges import Sides
from integration.lab import Format, Hardware, Lab, LabError, wait_until
from integration.listened import PHASES
from integration.luck import Attempt, command
from integration.tool import Outcome
from qemu_blkmig.demo.guest import Orders, Writer

FAILED, UNDECIDED = 1, 4
FATAL = ("source", "destination", "power", "reboot")
"""What takes the guest along, if it strikes the side that has it."""
MOMENTS = ("moving RAM", "paused", "last round over", "closed", "undecided", "continued", "completed", "started")
"""Moments of `integration.held` that are too short to be met from outside."""
SPAN = 4 << 20
Line = Literal["plain", "delayed", "slow"]


@dataclass(frozen=True)
class Case:
    """One run, drawn from a seed: `fault` strikes `after` seconds of `moment`; a job that is left gets `then`.

    `moment`: one of PHASES or of MOMENTS. `line`: what the network is like all the while.
    """

    seed: int
    fault: str
    moment: str
    after: float
    then: Literal["resume", "cleanup"]
    line: Line
    sizes: tuple[int, ...]
    format: Format
    orders: Orders
    hardware: Hardware
    options: tuple[str, ...]

    @classmethod
    def draw(cls, seed: int, *, far: bool) -> Case:
        """The case of a seed."""
        dice = random.Random(seed)
        writer: Writer = dice.choice(get_args(Writer))
        fault = dice.choice([*NEAR, *FAR] if far else [*NEAR])
        line: Line = dice.choice(("plain", "plain", "plain", "delayed", "slow")) if far else "plain"
        more = dice.choice(([], ["--bandwidth=4M"], ["--bandwidth=4M"], ["--verify=full"], ["--connections=2"]))
        slow = line == "slow" or "--bandwidth=4M" in more
        granularity = 4096 if slow else dice.choice((4096, 65536, 1 << 20))
        # On what is slow or far, no round of coarser pieces would ever fit the downtime, if the machine is busy.
        options = [f"--granularity={4096 if line == 'delayed' else granularity}", *more]
        form: Format = dice.choice(("raw", "qcow2"))
        if fault in FATAL:
            # What a killed QEMU had not yet written of a qcow2's metadata is lost, whoever migrates it.
            form = "raw"
        elif fault == "qemu-nbd":
            form = "qcow2"
        return cls(
            seed=seed,
            fault=fault,
            moment=dice.choice((*PHASES, *MOMENTS)),
            after=dice.choice((0.0, dice.uniform(0, 0.3), dice.uniform(0, 1.5))),
            then=dice.choice(("resume", "resume", "resume", "cleanup")),
            line=line,
            sizes=tuple(dice.randrange(1 << 13, 1 << 15) * 512 + 512 for _ in range(dice.choice((1, 1, 2)))),
            format=form,
            orders=Orders(writer=writer, rate=dice.choice((50, 200)), span=SPAN),
            hardware=Hardware(style=dice.choice(("drive", "blockdev"))),
            # Neither a busy machine nor a long line is what is to be tried.
            options=("--on-stall=pause", "--downtime=3000", *options),
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a case: whether it was struck in time, how all commands ended, where the guest is."""

    struck: bool
    outcomes: tuple[Outcome, ...]
    guest: Literal["source", "destination", "source's disks", "destination's disks"]

    @property
    def codes(self) -> list[int]:
        """Exit codes."""
        return [outcome.code for outcome in self.outcomes]

    @property
    def told(self) -> list[str]:
        """What those told that failed, and did not only leave it to a person to look."""
        return [outcome.stderr for outcome in self.outcomes if outcome.code not in (0, UNDECIDED)]

    def __str__(self) -> str:
        return f"{'struck' if self.struck else 'too late'}, exit codes {', '.join(map(str, self.codes))}: {self.guest}"


def run(case: Case, lab: Lab) -> Verdict:
    """Run one case, and judge it. Raises AssertionError, LabError."""
    with ExitStack() as stack:
        if isinstance(lab, FarLab):
            stack.enter_context(lab.network.like(case.line))
        return _Run(case, lab).judged()


class _Run:
    """A case under way."""

    def __init__(self, case: Case, lab: Lab) -> None:
        self._case, self._lab = case, lab
        data = [(0, size) for size in case.sizes]
        disks = [
            lab.disk(f"disk{number}", size, case.format, data=[data[number]]) for number, size in enumerate(case.sizes)
        ]
        self._guest = lab.boot(disks, case.orders, case.hardware)
        self._guest.wait_for_writing(more=20)
        held = case.moment if case.moment in MOMENTS else None
        self._attempt = Attempt(lab, self._guest, *case.options, hold=held)
        self._sides: Sides = (self._guest, self._attempt.destination)
        self._outcomes: list[Outcome] = []
        self._struck = False

    def judged(self) -> Verdict:
        with ExitStack() as mending:
            self._struck = self._reached() and strike(self._case.fault, self._attempt, mending)
            self._attempt.go_on()
            outcome = self._attempt.outcome()
            self._take(outcome)
            if self._case.fault in HARMLESS:
                outcome.succeeded()
        self._finish(outcome)
        side = judges.wait_for_one(self._sides, none=self._may_be_gone, said=outcome.stderr)
        judges.assert_ran_once(self._sides)
        if side is None:
            return self._judge_disks(outcome)
        side.wait_for_writing(more=3)
        judges.assert_nothing_ours_left(self._lab, self._sides)
        side.pause()
        judges.assert_ran_once(self._sides)
        judges.assert_holds_all(self._lab, side, self._sides, span=SPAN)
        return self._verdict("source" if side is self._guest else "destination")

    @property
    def _may_be_gone(self) -> bool:
        """Whether what was done may have taken the guest along."""
        return self._struck and self._case.fault in FATAL

    def _reached(self) -> bool:
        """Whether the tool came to the moment, and did not end before it."""
        try:
            if self._case.moment in MOMENTS:
                self._attempt.wait_held()
                threading.Timer(self._case.after + 0.5, self._attempt.go_on).start()
            else:
                self._attempt.wait_stage(self._case.moment)
        except LabError:
            return False
        time.sleep(self._case.after)
        return True

    def _take(self, outcome: Outcome) -> None:
        """Judge what holds after each command; nothing of it may be put right by the next one."""
        self._outcomes.append(outcome)
        judges.assert_told_truly(outcome, self._sides, killed=self._may_be_gone)
        assert sum(judges.runs(side) for side in self._sides) < 2, f"the guest runs on both sides: {outcome.stderr}"
        judges.assert_ran_once(self._sides)
        everybody_killed = self._struck and self._case.fault == "both" and len(self._outcomes) == 1
        if outcome.code != UNDECIDED and not everybody_killed:
            judges.wait_for_one(self._sides, none=self._may_be_gone, said=outcome.stderr)

    def _finish(self, outcome: Outcome) -> None:
        """Do what a person does who finds a job left: what was mended is resumed, and what still is left cleaned up."""
        for job in self._jobs():
            promised = f"qemu-blkmig resume {job}" in outcome.stderr
            if self._case.then == "resume":
                resumed = command("resume", job, lab=self._lab)
                self._take(resumed)
                assert not promised or resumed.code == 0 or not self._guest.running(), f"resume: {resumed}"
            if job in self._jobs():
                self._clean_up(job)
        assert not self._jobs(), "cleanup left jobs"

    def _clean_up(self, job: str) -> None:
        cleaned = command("cleanup", job, lab=self._lab)
        if cleaned.code == UNDECIDED and self._guest.running():
            # A person decides what nobody here can know; as it is told.
            wait_until(lambda: not self._sides[1].running(), "the end of the destination", judges.PATIENCE)
            if judges.ran_there(self._sides[1]):
                self._guest.quit()
            else:
                self._guest.resume()
            self._outcomes.append(cleaned)
            cleaned = command("cleanup", job, lab=self._lab)
        self._take(cleaned)
        assert cleaned.code == 0, f"cleanup: {cleaned}"

    def _jobs(self) -> list[str]:
        """The jobs that are left, by the name that begins each line of `jobs`."""
        return [line.split()[0] for line in command("jobs", lab=self._lab).succeeded().stdout.splitlines()]

    def _judge_disks(self, outcome: Outcome) -> Verdict:
        """Nobody runs the guest: the QEMU that had it was killed, and its disks are what is left of it."""
        judges.assert_nothing_ours_left(self._lab, self._sides)
        there = all(disk.path.exists() for disk in self._sides[1].disks)
        at_source = "its disks hold all that the guest wrote" in outcome.stderr
        assert not (there and at_source), f"the destination's images were left: {outcome.stderr}"
        assert self._case.fault != "source" or at_source or there, outcome.stderr
        judges.assert_holds_all(self._lab, self._sides[1] if there else self._guest, self._sides, span=SPAN)
        return self._verdict("destination's disks" if there else "source's disks")

    def _verdict(self, guest: Literal["source", "destination", "source's disks", "destination's disks"]) -> Verdict:
        return Verdict(self._struck, tuple(self._outcomes), guest)
