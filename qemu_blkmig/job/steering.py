"""What may be changed of a job while it runs: the bandwidth, the downtime, and when it switches over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

Apply = Callable[[], Awaitable[None]]


class Steering:
    """The values in force. `downtime`: seconds; `bandwidth`: bytes a second, as the user wants it (None: no limit);
    `share`: the part of a group's budget that falls to this job; `adapted`: what the guest's disks bear, where that is
    looked at; `latency`: seconds that a request to them took, lately. `switchover` is set when the guest may move.

    Whoever goes by a value reads it when it is needed; what has to be told elsewhere is told by an `Apply`.
    """

    def __init__(self, downtime: float, bandwidth: int | None) -> None:
        self.downtime = downtime
        self.bandwidth = bandwidth
        self.share: int | None = None
        self.adapted: int | None = None
        self.latency: float | None = None
        self.switchover = asyncio.Event()
        self.may_wait = False
        self._apply: list[Apply] = []

    @property
    def rate(self) -> int | None:
        """Bytes a second that the job may carry now; None: no limit."""
        return _least(self.own, self.share)

    @property
    def own(self) -> int | None:
        """Bytes a second that it may carry whatever its share of a group's budget is; None: no limit."""
        return _least(self.bandwidth, self.adapted)

    def on_change(self, apply: Apply) -> None:
        """Call `apply` after every change, in the order in which they were added."""
        self._apply.append(apply)

    async def changed(self) -> None:
        """Bring what has changed into effect. Raises what the `Apply`s raise."""
        for apply in self._apply:
            await apply()


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
