"""`demo`: two QEMUs, a guest that writes all the time, a live migration with its disk, and the proof of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qemu_blkmig.demo.guest import Kernel, Orders, Writer, boot_arguments, build_initramfs, find_kernel, odd_memory
from qemu_blkmig.demo.records import RecordsReport, check
from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import Refused, UsageError
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.migrate import migrate
from qemu_blkmig.job.options import MigrateOptions, OnStall, Selection, Target, Verify
from qemu_blkmig.job.place import Local
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.result import Result
from qemu_blkmig.qmp.socket import SocketMonitor

QEMU = "qemu-system-x86_64"
MEMORY = 160
"""MiB of RAM of the guest, about (see `odd_memory`)."""
BOOT = 60.0
"""Seconds in which the guest must have booted; two under TCG on an idle machine."""
BEFORE, AFTER = 1.0, 4.0
"""Seconds that the guest writes before the migration and, at the destination, after it."""
NOTICED, NEARLY = 30.0, 0.8
"""Seconds in which the guest should have noticed its pause, and how much of the measured one that is at least."""
BLOCK = 4096
"""Bytes of a record, see `records`."""
LEAST, MOST_FILLING = 1 << 20, 256 << 20
"""Bytes: the smallest disk, and most of the random data that is put on it."""
ACK = re.compile(r"blkmig ack vda seq (\d+)")
GAP = re.compile(r"blkmig ack vda seq \d+ gap_us (\d+)")


@dataclass(frozen=True)
class DemoOptions:
    """`disk_size` in bytes; `keep`: work there and leave everything."""

    disk_size: int = 512 << 20
    writer: Writer = "random"
    format: str = "raw"
    shared_base: bool = False
    keep: Path | None = None

    def __post_init__(self) -> None:
        if self.disk_size < LEAST or self.disk_size % 512:
            raise UsageError("--disk-size must be at least 1M, and a multiple of 512")
        if self.shared_base and self.format != "qcow2":
            raise UsageError("--shared-base needs --format qcow2: a raw image has no backing file")


class DemoResult(msgspec.Struct, frozen=True):
    """`records`: written by the guest in all; `records_after`: of these after the switchover; gaps in seconds."""

    migration: Result
    equal: bool
    records: int
    records_after: int
    lost: int
    torn: int
    longest_gap: float
    proven: bool
    kept: str | None


async def demo(options: DemoOptions, reporter: Reporter, clock: Clock) -> DemoResult:
    """Run the demo. Raises `Refused` when a program or kernel is missing, and what `migrate` raises."""
    for program in (QEMU, "qemu-img", "qemu-nbd"):
        if shutil.which(program) is None:
            raise Refused(f"{program} is missing", advice="install qemu-system-x86 and qemu-utils; `make demo` does")
    with _workplace(options.keep) as place:
        return await _Demo(options, place, reporter, clock).run()


@contextlib.contextmanager
def _workplace(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.iterdir()):
            raise Refused(f"{keep} is not empty", advice="name a new directory by --keep")
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="qemu-blkmig-demo-") as name:
        yield Path(name)


class _Demo:
    """One demo in one directory, with the two sides in folders of it."""

    def __init__(self, options: DemoOptions, place: Path, reporter: Reporter, clock: Clock) -> None:
        self._options = options
        self._reporter = reporter
        self._clock = clock
        self._place = place
        self._source = place / "source"
        self._destination = place / "destination"
        self._image = f"disk.{options.format}"
        self._orders = Orders(writer=options.writer, span=min(64 << 20, options.disk_size // 8))
        self._initramfs = place / "initramfs"

    async def run(self) -> DemoResult:
        """Boot, migrate, let it run on, prove."""
        kernel = find_kernel()
        self._source.mkdir()
        self._destination.mkdir()
        await asyncio.to_thread(build_initramfs, self._initramfs, kernel)
        await self._make_disk()
        self._reporter.note(f"booting a guest whose writer ({self._options.writer}) never rests")
        guest = await asyncio.create_subprocess_exec(*self._command(kernel, self._source))
        try:
            await self._wait_for_records(guest)
            await self._clock.sleep(BEFORE)
            result = await self._migrate(kernel)
        finally:
            if guest.returncode is None:
                guest.kill()
            await guest.wait()
        before = self._acked(self._source)
        return await self._prove(result, before)

    async def _make_disk(self) -> None:
        size, image = self._options.disk_size, self._source / self._image
        raw = image if self._options.format == "raw" else self._place / "filling"
        await asyncio.to_thread(_fill, raw, size, self._orders.span)
        if self._options.shared_base:
            base = self._place / "base.qcow2"
            await _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(base))
            await _run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(image))
        elif self._options.format != "raw":
            await _run("qemu-img", "convert", "-f", "raw", "-O", self._options.format, str(raw), str(image))
        if raw != image:
            raw.unlink()

    def _command(self, kernel: Kernel, side: Path) -> list[str]:
        return [
            QEMU, "-accel", "tcg", "-machine", "pc", "-cpu", "max", "-m", f"{odd_memory(MEMORY) >> 10}K", "-nodefaults",
            "-no-user-config", "-display", "none", "-serial", f"file:{side / 'console'}",
            "-qmp", f"unix:{side / 'qmp'},server=on,wait=off",
            "-blockdev", f"driver={self._options.format},node-name=disk0,file.driver=file,"
            f"file.filename={side / self._image}",
            "-device", "virtio-blk-pci,id=vda,drive=disk0",
            *boot_arguments(kernel, self._initramfs, self._orders),
        ]  # fmt: skip

    async def _wait_for_records(self, guest: asyncio.subprocess.Process) -> None:
        deadline = self._clock.now() + BOOT
        while not self._acked(self._source):
            if guest.returncode is not None:
                raise Refused(f"the demo's guest ended with status {guest.returncode} before it wrote")
            if self._clock.now() > deadline:
                raise Refused(
                    f"the demo's guest did not boot within {BOOT:.0f} s", advice="see `console` with --keep DIR"
                )
            await self._clock.sleep(0.1)

    async def _migrate(self, kernel: Kernel) -> Result:
        options = MigrateOptions(
            source=str(self._source / "qmp"),
            target=Target(Local(str(self._destination)), launch=shlex.join(self._command(kernel, self._destination))),
            selection=Selection(shared_base=self._options.shared_base),
            on_stall=OnStall.PAUSE,
            verify=Verify.FULL,
        )
        return await migrate(options, self._reporter, Interrupts(self._reporter.note), self._clock)

    async def _prove(self, result: Result, before: int) -> DemoResult:
        self._reporter.note("the guest runs on at the destination for a while")
        await self._clock.sleep(AFTER)
        await self._wait_for_gap(result.downtime.total if result.downtime is not None else 0.0)
        acked = max(before, self._acked(self._destination))
        await self._end_destination()
        report = await self._check_records(acked)
        equal = result.verified == "full"
        return DemoResult(
            migration=result,
            equal=equal,
            records=report.highest,
            records_after=max(0, report.highest - before),
            lost=len(report.lost) + len(report.misplaced),
            torn=len(report.torn),
            longest_gap=report.longest_gap,
            proven=equal and report.sound and report.highest > before,
            kept=str(self._place) if self._options.keep else None,
        )

    async def _wait_for_gap(self, downtime: float) -> None:
        """A guest that hardly gets the processor notices late, by its clock, that it has stood still."""
        deadline = self._clock.now() + NOTICED
        while self._gap() < NEARLY * downtime and self._clock.now() < deadline:
            await self._clock.sleep(0.1)

    async def _end_destination(self) -> None:
        monitor = await SocketMonitor.connect(str(self._destination / "qmp"), who="destination QEMU")
        try:
            await monitor.execute("stop")
            await monitor.execute("quit")
            await monitor.wait_lost()
        finally:
            await monitor.close()

    async def _check_records(self, acked: int) -> RecordsReport:
        image = self._destination / self._image
        raw = self._place / "result"
        await _run("qemu-img", "convert", "-f", self._options.format, "-O", "raw", str(image), str(raw))
        descriptor = os.open(raw, os.O_RDONLY)
        try:
            return await asyncio.to_thread(
                check, lambda offset, length: os.pread(descriptor, length, offset), self._options.disk_size, acked=acked
            )
        finally:
            os.close(descriptor)
            raw.unlink()

    def _gap(self) -> float:
        """Seconds of the longest gap that the guest has told of at the destination."""
        told = GAP.findall((self._destination / "console").read_text(errors="replace"))
        return max(map(int, told), default=0) / 1e6

    def _acked(self, side: Path) -> int:
        """The largest record number that the guest acknowledged on the console of one side."""
        try:
            console = (side / "console").read_text(errors="replace")
        except FileNotFoundError:
            return 0
        return max((int(number) for number in ACK.findall(console)), default=0)


def _fill(path: Path, size: int, span: int) -> None:
    """A sparse raw disk, its first quarter full of random data except where the guest's records go."""
    count, total = max(2, span // BLOCK), size // BLOCK
    with path.open("wb") as file:
        file.truncate(size)
        filled = 0
        for position in range(count - 1):
            start = position * (total - 1) // (count - 1) + 1
            end = (position + 1) * (total - 1) // (count - 1)
            if end * BLOCK > size // 4 or filled > MOST_FILLING:
                return
            file.seek(start * BLOCK)
            filled += file.write(os.urandom((end - start) * BLOCK))


async def _run(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(*arguments, stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    if process.returncode != 0:
        raise Refused(f"{arguments[0]} failed: {said.decode(errors='replace').strip()}")
