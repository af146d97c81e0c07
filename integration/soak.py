"""A soak: migrations of random guests, something broken at a random moment, as long as one likes.

    python -m integration.soak --over ssh --runs 50 --from-seed 7 --results soak.jsonl

Each run is one of `integration.cases` (`--over libvirt`: of `integration.domain_cases`), told by its seed, which
repeats it as far as timing allows. What became of it is appended to the results, with the commit; a seed that passed is
not run again, so that a soak may be spread out. `--table` shows what the results hold, by fault.
"""

from __future__ import annotations

import argparse
import collections
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from integration import domain_cases
from integration.cases import Case, Verdict, run
from integration.domain_cases import DomainCase
from integration.far import far_laboratory
from integration.lab import LabError, laboratory
from integration.virtlab import virt_laboratory
from qemu_blkmig.demo.guest import Kernel, build_initramfs, find_kernel

REPOSITORY = Path(__file__).parent.parent


@dataclass(frozen=True)
class Way:
    """Where the guests of a soak move: how a case is drawn, where, and by what it is run."""

    draw: Callable[[int], Any]
    laid_out: Callable[..., AbstractContextManager[Any]]
    run: Callable[[Any, Any], Verdict]


OVER = {
    "local": Way(partial(Case.draw, far=False), laboratory, run),
    "ssh": Way(partial(Case.draw, far=True), far_laboratory, run),
    "libvirt": Way(DomainCase.draw, virt_laboratory, domain_cases.run),
}


def main() -> int:
    """Run the soak; 1 if any run failed."""
    options = _parse()
    # So that what was started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if options.table:
        print(_table(list(_read(options.results))))
        return 0
    done = {one["seed"] for one in _read(options.results) if one["over"] == options.over and one["passed"]}
    kernel, failures = find_kernel(), 0
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        initramfs = _initramfs(Path(name), kernel)
        for seed in range(options.from_seed, options.from_seed + options.runs):
            if seed not in done:
                failures += not _run(seed, options, kernel, initramfs)
    print(f"{failures} failed")
    return 1 if failures else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Migrations with something broken at a random moment.")
    parser.add_argument(
        "--over", choices=[*OVER], default="local", help="to this host, to another, or between two libvirts"
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--from-seed", type=int, default=int(time.time()), help="the seed of the first run")
    parser.add_argument("--results", type=Path, help="a file of JSON lines, one a run, that they are appended to")
    parser.add_argument("--table", action="store_true", help="show what the results hold, and run nothing")
    options = parser.parse_args()
    if options.table and options.results is None:
        parser.error("--table needs --results")
    return options


def _run(seed: int, options: argparse.Namespace, kernel: Kernel, initramfs: Callable[[bool], Path]) -> bool:
    """Run one seed; whether it passed."""
    way = OVER[options.over]
    case, start = way.draw(seed), time.monotonic()
    verdict: Verdict | None = None
    failure = ""
    try:
        with way.laid_out(kernel, initramfs) as lab:
            verdict = way.run(case, lab)
    except (AssertionError, LabError, subprocess.TimeoutExpired) as error:
        failure = str(error)
        traceback.print_exc()
    told = str(verdict) if verdict else f"FAILED {case}"
    print(
        f"seed {seed}: {case.fault}, {case.moment} + {case.after:.1f} s, {case.then}, {case.line}: {told}", flush=True
    )
    if options.results is not None:
        _append(options.results, case, options.over, verdict, failure, time.monotonic() - start)
    return verdict is not None


def _append(
    results: Path, case: Case | DomainCase, over: str, verdict: Verdict | None, failure: str, seconds: float
) -> None:
    commit = subprocess.check_output(["git", "-C", REPOSITORY, "rev-parse", "--short", "HEAD"], text=True).strip()
    entry: dict[str, Any] = {
        "seed": case.seed, "over": over, "commit": commit, "fault": case.fault, "moment": case.moment,
        "after": round(case.after, 2), "then": case.then, "line": case.line, "format": case.format,
        "passed": verdict is not None, "struck": verdict.struck if verdict else None,
        "codes": verdict.codes if verdict else None, "guest": verdict.guest if verdict else failure[-2000:],
        "seconds": round(seconds), "told": [told[-4000:] for told in verdict.told] if verdict else [],
    }  # fmt: skip
    with results.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _read(results: Path | None) -> Iterator[dict[str, Any]]:
    if results is not None and results.exists():
        yield from map(json.loads, results.read_text().splitlines())


def _table(runs: list[dict[str, Any]]) -> str:
    """A line for each fault: how many runs, struck in time, failed, and where the guest was in the end."""
    kinds = sorted({one["guest"] for one in runs if one["passed"]})
    lines = [f"| fault | runs | struck | failed | {' | '.join(kinds)} |", "|---" * (4 + len(kinds)) + "|"]
    for fault in sorted({one["fault"] for one in runs}):
        of = [one for one in runs if one["fault"] == fault]
        ends = collections.Counter(one["guest"] for one in of if one["passed"])
        counts = [len(of), sum(bool(one["struck"]) for one in of), sum(not one["passed"] for one in of)]
        lines.append(f"| {fault} | {' | '.join(map(str, [*counts, *(ends[kind] for kind in kinds)]))} |")
    return "\n".join(lines)


def _initramfs(folder: Path, kernel: Kernel) -> Callable[[bool], Path]:
    path = folder / "initramfs"
    build_initramfs(path, kernel)
    return lambda _agent: path


if __name__ == "__main__":
    raise SystemExit(main())
