"""`virsh migrate --copy-storage-all` beside `virsh-blkmigrate`: what a move takes, and how long its guest stands still.

Run as `python -m integration.bench.virsh [--rounds 3] [--size 512M] [--writers idle,random] [--network 1Gbit]`. Two
libvirtds of the laboratory, guests under TCG, images in memory, in rotated order in one run; the guest's records are
checked after every move. virsh's image at the destination is made before its clock starts, as virsh wants it. QEMUs
that have ended are reaped at once, as by the init of a real host (`integration/bench/reaping.py`).

- virsh: disks and RAM each by a TCP connection of their own, as virsh has it; nothing is encrypted.
- virsh, TLS: the same with --tls; libvirt has certificates for migration.
- blkmig: as users run it, all through ssh, and all that it wrote read back.
- blkmig, unread: the same, and nothing is read back, as with virsh.
- blkmig, TLS: the disks' data past ssh, by TLS with a key of the job (--data tls://), RAM through ssh; read back.
- blkmig, TCP: disks and RAM by TCP, as virsh; read back, too.
- blkmig, bare: the same, and nothing is read back, as with virsh.

Each is told by the speed of its peers: what is encrypted by that of "virsh, TLS", and all by that of "virsh".

What was seen of --tls (libvirt 9.0, QEMU 7.2) in libvirt's log of what it tells QEMU: both QEMUs are given the
certificates (object-add of a tls-creds-x509, verify-peer: true), and have them in the destination's nbd-server-start,
in the source's blockdev-add of driver nbd, and in migrate-set-parameters on both sides: so disks and RAM have them. On
the network both connections began with a ServerHello that takes TLS_AES_256_GCM_SHA384 (ours asks ssh for aes128-gcm
first), and a record of the guest's writer began in none of the packets; without --tls in hundreds.
`integration/test_bench_virsh.py` looks for such records again, in every row.

The line between the hosts carries what the CPUs can: there whatever costs CPU counts, ciphers first of all. `--network`
limits it, each direction, alike for all rows: on a network that is slower than the CPUs, bytes count.

`--downtime` is ours (of virsh's, libvirt has no limit at its default, 300 ms of QEMU's for RAM). A bench for root.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import functools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.bench.reaping import go_on_under_an_init
from integration.bench.table import spread
from integration.hosts import ADDRESSES, REPOSITORY
from integration.network import Network
from integration.tool import finish, start
from integration.virthosts import two_virt_hosts, with_certificates
from integration.virtlab import VIRSH, Domain, VirtLab
from qemu_blkmig.demo.guest import Orders, Writer, build_initramfs, find_kernel
from qemu_blkmig.units import parse_size

MIB = 1 << 20
RATES: dict[Writer, int] = {"idle": 20}
"""Records a second; others write 200."""
SETTLED = 3
"""Seconds of writing after which a gap shows in what the guest tells."""
TCP = ("--data", f"tcp://{ADDRESSES['hosta']}", "--insecure",
       "--migrateuri", "tcp://hostb:49180", "--listen-address", "0.0.0.0")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A way to move a guest: by virsh-blkmigrate (`ours`) or virsh, with `options`; told by the speed of `peers`."""

    ours: bool
    encrypted: bool
    peers: Sequence[str] = ()
    options: Sequence[str] = ()


PLAIN, TLS = "virsh", "virsh, TLS"
ROWS = {
    PLAIN: Row(ours=False, encrypted=False),
    TLS: Row(ours=False, encrypted=True, peers=(PLAIN,), options=("--tls",)),
    "blkmig": Row(ours=True, encrypted=True, peers=(TLS, PLAIN)),
    "blkmig, unread": Row(ours=True, encrypted=True, peers=(TLS, PLAIN), options=("--verify", "none")),
    "blkmig, TLS": Row(
        ours=True, encrypted=True, peers=(TLS, PLAIN), options=("--data", f"tls://{ADDRESSES['hosta']}")
    ),
    "blkmig, TCP": Row(ours=True, encrypted=False, peers=(PLAIN,), options=TCP),
    "blkmig, bare": Row(ours=True, encrypted=False, peers=(PLAIN,), options=(*TCP, "--verify", "none")),
}


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

    def move(self, row: Row, name: str, writer: Writer) -> Move:
        """Boot a guest with an image of this new name, move it, and see that it has lost nothing."""
        rate = RATES.get(writer, 200)
        disk = self.lab.disk(name, 2 * self.size, data=[(offset, 64 * MIB) for offset in range(0, self.size, 64 * MIB)])
        domain = self.lab.boot(disk, orders=Orders(writer, rate=rate))
        domain.wait_for_writing(more=SETTLED * rate)
        there = self.lab.outside(disk.path, far=True)
        if not row.ours:
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", there, str(disk.size)], check=True)
        command = [*self.lab.entering, *self._command(row, domain)]
        began = time.monotonic()
        outcome = finish(start(command)).succeeded()
        seconds = time.monotonic() - began
        domain.wait_for_writing(far=True, more=SETTLED * rate)
        gap = domain.longest_gap(far=True)
        self.lab.assert_arrived(domain)
        domain.destroy()
        for far in (False, True):
            self.lab.outside(disk.path, far=far).unlink(missing_ok=True)
        return Move(seconds, gap, dict(outcome.result["phases"]) if row.ours else {})

    def _command(self, row: Row, domain: Domain) -> list[str]:
        words = ["--live", domain.name, self.lab.target, *row.options]
        if row.ours:
            return [*VIRSH, *words, "--downtime", str(self.downtime), "--progress", "none", "--output", "json"]
        return ["virsh", "migrate", "--copy-storage-all", *words]


