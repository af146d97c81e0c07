"""Several jobs of one state directory share a budget of bandwidth, and take turns in the bulk pass; without a daemon.

A member is a file that it holds a lock (flock) on: whoever dies lets go at once. Each folder is looked at, and changed,
by one process at a time.

In the file of a group's member stands what it makes use of, by what it has carried in the last seconds. All work out
the same division from that: nobody has less than an even share, and what somebody leaves of it goes to those who have
use for more.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import msgspec

from qemu_blkmig.engine.outlast import outlast
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
HOLD = 2.0
"""Seconds in which a share that was made use of stays: rounds come at short intervals."""
FULL = 0.85
"""The part of its limit from which on a job could do with more."""
MARGIN = 1.1
"""How much more than it carries a job that could not do with more is left."""
STEP = 0.05
"""The part by which a share must change to be worth telling."""


class Member(NamedTuple):
    """`worth`: a number that it has joined with, a group's budget in bytes a second. `wants`: bytes a second that it
    makes use of; None: as many as there are.
    """

    worth: int
    wants: int | None


def divide(members: Mapping[str, Member]) -> dict[str, int]:
    """Bytes a second for each: the smallest budget evenly, but what some leave of their part goes to the others.

    Who leaves some keeps an even share as a limit, so that it need not ask before it carries more.
    """
    rest = least = min(member.worth for member in members.values())
    even = level = max(1, least // len(members))
    for left, wants in enumerate(sorted(_wish(member) for member in members.values())):
        level = max(even, int(rest / (len(members) - left)))
        if wants >= level:
            break
        rest -= int(wants)
    return {name: level if _wish(member) >= even else even for name, member in members.items()}


def _wish(member: Member) -> float:
    return math.inf if member.wants is None else member.wants


class Circle:
    """The members in one folder. All methods block for moments, and raise `OSError`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def join(self, name: str, worth: int, admits: Callable[[dict[str, Member]], bool] = lambda _: True) -> int | None:
        """Become a member, if `admits` agrees to those that are there; the descriptor whose closing ends it."""
        with self._turn():
            if not admits(self._living()):
                return None
            member = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(member, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _write(member, Member(worth, None))
            except BaseException:
                os.close(member)
                raise
            return member

    def members(self) -> dict[str, Member]:
        """Those that live."""
        with self._turn():
            return self._living()

    def tell(self, name: str, member: Member) -> dict[str, Member]:
        """What the member of this name has to say; those that live.

        By its name: the descriptor that makes it one may be closed, and be another file's, before it is its turn.
        """
        with self._turn():
            descriptor = os.open(self._folder / name, os.O_RDWR | os.O_CLOEXEC)
            try:
                _write(descriptor, member)
            finally:
                os.close(descriptor)
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

    def _living(self) -> dict[str, Member]:
        found = {}
        for path in self._folder.iterdir():
            if path.name == TURN:
                continue
            member = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(member, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                with contextlib.suppress(msgspec.DecodeError):
                    found[path.name] = msgspec.json.decode(path.read_bytes(), type=Member)
            finally:
                os.close(member)
        return found


def _write(descriptor: int, member: Member) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, msgspec.json.encode(member), 0)


class Appetite:
    """What a job makes use of, by how much it has carried: `payload` tells that, in bytes so far."""

    def __init__(self, payload: Callable[[], Awaitable[int]], steering: Steering) -> None:
        self._payload = payload
        self._steering = steering
        self._began: float | None = None
        self._seen = (0.0, 0)
        self._lately: deque[tuple[float, float]] = deque()

    async def wants(self) -> int | None:
        """Bytes a second; None: all that there are, as far as can be told."""
        now = asyncio.get_running_loop().time()
        try:
            carried = await self._payload()
        except BlkmigError as error:
            log.debug("what was carried is not known: %s", error)
            return None
        (before, known), self._seen = self._seen, (now, carried)
        if self._began is None:
            self._began = now
            return None
        used = (carried - known) / max(now - before, 1e-3)
        self._lately.append((now, used))
        while self._lately[0][0] < now - HOLD:
            self._lately.popleft()
        own, share = self._steering.own, self._steering.share
        bounded = own is not None and share is not None and own <= share
        if now - self._began < HOLD or (not bounded and share is not None and used >= FULL * share):
            return own if bounded else None
        return min(int(MARGIN * max(rate for _, rate in self._lately)), sys.maxsize if own is None else own)


class Sharing:
    """This job's part in it, from before the bulk pass to the end of its work.

    Entering waits for a slot, where the number of them is bounded, and joins the group, where there is one. Raises
    `Refused` when the state directory does not allow it. `payload`: tells the bytes that the job has carried so far.
    """

    def __init__(
        self,
        job: str,
        transfer: Transfer,
        steering: Steering,
        reporter: Reporter,
        payload: Callable[[], Awaitable[int]],
    ) -> None:
        self._job = job
        self._transfer = transfer
        self._appetite = Appetite(payload, steering)
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
        place = await _joined(line, self._job, time.time_ns())
        told = None
        try:
            while True:
                waiting = await asyncio.to_thread(line.members)
                if min(waiting, key=lambda name: (waiting[name].worth, name)) == self._job:
                    self._slot = await _joined(taken, self._job, 1, lambda members: len(members) < slots)
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
        member = await _joined(group, self._job, rate)
        if member is None:
            raise RuntimeError("a group admits everybody")
        self._held.append(member)
        least = await self._divide(group, rate)
        if least < rate:
            self._reporter.note(f"group {name} has {show_rate(least)} in all, as another of its jobs asked for")
        self._watching = asyncio.create_task(self._watch(group, rate))

    async def _watch(self, group: Circle, rate: int) -> None:
        while True:
            await asyncio.sleep(POLL)
            try:
                await self._divide(group, rate)
            except (OSError, BlkmigError) as error:
                log.warning("the share of bandwidth could not be found out or set: %s", error)

    async def _divide(self, group: Circle, rate: int) -> int:
        """Tell what this job makes use of, and take its share; the budget, which is the smallest of all."""
        wants = await self._appetite.wants()
        members = await asyncio.to_thread(group.tell, self._job, Member(rate, wants))
        members[self._job] = Member(rate, wants)
        share, least = divide(members)[self._job], min(member.worth for member in members.values())
        before = self._steering.share
        even = share == max(1, least // len(members))
        if before is None or (share != before and (even or abs(share - before) > STEP * before)):
            self._steering.share = share
            await self._steering.changed()
        return least


async def _joined(
    circle: Circle, name: str, worth: int, admits: Callable[[dict[str, Member]], bool] = lambda _: True
) -> int | None:
    """`Circle.join` in a thread; who is cancelled meanwhile is no member, or would be one for as long as we live."""
    joining = await outlast(asyncio.to_thread(circle.join, name, worth, admits))
    member = joining.result()
    try:
        joining.raise_cancellation()
    except asyncio.CancelledError:
        if member is not None:
            os.close(member)
        raise
    return member
