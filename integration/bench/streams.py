"""How fast `save` and `load` are as whole commands, beside nbdcopy from NBD to a file, in rotated rounds of one run.

Run as `python -m integration.bench.streams [--size 1536M] [--rounds 5] [--directory /dev/shm]`. The source is a QEMU
that runs nothing, with a raw disk of random bytes; all files are in one directory, which should be tmpfs. A ratio
compares times of the same round: 2 is twice as fast as nbdcopy.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qemu_blkmig.units import parse_size
from tests.stream.qemus import Qemu, qemu

BASELINE = "nbdcopy"
POLL = 0.002


@dataclass(frozen=True)
class Bench:
    """A source of `size` bytes and the names of what is made of it; `stream` is there, the others come and go."""

    directory: Path
    size: int
    source: Qemu

    @property
    def stream(self) -> Path:
        """A saved stream, to be loaded."""
        return self.directory / "stream"

    @property
    def made(self) -> Path:
        """What a command makes."""
        return self.directory / "made"

    def nbdcopy(self) -> float:
        """Seconds of a copy from the source's NBD server."""
        place = self.directory / "nbd"
        self.source("nbd-server-start", addr={"type": "unix", "data": {"path": str(place)}})
        self.source("block-export-add", type="nbd", id="bench", node_name="vda", name="vda")
        try:
            return timed(["nbdcopy", f"nbd+unix:///vda?socket={place}", str(self.made)])
        finally:
            self.source("nbd-server-stop")

    def save(self) -> float:
        """Seconds of a save into a file."""
        return timed(blkmig("save", f"qmp:{self.source.qmp}", "--to", f"file:{self.made}", "--name", "vda=vda"))

    def first_byte(self) -> float:
        """Seconds until the first data of a save is in the stream."""
        began = time.monotonic()
        command = blkmig("save", f"qmp:{self.source.qmp}", "--to", f"file:{self.made}")
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as saving:
            growing = Path(f"{self.made}.incomplete")
            while not growing.exists() or growing.stat().st_size < 1 << 16:
                time.sleep(POLL)
            took = time.monotonic() - began
            saving.terminate()
        return took

    def load_file(self) -> float:
        """Seconds of a load from a file."""
        return timed(self._load(f"file:{self.stream}"))

    def load_socket(self) -> float:
        """Seconds of a load from a unix socket."""
        place = self.directory / "socket"
        began = time.monotonic()
        with subprocess.Popen(self._load(f"unix:{place}"), stdout=subprocess.DEVNULL) as loading:
            while not place.exists():
                time.sleep(POLL)
            with socket.socket(socket.AF_UNIX) as peer, self.stream.open("rb") as stream:
                peer.connect(str(place))
                peer.sendfile(stream)
        took = time.monotonic() - began
        if loading.returncode:
            raise RuntimeError(f"load failed with status {loading.returncode}")
        return took

    def _load(self, source: str) -> list[str]:
        return blkmig("load", "--from", source, "--create", "--size", str(self.size), f"vda={self.made}")


def blkmig(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qemu_blkmig", *arguments, "--progress", "none"]


def timed(command: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def measure(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Seconds by command, a number for each round; every round begins with another command."""
    commands: dict[str, Callable[[], float]] = {
        BASELINE: bench.nbdcopy,
        "save": bench.save,
        "load (file)": bench.load_file,
        "load (socket)": bench.load_socket,
        "save's first byte": bench.first_byte,
    }
    bench.save()
    bench.made.rename(bench.stream)
    taken: dict[str, list[float]] = {name: [] for name in commands}
    names = list(commands)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken[name].append(commands[name]())
            bench.made.unlink(missing_ok=True)
    return taken


def table(taken: dict[str, list[float]]) -> str:
    lines = [
        f"{'':20}{'seconds: median':>16}{'min':>7}{'max':>7}   {'speed by nbdcopy: median':>24}{'min':>7}{'max':>7}"
    ]
    for name, seconds in taken.items():
        line = f"{name:20}{statistics.median(seconds):16.2f}{min(seconds):7.2f}{max(seconds):7.2f}"
        if "first byte" not in name:
            ratios = [base / took for base, took in zip(taken[BASELINE], seconds, strict=True)]
            line += f"   {statistics.median(ratios):24.2f}{min(ratios):7.2f}{max(ratios):7.2f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=parse_size("1536M"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.directory) as name:
        directory = Path(name)
        os.environ["QEMU_BLKMIG_STATE_DIR"] = str(directory / "state")
        # As installed: compiled.
        os.environ["PYTHONPYCACHEPREFIX"] = str(directory / "bytecode")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        image = directory / "source"
        subprocess.run(["head", "-c", str(arguments.size), "/dev/urandom"], stdout=image.open("wb"), check=True)
        with qemu(
            directory / "qemu", "-blockdev", f"driver=raw,node-name=vda,file.driver=file,file.filename={image}",
            "-device", "virtio-blk-pci,drive=vda,id=vda",
        ) as source:  # fmt: skip
            print(f"load average before: {os.getloadavg()[0]:.1f}")
            print(table(measure(Bench(directory, arguments.size, source), arguments.rounds)))
            print(f"load average after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