@contextlib.contextmanager
def laboratory(directory: Path, mbit: int | None) -> Iterator[VirtLab]:
    """Hosts that have certificates, with a line of so many Mbit/s, in `directory`; ours is compiled, as installed."""
    compileall.compile_dir(REPOSITORY / "qemu_blkmig", quiet=1)
    kernel = find_kernel()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=directory) as name:
        folder = Path(name)

        @functools.cache
        def initramfs(agent: bool) -> Path:
            path = folder / f"{agent}.cpio"
            build_initramfs(path, kernel, agent=agent)
            return path

        certificates = folder / "certificates"
        certificates.mkdir()
        with two_virt_hosts(qemu_conf=with_certificates(certificates), directory=directory) as hosts:
            Network(hosts).limit(mbit)
            yield VirtLab(hosts, kernel, initramfs)


def measure(bench: Bench, writer: Writer, rounds: int) -> dict[str, list[Move]]:
    """Moves by row, one for each round; every round begins with another row."""
    found: dict[str, list[Move]] = {name: [] for name in ROWS}
    names = list(ROWS)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            move = bench.move(ROWS[name], f"{writer}-{number}-{names.index(name)}.qcow2", writer)
            print(f"{writer} {name}: {move.seconds:.2f} s, gap {1e3 * move.gap:.0f} ms", file=sys.stderr, flush=True)
            found[name].append(move)
    return found


def tell(writer: Writer, found: dict[str, list[Move]]) -> None:
    """Print what moves of such a guest took, and their speed by each peer's, compared within each round."""
    for name, moves in found.items():
        gaps = [1e3 * move.gap for move in moves]
        print(f"{writer:7} {name:15} {statistics.median(move.seconds for move in moves):6.2f} s; "
              f"gap {statistics.median(gaps):.0f} ms ({min(gaps):.0f} to {max(gaps):.0f})")  # fmt: skip
        for peer in ROWS[name].peers:
            speeds = [theirs.seconds / own.seconds for own, theirs in zip(moves, found[peer], strict=True)]
            print(f"{'':23} speed by that of {peer + ':':11}{spread(speeds)}")
        told = ", ".join(
            f"{phase} {statistics.median(move.phases.get(phase, 0.0) for move in moves):.2f}"
            for phase in moves[0].phases
        )
        if told:
            print(f"{'':23} of it {told} s")
    sys.stdout.flush()


def megabits(text: str) -> int:
    """Mbit/s from `1Gbit`, `100Mbit`. Raises `argparse.ArgumentTypeError`."""
    match = re.fullmatch(r"(\d+)([MG])bit", text)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"not the rate of a network, such as 100Mbit or 1Gbit: {text!r}")
    return int(match[1]) * {"M": 1, "G": 1000}[match[2]]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=parse_size, default=512 * MIB, help="of the guest's data")
    parser.add_argument("--writers", default="idle,random", help="of guests: idle, random, hot")
    parser.add_argument("--downtime", type=int, default=300, help="milliseconds")
    parser.add_argument(
        "--network", type=megabits, metavar="RATE", help="of the line, such as 1Gbit (default: no limit)"
    )
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where all files are")
    wanted = parser.parse_args()
    go_on_under_an_init()
    before = os.getloadavg()[0]
    with laboratory(wanted.directory, wanted.network) as lab:
        bench = Bench(lab, wanted.size, wanted.downtime)
        for writer in wanted.writers.split(","):
            tell(writer, measure(bench, writer, wanted.rounds))
    line = "as the CPUs have it" if wanted.network is None else f"{wanted.network} Mbit/s"
    print(f"line: {line}; load average before {before:.1f}, after {os.getloadavg()[0]:.1f}, of {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
