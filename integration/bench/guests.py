"""What a guest notices: how long it stands still when it moves, and how fast its writes are while its disk is copied.

Run as `python -m integration.bench.guests [--writers idle,random,hot] [--rounds 5] [--speed 100M]`. Real guests of the
laboratory (TCG), ours beside QEMU's mirror, in rotated order in one run; their records are checked after every move.

- gap: the longest time between two writes that the guest itself has told, over a move with its RAM;
- writes a second and their 99th percentile (QEMU's histogram of the disk's latency) while the disk is copied at
  `--speed`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from integration.bench.convergence import small_laboratory
from integration.lab import Guest, Lab, LabError
from integration.tool import arguments, assert_writes_soundly, migrate, start
from qemu_blkmig.demo.guest import Orders, Writer
from qemu_blkmig.units import parse_size

MIB = 1 << 20
POLL = 0.002
LIMIT = 120.0
BOUNDARIES = [round(50_000 * 1.2**step) for step in range(60)]
"""Of the histogram, in nanoseconds: 50 us to 2.3 s."""
SETTLED = 3.0
"""Seconds after which a gap shows in what the guest tells."""

Mode = Literal["background", "write-blocking"]


@dataclass(frozen=True)
class Speed:
    """Of a guest's writes: how many a second, and seconds that 99 of 100 take at most."""

    writes: float
    p99: float


@dataclass(frozen=True)
class Bench:
    """`speed`: bytes a second at which disks are copied while the guest's writes are measured."""

    lab: Lab
    speed: int
    seconds: float

    def moved_by_us(self, guest: Guest) -> Guest:
        """Migrate it; the guest at the destination."""
        outcome, arrived = migrate(self.lab, guest)
        outcome.succeeded()
        return arrived

    def moved_by_mirror(self, guest: Guest) -> Guest:
        """Migrate it as libvirt does: a mirror to the waiting QEMU's NBD server, ended while the guest is paused."""
        arrived = self._waiting(guest)
        place = {"type": "unix", "path": str(arrived.directory / "nbd")}
        arrived.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": place["path"]}}})
        arrived.execute("block-export-add", {"type": "nbd", "id": "to", "node-name": "disk0", "name": "to",
                                             "writable": True})  # fmt: skip
        mirror(guest, place, "background", 0)
        until(lambda: bool(job(guest).get("ready")))
        self._migrate_ram(guest, arrived)
        guest.execute("block-job-cancel", {"device": "mirror"})
        until(lambda: not job(guest))
        arrived.execute("nbd-server-stop")
        guest.execute("migrate-continue", {"state": "pre-switchover"})
        until(lambda: status(guest) == "completed")
        return arrived

    def _waiting(self, guest: Guest) -> Guest:
        arrived = self.lab.destination(guest)
        path = arrived.disks[0].path
        path.unlink(missing_ok=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "raw", path, str(guest.disks[0].size)], check=True)
        arrived.process = subprocess.Popen([*arrived.arguments(), "-incoming", "defer"],
                                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
        return arrived

    def _migrate_ram(self, guest: Guest, arrived: Guest) -> None:
        """Until the guest is paused, its RAM across."""
        uri = f"unix:{arrived.directory}/ram"
        arrived.execute("migrate-incoming", {"uri": uri})
        guest.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40, "downtime-limit": 300})
        pausing = [{"capability": "pause-before-switchover", "state": True}]
        guest.execute("migrate-set-capabilities", {"capabilities": pausing})
        guest.execute("migrate", {"uri": uri})
        until(lambda: status(guest) == "pre-switchover")

    def gap(self, name: str, writer: Writer, move: Callable[[Guest], Guest]) -> float:
        """Seconds that the guest's writer stood still, at most, until well after its move; infinite: for good."""
        disk = self.lab.disk(name, 256 * MIB, data=[(0, 128 * MIB)])
        rate = 100 if writer == "idle" else 400
        orders = Orders(writer=writer, rate=rate, span=32 * MIB)
        guest = self.lab.boot([disk], orders)
        guest.wait_for_writing(more=rate)
        arrived = move(guest)
        try:
            arrived.wait_for_writing(more=int(rate * SETTLED), timeout=30)
        except LabError:
            # QEMU 7.2 damages a busy guest under TCG now and then (docs/decisions/009-ram-under-tcg.md).
            print(f"{name}: the guest does not write at the destination: {arrived.status()}", file=sys.stderr)
            return math.inf
        took = arrived.longest_gap()
        assert_writes_soundly(arrived, more=20)
        for each in (guest, arrived):
            each.kill()
        return took

    def speed_of_writes(self, name: str, way: str) -> Speed:
        """How fast a guest writes, as fast as it can, while its disk is copied (or is not: `none`)."""
        size = int(self.speed * (self.seconds + 4)) // (64 * MIB) * 64 * MIB
        disk = self.lab.disk(name, size, data=[(offset, 64 * MIB) for offset in range(0, size, 64 * MIB)])
        guest = self.lab.boot([disk], Orders(writer="random", rate=0, span=64 * MIB))
        guest.wait_for_writing(more=5)
        copying: subprocess.Popen[str] | None = None
        target = self.lab.target / name
        if way == "ours":
            options = ("--bandwidth", self.speed, "--progress", "none", "--verify", "none")
            copying = start(arguments("copy", guest, self.lab.target, *options))
        elif way != "none":
            subprocess.run(["qemu-img", "create", "-q", "-f", "raw", target, str(size)], check=True)
            place = {"type": "unix", "path": str(guest.directory / "nbd")}
            server = subprocess.Popen(["qemu-nbd", "-t", "-f", "raw", "-k", place["path"], "-x", "to", str(target)])
            until(lambda: (guest.directory / "nbd").exists())
            mirror(guest, place, "write-blocking" if way == "mirror, blocking" else "background", self.speed)
        time.sleep(1.5)
        found = self._observe(guest)
        guest.kill()
        if copying is not None:
            copying.communicate(timeout=LIMIT)
        elif way != "none":
            server.kill()
            server.wait()
        target.unlink(missing_ok=True)
        guest.disks[0].path.unlink()
        return found

    def _observe(self, guest: Guest) -> Speed:
        (drive,) = guest.execute("query-block")
        guest.execute("block-latency-histogram-set", {"id": drive["qdev"], "boundaries-write": BOUNDARIES})
        before = operations(guest)
        began = time.monotonic()
        time.sleep(self.seconds)
        took = time.monotonic() - began
        (each,) = guest.execute("query-blockstats")
        return Speed((operations(guest) - before) / took, quantile(each["stats"]["wr_latency_histogram"], 0.99))


