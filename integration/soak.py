"""A soak: migrations of random guests, something broken at a random moment, as long as one likes.

    python -m integration.soak --over ssh --runs 50 --from-seed 7

A line per run tells its seed, which repeats it as far as timing allows, so that a soak may be spread out: the next one
goes on with --from-seed. After what was broken, and `resume` or `cleanup` where a job is left, exactly one side must
run the guest (none, if the source's own QEMU was killed before the handover), every record that it had acknowledged
must be there and sound, and nothing of ours may be left.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from integration.far import far_laboratory
from integration.faults import FAR, NEAR, strike
from integration.lab import Guest, Hardware, Lab, LabError, assert_records_sound, laboratory, wait_until
from integration.luck import PHASES, Attempt, command
from integration.tool import device_names
from qemu_blkmig.demo.guest import Kernel, Orders, Writer, build_initramfs, find_kernel

PATIENCE = 60.0
"""Seconds in which everything must have come to rest."""
UNDECIDED = 4
FATAL = ("source", "destination", "power", "reboot")
"""What takes the guest along, if it strikes the side that has it."""


@dataclass(frozen=True)
class Case:
    """One run, drawn from a seed: `fault` strikes `after` seconds of `phase`; a job that is left gets `then`."""

    seed: int
    fault: str
    phase: str
    after: float
    then: Literal["resume", "cleanup"]
    sizes: tuple[int, ...]
    format: Literal["raw", "qcow2"]
    orders: Orders
    hardware: Hardware
    options: tuple[str, ...]

    @classmethod
    def draw(cls, seed: int, *, far: bool) -> Case:
        """The case of a seed."""
        dice = random.Random(seed)
        writer: Writer = dice.choice(get_args(Writer))
        sizes = tuple(dice.randrange(1 << 11, 1 << 17) * 512 + 512 for _ in range(dice.choice((1, 1, 2))))
        options = [f"--granularity={dice.choice((4096, 65536, 1 << 20))}", "--on-stall=pause"]
        options += dice.choice(([], ["--bandwidth=4M"], ["--bandwidth=16M"], ["--verify=full"], ["--connections=2"]))
        return cls(
            seed=seed,
            fault=dice.choice([*NEAR, *FAR] if far else [*NEAR]),
            phase=dice.choice(PHASES),
            after=dice.choice((0.0, dice.uniform(0, 0.3), dice.uniform(0, 3))),
            then=dice.choice(("resume", "resume", "cleanup")),
            sizes=sizes,
            format=dice.choice(("raw", "qcow2")),
            orders=Orders(writer=writer, rate=dice.choice((50, 300, 1000)), span=16 << 20),
            hardware=Hardware(style=dice.choice(("drive", "blockdev"))),
            options=tuple(options),
        )


def run(case: Case, lab: Lab) -> str:
    """Run one case; returns what became of it. Raises AssertionError, LabError."""
    disks = [lab.disk(f"disk{number}", size, case.format) for number, size in enumerate(case.sizes)]
    guest = lab.boot(disks, case.orders, case.hardware)
    guest.wait_for_writing(more=20)
    attempt = Attempt(lab, guest, *case.options)
    sides = (guest, attempt.destination)
    with ExitStack() as mending:
        struck = _reached(attempt, case) and strike(case.fault, attempt, mending)
        outcome = attempt.outcome()
        assert "Traceback" not in outcome.stderr and "defect" not in outcome.stderr, outcome.stderr
        assert sum(_runs(side) for side in sides) < 2, f"the guest runs on both sides: {outcome.stderr}"
        if case.fault != "both" and outcome.code != UNDECIDED:
            _wait_for_one(sides, none=struck and case.fault in FATAL, said=outcome.stderr)
    fault = case.fault if struck else f"({case.fault}: too late)"
    told = f"{fault} in {case.phase} + {case.after:.1f} s: exit code {outcome.code}"
    for code in _finish(lab, guest, case.then):
        told += f", {case.then} {code}"
    side = _wait_for_one(sides, none=struck and case.fault in FATAL, said=outcome.stderr)
    if side is None:
        return f"{told}, no side runs it"
    _assert_sound(lab, side, sides)
    return f"{told}, it runs at the {'source' if side is guest else 'destination'}"


def _reached(attempt: Attempt, case: Case) -> bool:
    """Whether the tool came to the moment, and did not end before it."""
    try:
        attempt.wait_stage(case.phase)
    except LabError:
        return False
    time.sleep(case.after)
    return True


def _wait_for_one(sides: tuple[Guest, Guest], *, none: bool, said: str) -> Guest | None:
    """The side that runs the guest, once all is at rest; None where `none` may do so."""
    found: list[Guest] = []

    def settled() -> bool:
        found[:] = [side for side in sides if _runs(side)]
        assert len(found) < 2, "the guest runs on both sides"
        return len(found) == 1 or (none and not sides[0].running())

    wait_until(settled, "the guest to run on one side", PATIENCE, lambda: f"{[_state(side) for side in sides]} {said}")
    return found[0] if found else None


def _finish(lab: Lab, guest: Guest, then: str) -> list[int]:
    """Do what a person does who finds jobs left; the exit codes of `then`. What it leaves is cleaned up."""
    codes = []
    for job in _jobs(lab):
        if then == "resume":
            codes.append(command("resume", job, lab=lab).code)
        if job in _jobs(lab):
            cleaned = command("cleanup", job, lab=lab)
            if cleaned.code == UNDECIDED and guest.running():
                # Nobody can know whether the guest wrote where it ended; a person chooses the source, as it is told.
                guest.resume()
                cleaned = command("cleanup", job, lab=lab)
            assert cleaned.code == 0, f"cleanup: {cleaned}"
            codes += [cleaned.code] if then == "cleanup" else []
    assert not _jobs(lab), "cleanup left jobs"
    return codes


def _jobs(lab: Lab) -> list[str]:
    """The jobs that are left, by the name that begins each line of `jobs`."""
    return [line.split()[0] for line in command("jobs", lab=lab).succeeded().stdout.splitlines()]


def _runs(side: Guest) -> bool:
    return _state(side) == "running"


def _state(side: Guest) -> str:
    try:
        return side.status() if side.running() else "gone"
    except (LabError, OSError) as error:
        return str(error)


def _assert_sound(lab: Lab, side: Guest, sides: tuple[Guest, Guest]) -> None:
    side.wait_for_writing(more=3)
    lab.assert_no_leftovers(side, directories=[lab.target], allow=[one.pid for one in sides if one.running()])
    if side is sides[0]:
        assert not list(lab.target.iterdir()), "images were left at the destination"
    side.pause()
    for disk, name in zip(side.disks, device_names(side), strict=True):
        assert_records_sound(disk, max(one.acked(name) for one in sides))


def _initramfs(folder: Path, kernel: Kernel) -> Callable[[bool], Path]:
    path = folder / "initramfs"
    build_initramfs(path, kernel)
    return lambda _agent: path


def main() -> int:
    """Run the soak; 1 if any run failed."""
    parser = argparse.ArgumentParser(description="Migrations with something broken at a random moment.")
    parser.add_argument("--over", choices=("local", "ssh"), default="local", help="to this host, or to another")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--from-seed", type=int, default=int(time.time()), help="the seed of the first run")
    options = parser.parse_args()
    far = options.over == "ssh"
    laid_out: Callable[..., AbstractContextManager[Lab]] = far_laboratory if far else laboratory
    kernel, failures = find_kernel(), 0
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        initramfs = _initramfs(Path(name), kernel)
        for seed in range(options.from_seed, options.from_seed + options.runs):
            case = Case.draw(seed, far=far)
            try:
                with laid_out(kernel, initramfs) as lab:
                    print(f"seed {seed}: {run(case, lab)}", flush=True)
            except (AssertionError, LabError, subprocess.TimeoutExpired):
                failures += 1
                print(f"seed {seed}: FAILED {case}", flush=True)
                traceback.print_exc()
    print(f"{options.runs - failures} passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
