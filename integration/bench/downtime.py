"""In how many of many moves a guest stands still for no longer than `--downtime`: by the guest's own heartbeat.

Run as `python -m integration.bench.downtime --runs 100 --results gaps.jsonl [--writers idle,random,hot] [--load 1]`.
Each run boots a guest of the laboratory (TCG), moves it with its RAM and its disk, checks its records, and appends a
line to the file, so that runs can be spread out over days and processes: it goes on until the file has so many. Without
--runs it tells what is in the file. `--verify written,none` moves guests with reading back and without, in turn, and
tells what that costs of the gap.

`gap`: the longest time between two completed writes that the guest told at the destination, in seconds; null: it wrote
no more (QEMU 7.2 damages a busy guest under TCG now and then; docs/decisions/009-ram-under-tcg.md), or the move failed,
and why is in `failed`. `before`: the same at the source before it moved: what this machine does to a guest that is left
alone. `told`, `steps`: what the command told of it. `load`: of the machine, before; with --load runs wait for it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from integration.bench.convergence import small_laboratory
from integration.lab import LabError
from integration.tool import assert_writes_soundly, migrate
from qemu_blkmig.demo.guest import Orders, Writer

MIB = 1 << 20
SETTLED = 3
"""Seconds of writing after which a gap shows in what the guest tells."""
TARGET = 0.95
VERIFY = ("written", "none")
POLL = 5.0
"""Seconds between two looks at the load."""


@dataclass(frozen=True)
class Run:
    """See above; `downtime` in seconds, `time` in seconds since 1970."""

    time: float
    writer: str
    downtime: float
    gap: float | None
    before: float
    told: float | None
    load: float
    verify: str = "written"
    failed: str | None = None
    steps: dict[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """Whether the guest stood still for no longer than it was to."""
        return self.gap is not None and self.gap <= self.downtime


def run(writer: Writer, verify: str, downtime: int) -> Run:
    """Move one guest; `downtime` in milliseconds."""
    load = os.getloadavg()[0]
    rate = 100 if writer == "idle" else 400
    with small_laboratory() as lab:
        disk = lab.disk("disk", 256 * MIB, data=[(0, 128 * MIB)])
        guest = lab.boot([disk], Orders(writer=writer, rate=rate, span=32 * MIB))
        guest.wait_for_writing(more=SETTLED * rate)
        before = guest.longest_gap()
        outcome, arrived = migrate(lab, guest, "--downtime", downtime, "--verify", verify)
        done = Run(time.time(), writer, downtime / 1e3, None, before, None, load, verify)
        if outcome.code:
            return replace(done, failed=outcome.stderr)
        told = outcome.result["downtime"]
        done = replace(done, told=told["total"], steps=told["steps"])
        try:
            arrived.wait_for_writing(more=SETTLED * rate, timeout=60)
        except LabError:
            return done
        done = replace(done, gap=arrived.longest_gap())
        assert_writes_soundly(arrived, more=20)
        return done


def read(path: Path) -> list[Run]:
    """The runs of a file; none where there is no file yet."""
    return [Run(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, done: Run) -> None:
    """Add a run; whole lines, whoever else adds some."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(done)) + "\n")


def tell(runs: list[Run]) -> None:
    """Print how many were kept, of all and by writer, and what reading back costs."""
    for writer in ("all", *sorted({each.writer for each in runs})):
        found = [each for each in runs if writer in ("all", each.writer)]
        gaps = [1e3 * each.gap for each in found if each.gap is not None]
        kept = sum(each.kept for each in found)
        spread = f"; gap {statistics.median(gaps):.0f} ms ({min(gaps):.0f} to {max(gaps):.0f})" if gaps else ""
        failed = sum(each.failed is not None for each in found)
        lost = len(found) - len(gaps) - failed
        print(
            f"{writer:7} {kept} of {len(found)} within --downtime{spread}"
            + (f"; {lost} wrote no more" if lost else "")
            + (f"; {failed} were not moved" if failed else "")
            + f"; before the move {1e3 * statistics.median(each.before for each in found):.0f} ms"
        )
    gaps_by = {
        verify: [each.gap for each in runs if each.verify == verify and each.gap is not None] for verify in VERIFY
    }
    if all(gaps_by.values()):
        one, other = (statistics.median(gaps_by[verify]) for verify in VERIFY)
        print(f"gap with reading back: {one / other:.2f} of that without")


def wait_for_quiet(load: float, until: float) -> None:
    """Wait until the machine's load has come down to `load`, or the monotonic time `until` has come."""
    while os.getloadavg()[0] > load and time.monotonic() < until:
        time.sleep(POLL)


def main() -> None:
    """The command; its exit code tells whether 95 of 100 were kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=0, help="how many the file is to have in the end")
    parser.add_argument("--results", type=Path, required=True, help="file, one run a line")
    parser.add_argument("--writers", default="idle,random,hot", help="of guests, in turn")
    parser.add_argument("--verify", default="written", help="how what arrived is verified, in turn")
    parser.add_argument("--downtime", type=int, default=300, help="milliseconds")
    parser.add_argument("--pause", type=float, default=0, help="seconds between two runs")
    parser.add_argument("--load", type=float, default=math.inf, help="wait before each run until the load is no more")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so long")
    wanted = parser.parse_args()
    kinds = [(writer, verify) for writer in wanted.writers.split(",") for verify in wanted.verify.split(",")]
    ends = time.monotonic() + 60 * wanted.minutes
    while (number := len(read(wanted.results))) < wanted.runs:
        wait_for_quiet(wanted.load, ends)
        if time.monotonic() > ends:
            break
        done = run(*kinds[number % len(kinds)], wanted.downtime)
        append(wanted.results, done)
        print(f"{number + 1}: {done}", file=sys.stderr, flush=True)
        time.sleep(wanted.pause)
    runs = read(wanted.results)
    if not runs:
        parser.error(f"{wanted.results}: no runs; give --runs")
    tell(runs)
    sys.exit(0 if sum(each.kept for each in runs) >= TARGET * len(runs) else 1)


if __name__ == "__main__":
    main()
