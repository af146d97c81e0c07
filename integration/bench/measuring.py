"""What a copy costs: seconds, CPU and memory of the source host's and the destination host's processes, told apart.

All run on this machine; which host a process would be on is told by its role, which its children inherit. CPU is read
from /proc while it runs (in ticks of 10 ms, and a process that ends loses what it used since it was last looked at, at
most `INTERVAL` of a second), memory is the sum of what each process had resident at most, a QEMU's guest and all; a
child that has not begun its own program yet shares its parent's.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

Side = Literal["source", "destination"]
INTERVAL = 0.02
FIRST_BYTE = 0.001
"""Seconds between two looks for the first byte."""
TICK = os.sysconf("SC_CLK_TCK")
OUR_AGENT = (b"qemu_blkmig.destination.agent", b"receive")
"""By these words a descendant of the coordinator is known to be on the destination host."""


@dataclass(frozen=True)
class Usage:
    """`seconds`: of the wall's clock; CPU seconds; bytes of memory. `begun_memory`: of what was begun for the copy."""

    seconds: float
    source_cpu: float
    destination_cpu: float
    source_memory: int
    destination_memory: int
    begun_memory: int


@dataclass
class _Process:
    """`parent`: whose side it is on unless its words tell otherwise, which they do only once it has begun them.

    `before`: CPU that it had used; None if it was begun for what is measured.
    """

    side: Side
    before: float | None = None
    parent: int | None = None
    cpu: float = 0.0
    memory: int = 0


class Meter:
    """Measures as long as its block lasts; processes are added as they are started, or before."""

    def __init__(self) -> None:
        self._processes: dict[int, _Process] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._look()
        for process in self._processes.values():
            process.before = process.cpu
        self._thread.start()
        self._began = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._seconds = time.monotonic() - self._began
        self._over.set()
        self._thread.join()
        self._look()

    def add(self, pid: int, side: Side) -> None:
        """Count this process and its descendants; what is there before the block begins, from then on."""
        with self._lock:
            self._processes[pid] = _Process(side)

    @property
    def usage(self) -> Usage:
        """What was used; after the block."""

        def total(side: Side) -> tuple[float, int]:
            found = [each for each in self._processes.values() if each.side == side]
            used = sum(max(0.0, each.cpu - (each.before or 0.0)) for each in found)
            return used, sum(each.memory for each in found)

        (source_cpu, source_memory), (destination_cpu, destination_memory) = total("source"), total("destination")
        begun = sum(each.memory for each in self._processes.values() if each.before is None)
        return Usage(self._seconds, source_cpu, destination_cpu, source_memory, destination_memory, begun)

    def _follow(self) -> None:
        while not self._over.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        with self._lock:
            waiting = list(self._processes)
            while waiting:
                pid = waiting.pop()
                process = self._processes[pid]
                if process.parent is not None:
                    process.side = _side(pid, self._processes[process.parent].side, process.side)
                process.cpu = max(process.cpu, cpu_seconds(pid))
                if process.parent is None or _read(pid, "cmdline") != _read(process.parent, "cmdline"):
                    process.memory = max(process.memory, _memory(pid))
                for child in _children(pid):
                    if child not in self._processes:
                        self._processes[child] = _Process(process.side, parent=pid)
                        waiting.append(child)


class FirstByte:
    """When the first byte was written to a file that was not there before; as long as its block lasts."""

    def __init__(self, path: Path) -> None:
        self.seconds: float | None = None
        self._path = path
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._over.wait(FIRST_BYTE):
            with contextlib.suppress(OSError):
                if self._path.stat().st_blocks:
                    self.seconds = time.monotonic() - self._began
                    return


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def cpu_seconds(pid: int) -> float:
    """What the process, without its children, has used; 0 once it is gone."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK if fields else 0.0


def _memory(pid: int) -> int:
    """Bytes that it had resident at most."""
    for line in _read(pid, "status").splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def _children(pid: int) -> list[int]:
    return [int(each) for each in _read(pid, f"task/{pid}/children").split()]


def _side(pid: int, inherited: Side, told: Side) -> Side:
    words = _read(pid, "cmdline")
    if not words:
        return told
    return "destination" if any(word in words for word in OUR_AGENT) else inherited
