"""Runs qemu-blkmig, but holds it at one exact moment, so that a test can do its worst just then.

`python -m integration.held MOMENT hold|block FILE [virsh-blkmigrate] ARGUMENTS...`: at the moment it says
`{"event": "held"}` on stderr and waits until FILE exists, its event loop going on (hold) or not (block). Product code
stays clean of all this.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from qemu_blkmig.cli import virsh_blkmigrate
from qemu_blkmig.cli.main import main
from qemu_blkmig.engine.migration import BlockMigration
from qemu_blkmig.job.carriage import Carriage
from qemu_blkmig.job.durable import DurableFile
from qemu_blkmig.job.last_round import LastRound
from qemu_blkmig.job.lifecycle import Lifecycle
from qemu_blkmig.job.managed_switchover import ManagedSwitchover
from qemu_blkmig.job.record import Job, Owner
from qemu_blkmig.job.target import TargetQemu
from qemu_blkmig.qmp.ram import RamMigration
from qemu_blkmig.virt.gate import Gate
from qemu_blkmig.virt.migration import DomainMigration

Hold = Callable[[], Awaitable[None]]

AROUND: dict[str, tuple[type, str, str]] = {
    "planned": (Carriage, "prepare", "before"),
    "prepared": (Carriage, "prepare", "after"),
    "launched": (Lifecycle, "launch_target", "after"),
    "connected": (Carriage, "open", "after"),
    "copied": (BlockMigration, "bulk", "after"),
    "converged": (BlockMigration, "converge", "after"),
    "moving RAM": (RamMigration, "start", "after"),
    "paused": (RamMigration, "wait_paused", "after"),
    "last round over": (BlockMigration, "complete", "after"),
    "closed": (Carriage, "close", "after"),
    "undecided": (RamMigration, "proceed", "before"),
    "continued": (RamMigration, "proceed", "after"),
    "across": (RamMigration, "wait_completed", "after"),
    "completed": (TargetQemu, "start_guest", "before"),
    "started": (TargetQemu, "start_guest", "after"),
    "behind the gate": (LastRound, "keep_in_step", "after"),
    "handed over": (DomainMigration, "wait", "after"),
    "to begin beforehand": (ManagedSwitchover, "begin_beforehand", "before"),
    "begun beforehand": (ManagedSwitchover, "begin_beforehand", "after"),
}
"""Moments, by the method before or after which they lie; "decided", "storage" and those of the gate besides."""


def _hold_around(owner: type, name: str, when: str, hold: Hold) -> None:
    method = getattr(owner, name)

    @functools.wraps(method)
    async def held(*arguments: Any, **options: Any) -> Any:
        if when == "before":
            await hold()
        result = await method(*arguments, **options)
        if when == "after":
            await hold()
        return result

    setattr(owner, name, held)


def _hold_when_decided(hold: Callable[[], None]) -> None:
    save = Job.save

    async def held(self: Job, *, synced: bool = True, within: float | None = None) -> None:
        await save(self, synced=synced, within=within)
        if self.record.owner is Owner.DESTINATION:
            hold()

    Job.save = held  # type: ignore[method-assign]


def _hold_in_storage(hold: Callable[[], None]) -> None:
    """The disk of the state directory stalls when the record is to say that the destination may take the guest."""
    write = DurableFile._write

    def stalled(self: DurableFile, content: bytes, synced: bool) -> None:
        if msgspec.json.decode(content)["owner"] == Owner.UNDECIDED.value:
            hold()
        write(self, content, synced)

    DurableFile._write = stalled  # type: ignore[method-assign]


def _hold_at_the_gate(when: str, hold: Callable[[], None]) -> None:
    """Threads carry what it lets through, whatever becomes of the event loop."""
    opened = Gate.open

    def held(self: Gate) -> None:
        if when == "before":
            hold()
        opened(self)
        if when == "after":
            hold()

    Gate.open = held  # type: ignore[method-assign]


def _say_held() -> None:
    # In one piece: what the tool tells meanwhile would come between the words and the line's end.
    os.write(sys.stderr.fileno(), json.dumps({"event": "held"}).encode() + b"\n")


def _run() -> int:
    moment, kind, file = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    held = False

    def block() -> None:
        nonlocal held
        if not held:
            held = True
            _say_held()
            while not file.exists():
                time.sleep(0.01)

    async def hold() -> None:
        nonlocal held
        if kind == "block":
            block()
        elif not held:
            held = True
            _say_held()
            while not file.exists():  # noqa: ASYNC110 - it is another process that makes the file
                await asyncio.sleep(0.01)

    if moment == "decided":
        _hold_when_decided(block)
    elif moment == "storage":
        _hold_in_storage(block)
    elif moment in ("gate to be opened", "gate open"):
        _hold_at_the_gate("after" if moment == "gate open" else "before", block)
    else:
        _hold_around(*AROUND[moment], hold)
    if sys.argv[4] == "virsh-blkmigrate":
        return virsh_blkmigrate.main(sys.argv[5:])
    return main(sys.argv[4:])


if __name__ == "__main__":
    sys.exit(_run())
