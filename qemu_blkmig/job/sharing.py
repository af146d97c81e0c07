"""Several jobs of one state directory share a budget of bandwidth, and take turns in the bulk pass; without a daemon.

A member is a file that it holds a lock (flock) on: whoever dies lets go at once. Each folder is looked at, and changed,
by one process at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from qemu_blkmig.errors import BlkmigError, Refused
from qemu_blkmig.job.options import Transfer
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.steering import Steering
from qemu_blkmig.places import state_directory
from qemu_blkmig.units import show_rate

log = logging.getLogger(__name__)

FOLDER = "sharing"
TURN = ".turn"
POLL = 0.3
"""Seconds between two looks at who else is there."""


class Circle:
    """The members in one folder; each is worth a number. All methods block for moments, and raise `OSError`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def join(self, name: str, worth: int, admits: Callable[[dict[str, int]], bool] = lambda _: True) -> int | None:
        """Become a member, if `admits` agrees to those that are there; the descriptor whose closing ends it."""
        with self._turn():
            if not admits(self._living()):
                return None
            member = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(member, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(member, str(worth).encode())
            except BaseException:
                os.close(member)
                raise
            return member

    def members(self) -> dict[str, int]:
        """Those that live, and what they are worth."""
        with self._turn():
            return self._living()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        turn = os.open(self._folder / TURN, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(turn, fcntl.LOCK_EX)
            yield
        finally:
            os.close(turn)

    def _living(self) -> dict[str, int]:
        found = {}
        for path in self._folder.iterdir():
            if path.name == TURN:
                continue
            member = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(member, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                with contextlib.suppress(ValueError):
                    found[path.name] = int(path.read_text())
            finally:
                os.close(member)
        return found


class Sharing:
    """This job's part in it, from before the bulk pass to the end of its work.

    Entering waits for a slot, where the number of them is bounded, and joins the group, where there is one. Raises
    `Refused` when the state directory does not allow it.
    """

    def __init__(self, job: str, transfer: Transfer, steering: Steering, reporter: Reporter) -> None:
        self._job = job
        self._transfer = transfer
        self._steering = steering
        self._reporter = reporter
        self._slot: int | None = None
        self._held: list[int] = []
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Sharing:
        try:
            if self._transfer.slots is not None:
                await self._wait_for_slot(self._transfer.slots)
            if self._transfer.group is not None:
                await self._join_group()
        except OSError as error:
            self._let_go()
            raise Refused(f"cannot share with other jobs in {state_directory() / FOLDER}: {error}") from error
        except BaseException:
            self._let_go()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()

    def bulk_over(self) -> None:
        """The bulk pass is done: the slot is another's."""
        if self._slot is not None:
            os.close(self._slot)
            self._slot = None

    def _let_go(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        self.bulk_over()
        while self._held:
            os.close(self._held.pop())

    async def _wait_for_slot(self, slots: int) -> None:
        """In the order of coming."""
        line, taken = Circle(state_directory() / FOLDER / "line"), Circle(state_directory() / FOLDER / "slots")
        place = await asyncio.to_thread(line.join, self._job, time.time_ns())
        told = None
        try:
            while True:
                waiting = await asyncio.to_thread(line.members)
                if min(waiting, key=lambda name: (waiting[name], name)) == self._job:
                    self._slot = await asyncio.to_thread(taken.join, self._job, 1, lambda members: len(members) < slots)
                    if self._slot is not None:
                        return
                in_use = len(await asyncio.to_thread(taken.members))
                text = f"waits for a slot, {in_use} of {slots} taken"
                if text != told:
                    if told is None:
                        self._reporter.stage("waiting")
                    told = text
                    self._reporter.note(text)
                await asyncio.sleep(POLL)
        finally:
            if place is not None:
                os.close(place)

    async def _join_group(self) -> None:
        name, rate = self._transfer.group or ("", 0)
        group = Circle(state_directory() / FOLDER / f"group-{name}")
        member = await asyncio.to_thread(group.join, self._job, rate)
        if member is not None:
            self._held.append(member)
        least = await self._divide(group)
        if least is not None and least < rate:
            self._reporter.note(f"group {name} has {show_rate(least)} in all, as another of its jobs asked for")
        self._watching = asyncio.create_task(self._watch(group))

    async def _watch(self, group: Circle) -> None:
        while True:
            await asyncio.sleep(POLL)
            try:
                await self._divide(group)
            except (OSError, BlkmigError) as error:
                log.warning("the share of bandwidth could not be found out or set: %s", error)

    async def _divide(self, group: Circle) -> int | None:
        """Everybody gets the same; of budgets that differ the smallest counts. Returns that; None: nobody is there."""
        members = await asyncio.to_thread(group.members)
        least = min(members.values(), default=None)
        share = None if least is None else max(1, least // len(members))
        if share != self._steering.share:
            self._steering.share = share
            await self._steering.changed()
        return least
