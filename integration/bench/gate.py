"""How fast RAM migrates through the gate, beside straight from QEMU to QEMU, in alternating rounds of one run.

Run as `python -m integration.bench.gate [--size 1G] [--rounds 5]`. Two QEMUs that run nothing; the source's RAM is
full of random bytes. Seconds are of the wall's clock, from `migrate` until the destination has everything. A ratio
compares the same round: 0.9 is nine tenths of the speed without a gate.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from qemu_blkmig.units import parse_size
from qemu_blkmig.virt.gate import Gate
from tests.stream.qemus import Qemu, qemu

LOADED_AT = 1 << 20
"""Where random bytes begin in the guest's memory."""
POLL = 0.005


@contextlib.contextmanager
def gate_before(place: Path, listening: Path) -> Iterator[Gate]:
    """A gate at `place`, before the QEMU that waits at `listening`; open."""

    def connect() -> socket.socket:
        end = socket.socket(socket.AF_UNIX)
        end.connect(str(listening))
        return end

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        gate = Gate(listener, connect)
        gate.admit()
        gate.open()
        try:
            yield gate
        finally:
            gate.close()


def migration(directory: Path, size: int, content: Path, *, gated: bool) -> float:
    """Seconds that a migration of `size` bytes of RAM takes."""
    listening, place = directory / "incoming", directory / "gate"
    memory = ("-m", f"{size >> 20}M")
    loaded = ("-device", f"loader,file={content},addr={LOADED_AT:#x},force-raw=on")
    with contextlib.ExitStack() as stack:
        destination = stack.enter_context(qemu(directory / "b", *memory, "-incoming", f"unix:{listening}"))
        source = stack.enter_context(qemu(directory / "a", *memory, *loaded))
        source("migrate-set-parameters", max_bandwidth=1 << 40)
        if gated:
            stack.enter_context(gate_before(place, listening))
        began = time.monotonic()
        source("migrate", uri=f"unix:{place if gated else listening}")
        for end in (source, destination):
            _wait(end)
        return time.monotonic() - began


def _wait(end: Qemu) -> None:
    while (status := end("query-migrate").get("status")) != "completed":
        if status in ("failed", "cancelled"):
            raise SystemExit(f"the migration {status}")
        time.sleep(POLL)


def main() -> None:
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=1 << 30)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    ratios: list[float] = []
    with tempfile.TemporaryDirectory(prefix="gate-", dir="/dev/shm") as name:
        directory = Path(name)
        content = directory / "content"
        with content.open("wb") as file:
            for _ in range((given.size >> 20) - 8):
                file.write(os.urandom(1 << 20))
        for number in range(given.rounds):
            took: dict[bool, float] = {}
            for gated in (number % 2 == 0, number % 2 == 1):
                with tempfile.TemporaryDirectory(dir=directory) as folder:
                    took[gated] = migration(Path(folder), given.size, content, gated=gated)
            ratios.append(took[False] / took[True])
            print(f"round {number + 1}: straight {took[False]:.2f} s, through the gate {took[True]:.2f} s", flush=True)
    print(f"speed through the gate: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