def mirror(guest: Guest, place: dict[str, str], mode: Mode, speed: int) -> None:
    """Begin a mirror to the export `to` of an NBD server."""
    guest.execute("blockdev-add", {"node-name": "to", "driver": "nbd", "server": place, "export": "to"})
    guest.execute("blockdev-mirror", {"job-id": "mirror", "device": "disk0", "target": "to", "sync": "full",
                                      "copy-mode": mode, "speed": speed})  # fmt: skip


def job(guest: Guest) -> dict[str, Any]:
    """The mirror's state; empty once it is over."""
    return dict(next(iter(guest.execute("query-block-jobs")), {}))


def status(guest: Guest) -> str:
    """Of its migration. Raises `RuntimeError` if it failed."""
    told = str(guest.execute("query-migrate").get("status"))
    if told in ("failed", "cancelled"):
        raise RuntimeError(f"the migration {told}")
    return told


def operations(guest: Guest) -> int:
    """Writes that its disk has completed."""
    (each,) = guest.execute("query-blockstats")
    return int(each["stats"]["wr_operations"])


def until(condition: Callable[[], bool]) -> None:
    """Wait, looking often. Raises `RuntimeError` after `LIMIT` seconds."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("waited in vain")
        time.sleep(POLL)


def quantile(histogram: dict[str, list[int]], share: float) -> float:
    """Seconds at the upper boundary of the bin that holds this share of all."""
    bins, boundaries = histogram["bins"], histogram["boundaries"]
    left = share * sum(bins)
    for count, boundary in zip(bins, boundaries, strict=False):
        left -= count
        if left <= 0:
            return boundary / 1e9
    return boundaries[-1] / 1e9


def gaps(rounds: int, writers: list[Writer]) -> None:
    """Print what the moves cost each kind of guest."""
    for writer in writers:
        found: dict[str, list[float]] = {"ours": [], "mirror": []}
        names = list(found)
        for number in range(rounds):
            with small_laboratory() as lab:
                bench = Bench(lab, 0, 0.0)
                moves = {"ours": bench.moved_by_us, "mirror": bench.moved_by_mirror}
                for way in names[number % 2 :] + names[: number % 2]:
                    found[way].append(bench.gap(f"{writer}-{way}", writer, moves[way]))
        told = "; ".join(
            f"{way} {statistics.median(each) * 1e3:.0f} ms ({min(each) * 1e3:.0f} to {max(each) * 1e3:.0f})"
            for way, each in found.items()
        )
        print(f"gap, {writer} writer: {told}", flush=True)


def speeds(rounds: int, speed: int, seconds: float) -> None:
    """Print how fast a guest writes in the meantime."""
    ways = ["none", "ours", "mirror", "mirror, blocking"]
    found: dict[str, list[Speed]] = {way: [] for way in ways}
    for number in range(rounds):
        with small_laboratory() as lab:
            bench = Bench(lab, speed, seconds)
            turn = number % len(ways)
            for way in ways[turn:] + ways[:turn]:
                found[way].append(bench.speed_of_writes(f"speed-{ways.index(way)}", way))
    for way, each in found.items():
        ratios = [own.writes / alone.writes for own, alone in zip(each, found["none"], strict=True)]
        print(
            f"writes, {way}: {statistics.median(one.writes for one in each):.0f}/s, of an undisturbed guest's "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
            f"p99 {statistics.median(one.p99 for one in each) * 1e3:.2f} ms",
            flush=True,
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", default="idle,random,hot", help="for the gaps; empty: none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--speed", type=parse_size, default=100 * MIB, help="of the copies; 0: not measured")
    parser.add_argument("--seconds", type=float, default=8)
    wanted = parser.parse_args()
    gaps(wanted.rounds, [each for each in wanted.writers.split(",") if each])
    if wanted.speed:
        speeds(wanted.rounds, wanted.speed, wanted.seconds)


if __name__ == "__main__":
    main()
