"""A soak: migrations of random guests with a random process killed at a random moment, as long as one likes.

    python -m integration.soak --runs 50 --seed 7

After each run exactly one side must run the guest (or none, if the source's own QEMU was the one killed before the
handover), its records must be sound, and nothing of ours may be left. A failure prints its seed, which repeats it as
far as timing allows, and what was found.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from integration.lab import (
    Disk,
    Guest,
    Hardware,
    Lab,
    LabError,
    assert_records_sound,
    laboratory,
    wait_until,
)
from integration.tool import arguments
from qemu_blkmig.demo.guest import Kernel, Orders, Writer, build_initramfs, find_kernel

Victim = Literal["none", "coordinator", "agent", "watchdog-and-coordinator", "destination", "source", "interrupt"]
PATIENCE = 60.0
"""Seconds in which everything must have come to rest."""


@dataclass(frozen=True)
class Case:
    """One run, drawn from a seed. `when`: seconds after the start of the tool at which the victim is hit."""

    seed: int
    victim: Victim
    when: float
    sizes: tuple[int, ...]
    format: Literal["raw", "qcow2"]
    orders: Orders
    hardware: Hardware
    options: tuple[str, ...]

    @classmethod
    def draw(cls, seed: int) -> Case:
        """The case of a seed."""
        dice = random.Random(seed)
        writer: Writer = dice.choice(get_args(Writer))
        sizes = tuple(dice.randrange(1 << 11, 1 << 17) * 512 + 512 for _ in range(dice.choice((1, 1, 2))))
        options = [f"--granularity={dice.choice((4096, 65536, 1 << 20))}", "--on-stall=pause"]
        options += dice.choice(([], ["--bandwidth=16"], ["--bandwidth=64"], ["--verify=full"], ["--connections=2"]))
        return cls(
            seed=seed,
            victim=dice.choice(get_args(Victim)),
            when=dice.uniform(0.3, 6.0),
            sizes=sizes,
            format=dice.choice(("raw", "qcow2")),
            orders=Orders(writer=writer, rate=dice.choice((50, 300, 1000)), span=16 << 20),
            hardware=Hardware(style=dice.choice(("drive", "blockdev"))),
            options=tuple(options),
        )


def run(case: Case, lab: Lab) -> str:
    """Run one case; returns what became of it. Raises AssertionError, LabError."""
    disks = [_disk(lab, case, number, size) for number, size in enumerate(case.sizes)]
    guest = lab.boot(disks, case.orders, case.hardware)
    guest.wait_for_writing(more=20)
    destination = lab.destination(guest)
    command = arguments("migrate", guest, lab.target, "--launch", guest.launch_command(lab.target), *case.options)
    with tempfile.TemporaryFile("w+") as said:
        tool = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        time.sleep(case.when)
        hit = _hit(case.victim, tool, guest, destination)
        code = tool.wait(timeout=PATIENCE * 2)
        side = _only_runner(guest, destination, hit)
        said.seek(0)
        told = said.read()
    if side is not None:
        assert code != 0 or side is destination, f"exit code 0, but the guest runs at the source: {told}"
        assert code in (0, 3) or hit != "none" or side is guest, f"exit code {code}, nothing was hit: {told}"
        _assert_sound(lab, side, allow_left=hit == "watchdog-and-coordinator")
    return f"{hit} at {case.when:.1f} s: exit code {code}, {_name(side, guest)}"


def _disk(lab: Lab, case: Case, number: int, size: int) -> Disk:
    return lab.disk(f"disk{number}.{case.format}", size, case.format)


def _hit(victim: Victim, tool: subprocess.Popen[bytes], guest: Guest, destination: Guest) -> str:
    """Kill the victim, if it is there; what was hit."""
    if tool.poll() is not None:
        return "none"
    children = {name: pid for pid in _children(tool.pid) for name in ("agent", "watchdog") if name in _command(pid)}
    targets: dict[str, list[int]] = {
        "none": [],
        "coordinator": [tool.pid],
        "agent": [children[name] for name in ("agent",) if name in children],
        "watchdog-and-coordinator": [*(children[name] for name in ("watchdog",) if name in children), tool.pid],
        "destination": [destination.pid] if destination.running() else [],
        "source": [guest.pid],
        "interrupt": [tool.pid],
    }
    for pid in targets[victim]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT if victim == "interrupt" else signal.SIGKILL)
    return victim if targets[victim] else "none"


def _only_runner(guest: Guest, destination: Guest, hit: str) -> Guest | None:
    """The side that runs the guest, once all is at rest; None where there may be none."""
    if hit == "watchdog-and-coordinator":
        _clean_up()
    sides: list[Guest] = []

    def settled() -> bool:
        sides[:] = [side for side in (guest, destination) if _runs(side)]
        assert len(sides) < 2, "the guest runs on both sides"
        return len(sides) == 1 or (hit in ("source", "destination") and not guest.running())

    wait_until(settled, "the guest to run on one side", PATIENCE, lambda: f"{_state(guest)} / {_state(destination)}")
    return sides[0] if sides else None


def _clean_up() -> None:
    """What a person does who finds a job whose processes were all killed."""
    for line in subprocess.run(arguments("jobs", "", Path())[:4], capture_output=True, text=True).stdout.splitlines():
        subprocess.run([*arguments("cleanup", "", Path())[:4], line.split()[0]], check=False, timeout=PATIENCE)


def _runs(side: Guest) -> bool:
    try:
        return side.running() and side.status() == "running"
    except (LabError, OSError):
        return False


def _state(side: Guest) -> str:
    try:
        return side.status() if side.running() else "gone"
    except (LabError, OSError) as error:
        return str(error)


def _assert_sound(lab: Lab, side: Guest, *, allow_left: bool) -> None:
    before = side.acked()
    side.wait_for_writing(more=3)
    if not allow_left:
        lab.assert_no_leftovers(side, allow=[guest.pid for guest in lab.guests if guest.running()])
    side.pause()
    for disk in side.disks:
        assert_records_sound(disk)
    assert side.acked() > before


def _children(pid: int) -> list[int]:
    """All of its threads' children: the watchdog is no child of the main thread."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _name(side: Guest | None, guest: Guest) -> str:
    return "no side runs it" if side is None else f"it runs at the {'source' if side is guest else 'destination'}"


def _initramfs(folder: Path, kernel: Kernel) -> Callable[[bool], Path]:
    path = folder / "initramfs"
    build_initramfs(path, kernel)
    return lambda _agent: path


def main() -> int:
    """Run the soak; 1 if any run failed."""
    parser = argparse.ArgumentParser(description="Migrations with a random process killed at a random moment.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    kernel, failures = find_kernel(), 0
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        initramfs = _initramfs(Path(name), kernel)
        for seed in range(options.seed, options.seed + options.runs):
            case = Case.draw(seed)
            try:
                with laboratory(kernel, initramfs) as lab:
                    print(f"seed {seed}: {run(case, lab)}", flush=True)
            except (AssertionError, LabError, subprocess.TimeoutExpired):
                failures += 1
                print(f"seed {seed}: FAILED {case}", flush=True)
                traceback.print_exc()
    print(f"{options.runs - failures} passed, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
