"""Runs qemu-blkmig as its users do, and holds what it said against what it promises."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.lab import Guest, Lab, assert_records_sound
from integration.promised import assert_output_promised

COMMAND = [sys.executable, "-m", "qemu_blkmig"]
LIMIT = 120.0
"""Seconds that no run of the tool in these tests comes near."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """An ended run of the tool."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """What it printed with --output json."""
        parsed: dict[str, Any] = json.loads(self.stdout)
        return parsed

    @property
    def progress(self) -> list[dict[str, Any]]:
        """What it printed with --progress json; error lines at the end are not part of it."""
        return [json.loads(line) for line in self.stderr.splitlines() if line.startswith("{")]

    def succeeded(self) -> Outcome:
        """Assert that it went well."""
        told = [line for line in self.stderr.splitlines() if not line.startswith("{")]
        assert self.code == 0, f"exit code {self.code}: {told}"
        return self

    def failed(self, code: int, *words: str, now: str | None = None) -> Outcome:
        """Assert that it ended with `code`, and that its message holds all of `words`, and `now` of how things are."""
        assert self.code == code, f"exit code {self.code}, not {code}: {self.stderr}{self.stdout}"
        lines = [line for line in self.stderr.splitlines() if not line.startswith("{")]
        told = "\n".join(lines)
        for word in words:
            assert word in told, f"{word!r} is not in: {told}"
        assert "Traceback" not in told and "defect of qemu-blkmig" not in told, told
        if now is not None:
            state = [line for line in lines if line.startswith("  now:  ")]
            assert state and now in state[0], f"{now!r} is not how things are in: {told}"
        return self


def arguments(command: str, source: str | Path | Guest, directory: Path, *options: object) -> list[str]:
    """The tool's command line: `source` is a guest, an image, or a source as it is written."""
    if isinstance(source, Guest):
        source = f"qmp:{source.qmp}"
    elif isinstance(source, Path):
        source = f"image:{source}"
    return [*COMMAND, command, source, f"local:{directory}", *map(str, options)]


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start the tool; `finish` waits for it."""
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    """Wait for the end of a run. One that hangs is killed, and fails the test."""
    try:
        stdout, stderr = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        raise AssertionError(f"the tool hung: {stdout}{stderr}") from None
    if process.returncode >= 0 and isinstance(process.args, list):
        assert_output_promised(process.args, stdout, stderr)
    return Outcome(process.returncode, stdout, stderr)


def run(command: str, source: str | Path | Guest, directory: Path, *options: object) -> Outcome:
    """Run the tool to its end."""
    return finish(start(arguments(command, source, directory, *options)))


def migrate(lab: Lab, guest: Guest, *options: object) -> tuple[Outcome, Guest]:
    """`migrate --launch` to the laboratory's `target`; the outcome and the guest at the destination."""
    launched = lab.destination(guest)
    command = ("--launch", guest.launch_command(lab.target), "--output", "json")
    return run("migrate", guest, lab.target, *command, *options), launched


def give_up(lab: Lab) -> None:
    """Clean up the one job that was suspended."""
    (job,) = (path.parent.name for path in lab.state.glob("*/record.json"))
    finish(start([*COMMAND, "cleanup", job])).succeeded()


def assert_writes_soundly(guest: Guest, *, more: int = 50) -> None:
    """Assert that the guest runs and writes, and that no record is lost or torn; it runs on afterwards."""
    assert guest.status() == "running"
    guest.wait_for_writing(more=more)
    guest.pause()
    try:
        for disk, name in zip(guest.disks, device_names(guest), strict=True):
            if not disk.read_only:
                assert_records_sound(disk, guest.acked(name))
    finally:
        guest.resume()


def device_names(guest: Guest) -> list[str]:
    """What the guest calls its disks."""
    names = []
    count = {"virtio": 0, "scsi": 0}
    prefix = {"virtio": "vd", "scsi": "sd"}
    for disk in guest.disks:
        names.append(prefix[disk.bus] + chr(ord("a") + count[disk.bus]))
        count[disk.bus] += 1
    return names


def assert_figures_add_up(result: dict[str, Any]) -> None:
    """Assert that a result accounts for every byte of every disk at least once."""
    for disk in result["disks"]:
        settled = disk["copied"] + disk["zeroed"] + disk["skipped"]
        assert settled >= disk["virtual_size"], disk
    assert result["total_copied"] == sum(disk["copied"] for disk in result["disks"])


def assert_runs_on(lab: Lab, guest: Guest, *directories: Path) -> None:
    """Assert that an attempt that came to nothing left the guest writing soundly, and nothing of itself."""
    assert_writes_soundly(guest)
    assert_nothing_left(lab, guest, *directories)


def assert_nothing_left(lab: Lab, guest: Guest, *directories: Path) -> None:
    """Assert that nothing of ours is in the guest's QEMU, among the processes, in any folder, or among the jobs."""
    lab.assert_no_leftovers(guest, directories=[lab.target, *directories])
    with contextlib.suppress(FileNotFoundError):
        assert not [path for path in lab.state.iterdir() if path.name not in ("history", "bases.json")]
