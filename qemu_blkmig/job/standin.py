"""What a watchdog does in a dead coordinator's stead: it settles the job, and stays until that is done.

Whoever wants to take over (`qemu-blkmig cleanup`) asks it to leave by `LEAVE`, which it heeds between two attempts, and
then waits for the job's lock: there are never two that settle one job.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.job.history import note_end
from qemu_blkmig.job.record import Job, read_record
from qemu_blkmig.job.settle import settle
from qemu_blkmig.job.settlement import DECISION, Settlement
from qemu_blkmig.outlet import Outlet

log = logging.getLogger(__name__)

LEAVE = signal.SIGUSR1
FIRST_PAUSE = 1.0
"""Seconds between the first two attempts; each further pause is twice as long."""
LONGEST_PAUSE = 30.0
SAYS = "qemu-blkmig watchdog: "
WAIT = 0.1
"""Seconds between two looks whether the job's lock is free."""


def stand_in(directory: Path, lock: int, *, told: bool) -> None:
    """Settle the job of a coordinator that is no more, and say what became of it on stderr.

    What is undecided is tried again for as long as the source QEMU lives, in silence: whoever reads our stderr is not
    kept waiting. `told`: the coordinator has tried, and said so.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [LEAVE])
    try:
        job = Job(directory, read_record(directory), lock)
    except FileNotFoundError:
        return
    settlement = Settlement(job.record.owner, decided=False) if told else _settle_first(job)
    if not settlement.decided and not settlement.left_there:
        _fall_silent()
        settlement = _persist(job, settlement)
    if settlement.decided and not settlement.suspended:
        how = "its coordinator ended unexpectedly; settled by its watchdog"
        note_end(directory, how, settlement.facts, settlement.owner.value)
        job.remove()


def _settle_first(job: Job) -> Settlement:
    settlement = _settle(job)
    name = job.record.job
    try:
        # What is to be tried again must not wait for a terminal that was stopped.
        said = Outlet(sys.stderr)
    except RuntimeError as error:
        # No thread is to be had.
        log.warning("what became of job %s cannot be told: %s", name, error)
        return settlement
    said.tell(f"{SAYS}the coordinator of job {name} ended unexpectedly: {'; '.join(settlement.facts)}")
    if settlement.suspended:
        said.tell(f"{SAYS}qemu-blkmig resume {name} goes on where it was; cleanup {name} removes what is left")
    elif not settlement.decided:
        said.tell(f"{SAYS}look at both sides, then run: qemu-blkmig cleanup {name}")
    said.close()
    return settlement


def _settle(job: Job) -> Settlement:
    """`settle`, whatever happens: nobody comes after us, and the guest may stand still."""
    try:
        return asyncio.run(settle(job, suspend=True))
    except Exception as error:
        log.exception("job %s", job.record.job)
        fact = f"job {job.record.job} could not be brought to rest: {type(error).__name__}: {error}"
        return Settlement(job.record.owner, decided=False, facts=[fact])


def ask_to_leave(directory: Path, seconds: float) -> bool:
    """Ask the watchdog that stays with the job in `directory` to leave it; True if none is there any more."""
    try:
        settler = read_record(directory).settler
    except (OSError, msgspec.DecodeError):
        return True
    if settler is None:
        return False
    deadline = time.monotonic() + seconds
    if settler.alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(settler.pid, LEAVE)
    while settler.alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(WAIT)
    return True


def _persist(job: Job, settlement: Settlement) -> Settlement:
    """Try again until it is decided, the source QEMU or the job's record is gone, or somebody takes over."""
    job.record.settler = ProcessId.of(os.getpid())
    with contextlib.suppress(OSError, RuntimeError):
        job.save_blocking(DECISION)
    pause, source_lives = FIRST_PAUSE, True
    while source_lives and not settlement.decided:
        if signal.sigtimedwait([LEAVE], pause) is not None:
            break
        if not os.fstat(job.lock).st_nlink:
            # Somebody removed the job's directory: nobody could ask us to leave any more.
            break
        pause = min(LONGEST_PAUSE, 2 * pause)
        process = job.record.source_process
        source_lives = job.record.managed is not None or (process is not None and process.alive)
        settlement = _settle(job)
    return settlement


def _fall_silent() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
