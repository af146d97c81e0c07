"""Copies of one disk under way together, for the event loop: whoever asked for one is answered once that is over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from qemu_blkmig.destination.mover import DiskMover
from qemu_blkmig.destination.sink import Copying
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.nbd.control import Control, Tally


class Carrying:
    """A course, and who waits for its copies. Copies may `join` it from the start until it has ended."""

    def __init__(self, mover: DiskMover, extents: Sequence[Extent], control: Control, *, bulk: bool) -> None:
        """It begins with `first`, a copy of the extents. Raises `Refused`."""
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Copying, asyncio.Future[None]] = {}
        self._course = mover.course(extents, control, bulk=bulk, over=self._tell)
        self.first = self._expected(self._course.first)

    @property
    def idle(self) -> bool:
        """Whether all copies so far are over."""
        return not self._waiting

    @property
    def tally(self) -> Tally:
        """What of the copies that are not over is settled."""
        tallies = [copying.tally for copying in self._waiting]
        return Tally(
            sum(each.copied for each in tallies),
            sum(each.zeroed for each in tallies),
            sum(each.skipped for each in tallies),
        )

    def is_gone_on_with(self, extents: Sequence[Extent], *, bulk: bool) -> bool:
        """See `Course`."""
        return self._course.is_gone_on_with(extents, bulk=bulk)

    def join(self, extents: Sequence[Extent]) -> Copying:
        """Copy these as well. Raises `Refused`."""
        return self._expected(self._course.join(extents))

    async def over(self, copying: Copying) -> Tally:
        """Wait for the copy; raises what ended it."""
        await self._waiting[copying]
        return copying.tally

    async def run(self, in_thread: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Copy until no copy is left. Raises as `Course.run` does."""
        while self._waiting:
            await in_thread(self._course.run)
            self._course.check()

    def end(self, error: BaseException) -> None:
        """What is not over has ended by `error`."""
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(error)

    def _expected(self, copying: Copying) -> Copying:
        self._waiting[copying] = self._loop.create_future()
        return copying

    def _tell(self, copying: Copying) -> None:
        self._loop.call_soon_threadsafe(self._note, copying)

    def _note(self, copying: Copying) -> None:
        self._course.forget(copying)
        answer = self._waiting.pop(copying, None)
        if answer is not None and not answer.done():
            answer.set_result(None)
