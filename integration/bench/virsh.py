"""`virsh migrate --copy-storage-all` beside `virsh-blkmigrate`: what a move takes, and how long its guest stands still.

Run as `python -m integration.bench.virsh [--rounds 3] [--size 512M] [--writers idle,random]`. Two libvirtds of the
laboratory, guests under TCG, images in memory, in rotated order in one run; the guest's records are checked after every
move. virsh's image at the destination is made before its clock starts, as virsh wants it. QEMUs that have ended are
reaped at once, as by the init of a real host (`integration/bench/reaping.py`).

- virsh: disks and RAM each by a TCP connection of their own, as virsh has it.
- blkmig: as users run it, all through ssh, and all that it wrote read back.
- blkmig, TCP: disks and RAM by TCP, as virsh; read back, too.
- blkmig, bare: the same, and nothing is read back, as with virsh.

`--downtime` is ours (of virsh's, libvirt has no limit at its default, 300 ms of QEMU's for RAM). A bench for root.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.bench.reaping import go_on_under_an_init
from integration.bench.table import spread
from integration.hosts import ADDRESSES
from integration.tool import finish, start
from integration.virthosts import two_virt_hosts
from integration.virtlab import VIRSH, Domain, VirtLab
from qemu_blkmig.demo.guest import Orders, Writer, build_initramfs, find_kernel
from qemu_blkmig.units import parse_size

MIB = 1 << 20
PEER = "virsh"
TCP = ("--data", f"tcp://{ADDRESSES['hosta']}", "--insecure",
       "--migrateuri", "tcp://hostb:49180", "--listen-address", "0.0.0.0")  # fmt: skip
OURS: dict[str, Sequence[str]] = {
    "blkmig": (),
    "blkmig, TCP": TCP,
    "blkmig, bare": (*TCP, "--verify", "none"),
}
RATES: dict[Writer, int] = {"idle": 20}
"""Records a second; others write 200."""
SETTLED = 3
"""Seconds of writing after which a gap shows in what the guest tells."""


@dataclass(frozen=True)
class Move:
    """Seconds: of the command, of `gap`, the longest between two writes that the guest told, and of our `phases`."""

    seconds: float
    gap: float
    phases: dict[str, float]


@dataclass(frozen=True)
class Bench:
    """`size`: bytes of random data on the guest's disk of twice that size; `downtime`: milliseconds, of ours."""

    lab: VirtLab
    size: int
    downtime: int

    def move(self, who: str, name: str, writer: Writer) -> Move:
        """Boot a guest, move it, and see that it has lost nothing."""
        rate = RATES.get(writer, 200)
        disk = self.lab.disk(name, 2 * self.size, data=[(offset, 64 * MIB) for offset in range(0, self.size, 64 * MIB)])
        domain = self.lab.boot(disk, orders=Orders(writer, rate=rate))
        domain.wait_for_writing(more=SETTLED * rate)
        there = self.lab.outside(disk.path, far=True)
        if who == PEER:
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", there, str(disk.size)], check=True)
        phases: dict[str, float] = {}
        began = time.monotonic()
        if who == PEER:
            self.lab.hosts.virsh("migrate", "--live", "--copy-storage-all", domain.name, self.lab.target)
        else:
            phases = self._by_us(domain, *OURS[who])
        seconds = time.monotonic() - began
        domain.wait_for_writing(far=True, more=SETTLED * rate)
        gap = domain.longest_gap(far=True)
        self.lab.assert_arrived(domain)
        domain.destroy()
        for far in (False, True):
            self.lab.outside(disk.path, far=far).unlink(missing_ok=True)
        return Move(seconds, gap, phases)

    def _by_us(self, domain: Domain, *options: str) -> dict[str, float]:
        words = ["--live", domain.name, self.lab.target, "--downtime", str(self.downtime)]
        words += ["--progress", "none", "--output", "json", *options]
        result = finish(start([*self.lab.entering, *VIRSH, *words])).succeeded().result
        return dict(result["phases"])


def tell(writer: Writer, found: dict[str, list[Move]]) -> None:
    """Print what moves of such a guest took."""
    for who, moves in found.items():
        speeds = [peer.seconds / own.seconds for own, peer in zip(moves, found[PEER], strict=True)]
        gaps = [1e3 * move.gap for move in moves]
        print(
            f"{writer:7} {who:13} {statistics.median(move.seconds for move in moves):6.2f} s, speed by {PEER}'s "
            f"{spread(speeds)}; gap {statistics.median(gaps):.0f} ms ({min(gaps):.0f} to {max(gaps):.0f})",
            flush=True,
        )
        told = ", ".join(
            f"{name} {statistics.median(move.phases.get(name, 0.0) for move in moves):.2f}" for name in moves[0].phases
        )
        if told:
            print(f"{'':21} of it {told} s", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=parse_size, default=512 * MIB, help="of the guest's data")
    parser.add_argument("--writers", default="idle,random", help="of guests: idle, random, hot")
    parser.add_argument("--downtime", type=int, default=300, help="milliseconds")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where all files are")
    wanted = parser.parse_args()
    go_on_under_an_init()
    kernel = find_kernel()
    names = [PEER, *OURS]
    before = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=wanted.directory) as folder,
        two_virt_hosts(directory=wanted.directory) as hosts,
    ):

        @functools.cache
        def initramfs(agent: bool) -> Path:
            path = Path(folder) / f"{agent}.cpio"
            build_initramfs(path, kernel, agent=agent)
            return path

        bench = Bench(VirtLab(hosts, kernel, initramfs), wanted.size, wanted.downtime)
        for writer in wanted.writers.split(","):
            found: dict[str, list[Move]] = {name: [] for name in names}
            for number in range(wanted.rounds):
                turn = number % len(names)
                for who in names[turn:] + names[:turn]:
                    move = bench.move(who, f"{writer}-{number}-{names.index(who)}.qcow2", writer)
                    print(f"{writer} {who}: {move.seconds:.2f} s, gap {1e3 * move.gap:.0f} ms", file=sys.stderr)
                    found[who].append(move)
            tell(writer, found)
    print(f"load average before {before:.1f}, after {os.getloadavg()[0]:.1f}, of {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
