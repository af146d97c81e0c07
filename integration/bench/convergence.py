"""What rounds send of a real guest that writes all the time: ours, without putting off, and blockdev-mirror.

Run as `python -m integration.bench.convergence [--writers hot,zipf,...] [--seconds 20] [--bandwidth 1G] [--rounds 1]`.
In one run, with guests of the laboratory (TCG), in rotated order: after the first pass the disk is kept in step for so
many seconds (`--switchover manual`), then the guest moves, and its records are checked. Told are the bytes that were
sent after the first pass, and their ratio to those without putting off (`--put-off no`).

A low `--bandwidth` leaves little room for what is put off, which is judged by the speed of rounds.

`faster`: a guest that writes faster than 8 MiB a second, at which its disk is copied, with `--on-stall throttle`: the
bound that was told beforehand, and what it took.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from integration.lab import Guest, Lab, laboratory, wait_until
from integration.tool import COMMAND, arguments, assert_writes_soundly, finish, start
from qemu_blkmig.demo.guest import Orders, Writer, build_initramfs, find_kernel
from qemu_blkmig.units import parse_size, show_bytes

MIB = 1 << 20
WAYS = ("naive", "ours", "mirror")
SLOW = 8 * MIB
"""Bytes a second at which the disk of a guest is copied that writes faster."""


@dataclass(frozen=True)
class Bench:
    """`size`: bytes of the disk, which records are written all over; `rate`: records a second; `bandwidth`: bytes a
    second. `seconds`: how long the disk is kept in step."""

    lab: Lab
    size: int
    rate: int
    bandwidth: int
    seconds: float

    def guest(self, name: str, writer: Writer) -> Guest:
        """A guest that has begun to write."""
        disk = self.lab.disk(name, self.size, data=[(0, self.size // 8)])
        guest = self.lab.boot([disk], Orders(writer=writer, rate=self.rate, span=self.size))
        guest.wait_for_writing(more=2 * self.rate)
        return guest

    def _command(self, guest: Guest, bandwidth: int) -> list[str]:
        shown = ("--output", "json", "--progress", "json", "--bandwidth", bandwidth)
        return arguments("migrate", guest, self.lab.target, "--launch", guest.launch_command(self.lab.target), *shown)

    def migrate(self, name: str, writer: Writer, put_off: str) -> int:
        """Bytes that rounds have sent of a guest that was kept in step, and moved."""
        guest = self.guest(name, writer)
        arrived = self.lab.destination(guest)
        process = start(
            [
                *self._command(guest, self.bandwidth),
                "--switchover",
                "manual",
                "--put-off",
                put_off,
                "--on-stall",
                "pause",
            ]
        )
        stage(process, "standby")
        time.sleep(self.seconds)
        (job,) = (path.parent.name for path in self.lab.state.glob("*/record.json"))
        subprocess.run([*COMMAND, "switchover", job], check=True, stdout=subprocess.DEVNULL)
        (disk,) = finish(process).succeeded().result["disks"]
        assert_writes_soundly(arrived, more=20)
        arrived.kill()
        return int(disk["copied_dirty"])

    def mirror(self, name: str, writer: Writer) -> int:
        """Bytes that a background mirror has sent beyond its first pass, in the same time."""
        guest = self.guest(name, writer)
        target = self.lab.target / name
        subprocess.run(["qemu-img", "create", "-q", "-f", "raw", target, str(self.size)], check=True)
        guest.execute("blockdev-add", {"node-name": "target", "driver": "raw",
                                       "file": {"driver": "file", "filename": str(target)}})  # fmt: skip
        (drive,) = guest.execute("query-block")
        guest.execute("blockdev-mirror", {"job-id": "mirror", "device": drive["inserted"]["node-name"],
                                          "target": "target", "sync": "full", "speed": self.bandwidth,
                                          "granularity": 65536})  # fmt: skip
        wait_until(lambda: job(guest)["ready"], "the mirror", 300)
        first = job(guest)["offset"]
        time.sleep(self.seconds)
        sent = job(guest)["offset"] - first
        guest.execute("block-job-cancel", {"device": "mirror", "force": True})
        guest.kill()
        return int(sent)

    def faster(self, name: str) -> str:
        """Have a guest that writes faster than it is copied slowed; what was told, and what came."""
        guest = self.guest(name, "random")
        arrived = self.lab.destination(guest)
        process = start([*self._command(guest, SLOW), "--max-rounds", "3", "--on-stall", "throttle"])
        outcome = finish(process).succeeded()
        events = outcome.progress
        slowed = [each for each in events if "are slowed" in each.get("text", "")]
        if not slowed:
            return "it converged without being slowed"
        ram = next(each for each in events if each.get("stage") == "ram" and each["event"] == "stage")
        told = re.search(r"converges within ([^;]+) then", slowed[0]["text"])
        assert_writes_soundly(arrived, more=20)
        arrived.kill()
        return (
            f"told to converge within {told.group(1) if told else '?'}, took {ram['time'] - slowed[0]['time']:.1f} s, "
            f"slowed {len(slowed)} times: {json.dumps(outcome.result['slowed'])}"
        )


def job(guest: Guest) -> dict[str, Any]:
    """The mirror's state."""
    (found,) = guest.execute("query-block-jobs")
    return dict(found)


def stage(process: subprocess.Popen[str], name: str) -> None:
    """Wait until the tool is in this phase; its further progress stays to be read."""
    if process.stderr is None:
        raise RuntimeError("its stderr is not read")
    while line := process.stderr.readline():
        if json.loads(line).get("stage") == name:
            return
    raise RuntimeError(f"the tool ended: {process.communicate()}")


def measure(bench: Bench, writer: Writer, rounds: int) -> dict[str, list[int]]:
    """Bytes by way, a number for each round."""
    ways: dict[str, Callable[[str], int]] = {
        "naive": lambda name: bench.migrate(name, writer, "no"),
        "ours": lambda name: bench.migrate(name, writer, "yes"),
        "mirror": lambda name: bench.mirror(name, writer),
    }
    sent: dict[str, list[int]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            sent[way].append(ways[way](f"{writer}-{way}-{number}"))
    return sent


@contextlib.contextmanager
def small_laboratory() -> Iterator[Lab]:
    """A laboratory with a guest made for it."""
    kernel = find_kernel()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guest.cpio"
        build_initramfs(path, kernel, agent=False)
        with laboratory(kernel, lambda _: path) as lab:
            yield lab


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", default="hot,zipf,log,sequential,random,faster")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--size", type=parse_size, default=64 * MIB)
    parser.add_argument("--rate", type=int, default=400, help="records of 4 KiB a second")
    parser.add_argument("--bandwidth", type=parse_size, default=1024 * MIB)
    wanted = parser.parse_args()
    for writer in wanted.writers.split(","):
        with small_laboratory() as lab:
            bench = Bench(lab, wanted.size, wanted.rate, wanted.bandwidth, wanted.seconds)
            if writer == "faster":
                print(f"faster: {bench.faster('faster')}", flush=True)
                continue
            if writer not in get_args(Writer):
                parser.error(f"there is no writer {writer}")
            sent = measure(bench, writer, wanted.rounds)
        middle = {way: statistics.median(each) for way, each in sent.items()}
        told = ", ".join(f"{way} {show_bytes(int(middle[way]))}" for way in WAYS)
        ratios = [ours / naive for ours, naive in zip(sent["ours"], sent["naive"], strict=True)]
        print(
            f"{writer}: {told}; ours / naive {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"ours / mirror {middle['ours'] / max(1, middle['mirror']):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
