"""Steps that must not be left half done, however often the task that takes them is cancelled; and several at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Outlasted(Generic[T]):
    """A step that has ended, and the cancellation that came meanwhile, to be raised when things are in order."""

    def __init__(self, task: asyncio.Task[T], cancellation: asyncio.CancelledError | None) -> None:
        self._task = task
        self._cancellation = cancellation

    def result(self) -> T:
        """What the step returned; raises what it raised, or from that the cancellation."""
        if self.failure is not None and self._cancellation is not None:
            raise self._cancellation from self.failure
        return self._task.result()

    @property
    def failure(self) -> BaseException | None:
        """What the step raised, if it did."""
        return asyncio.CancelledError() if self._task.cancelled() else self._task.exception()

    def raise_cancellation(self) -> None:
        """Raise the cancellation, if there was one."""
        if self._cancellation is not None:
            raise self._cancellation


async def outlast(step: Coroutine[Any, Any, T]) -> Outlasted[T]:
    """Run `step` to its end, whatever it is and however often the caller is cancelled meanwhile. Never raises."""
    task = asyncio.ensure_future(step)
    cancellation = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancellation = error
    return Outlasted(task, cancellation)


async def only_wait(step: asyncio.Future[T]) -> T:
    """Wait for `step`, which goes on if the caller is cancelled; what it raises then is heard by nobody."""
    step.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return await asyncio.shield(step)


async def undo(step: Coroutine[Any, Any, None], error: BaseException, what: str) -> None:
    """Run the clean-up `step` that `error` calls for; if it fails, note on `error` that `what` failed.

    Raises CancelledError from `error` if the caller was cancelled meanwhile.
    """
    cleaning = await outlast(step)
    if cleaning.failure is not None:
        error.add_note(f"{what} failed as well: {cleaning.failure!r}")
    if not isinstance(error, asyncio.CancelledError):
        cleaning.raise_cancellation()


async def together(*steps: Awaitable[None]) -> None:
    """Take all steps at once; when one raises, the others are cancelled, have ended, and that is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for step in steps:
                group.create_task(_awaited(step))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors


async def _awaited(step: Awaitable[None]) -> None:
    await step
