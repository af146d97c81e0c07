"""How fast whole copies are: qemu-blkmig and its peers on the same images in one run, in rotated order.

Run as `make bench`, or `python -m integration.bench [--quick] [--cases full-tcp,...] [--peers blkmig,...]`. All files
are in memory (--directory), so that no tool waits for storage and nobody has to sync. Every result's content is
checked: what another tool loses is told, and not counted; what we lose ends the benchmark. A ratio compares times of
the same round. The first round warms and is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from integration.bench.cases import NBDCOPY, Case, chosen
from integration.bench.elsewhere import Connection, Piped, Small
from integration.bench.images import make
from integration.bench.lines import line_of
from integration.bench.peers import Blkmig, Files, Mirror, OldEngine, Peer, Pull, Setting
from integration.bench.table import Measured, as_json, picture, table
from qemu_blkmig.units import parse_size

PEERS: tuple[Peer, ...] = (
    Blkmig("blkmig", "none"),
    Blkmig("blkmig verified", "written"),
    Small(),
    Mirror(),
    Pull(NBDCOPY),
    Pull("nbdcopy to qemu-nbd", through_server=True),
    Pull("qemu-img convert"),
    OldEngine(),
    Files(),
    Piped(),
    Connection(),
)


def measure(case: Case, peers: list[Peer], amount: int, rounds: int, directory: Path) -> Iterator[Measured]:
    """Copy by each of the peers in every round; `amount`: bytes of data in all disks together."""
    with tempfile.TemporaryDirectory(dir=directory) as name, line_of(case, directory) as line:
        folder = Path(name)
        target, scratch, sources = (folder / each for each in ("target", "scratch", "source"))
        for each in (target, scratch, sources):
            each.mkdir()
        images = [make(case.contents, sources / f"disk{number}.{case.format}", case.format, amount // case.disks)
                  for number in range(case.disks)]  # fmt: skip
        setting = Setting(case, images, target, scratch, line)
        for number in range(-1, rounds):
            turn = number % len(peers)
            for peer in peers[turn:] + peers[:turn]:
                own = peer.setting(setting) if isinstance(peer, Small) else setting
                rows = peer.copy(own)
                intact = own.is_intact()
                if not intact and (isinstance(peer, Blkmig) or peer.name == case.baseline):
                    raise RuntimeError(f"{case.name}: what {peer.name} copied is not what was there")
                if number >= 0:
                    data = sum(image.data for image in images)
                    yield from (Measured(case.name, row, number, data, usage, intact) for row, usage in rows.items())


@contextlib.contextmanager
def as_installed(directory: Path) -> Iterator[None]:
    """Ours as it is when installed, compiled, with its jobs noted in `directory`."""
    kept = dict(os.environ)
    os.environ["QEMU_BLKMIG_STATE_DIR"] = str(directory / "state")
    os.environ["PYTHONPYCACHEPREFIX"] = str(directory / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def options() -> argparse.ArgumentParser:
    """The command's."""
    parser = argparse.ArgumentParser(prog="integration.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three cases of 512 MiB, three rounds: some minutes")
    parser.add_argument("--cases", help="only these, separated by commas")
    parser.add_argument("--peers", help="the one that others are compared with, and these")
    parser.add_argument("--size", type=parse_size, help="data of each case (default: 1G; --quick: 512M)")
    parser.add_argument("--rounds", type=int, help="that are counted (default: 3)", default=3)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where all files are")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="folder for bench.json and bench.svg")
    return parser


def main() -> None:
    """The command."""
    parser = options()
    arguments = parser.parse_args()
    try:
        cases = chosen(arguments.cases, quick=arguments.quick)
    except ValueError as error:
        parser.error(str(error))
    there_are = [peer.name for peer in PEERS]
    names = there_are if arguments.peers is None else arguments.peers.split(",")
    if unknown := sorted(set(names) - set(there_are)):
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(there_are)}")
    size = arguments.size or (512 << 20 if arguments.quick else 1 << 30)
    measured: list[Measured] = []
    before = os.getloadavg()[0]
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.directory) as name, as_installed(Path(name)):
            for case in cases:
                peers = [peer for peer in PEERS if peer.name in (*names, case.baseline) and peer.applies(case)]
                of_case = []
                for each in measure(case, peers, size, arguments.rounds, Path(name)):
                    of_case.append(each)
                    lost = "" if each.intact else ", and lost data"
                    print(f"{each.case} {each.row}: {each.usage.seconds:.2f} s{lost}", file=sys.stderr, flush=True)
                measured += of_case
    finally:
        # What was measured is not lost if a later case fails.
        baselines = {case.name: case.baseline for case in cases}
        (arguments.output / "bench.json").write_text(as_json(measured))
        (arguments.output / "bench.svg").write_text(picture(measured, baselines))
        print(table(measured, baselines))
        print(f"\nload average before {before:.1f}, after {os.getloadavg()[0]:.1f}, of {os.cpu_count()} CPUs; "
              f"contents checked {len(measured)} times; figures and picture in {arguments.output}")  # fmt: skip


if __name__ == "__main__":
    main()
