"""How fast to copy beside a guest whose disks are not to become slow: `--adaptive`.

Copying begins slowly and doubles its limit, look by look. What the guest's requests take at the slow beginning is what
they take without us. When they take much longer, the limit falls by a factor; when they are as quick as before, it
grows again, by steps that have become small. It grows only as long as it is what holds copying back.

What is slow for reasons of its own is not cured by copying less: where requests stay as slow, limit after limit, that
is what they take without us from then on. What became quicker counts sooner than what became slower, which counts only
while little is copied. A look at which we did not use our limit, because we flushed, say, tells nothing of it.
"""

from __future__ import annotations

MIB = 1 << 20
START = 16 * MIB
"""Bytes a second at first."""
LEAST = 4 * MIB
"""Bytes a second that are always copied."""
RISE, NOISE = 2.0, 0.001
"""A request takes much longer: so many times what it took without us, and at least so many seconds more."""
DOUBLE, FORWARD, BACK = 2.0, 1.25, 0.6
"""What the limit is multiplied with: until the guest was first disturbed, later, and when it is disturbed."""
BINDING = 0.5
"""The part of the limit that must be copied for it to grow."""
PATIENCE, IN_VAIN = 3, 0.8
"""So many limits after which what is still so much as slow is not our doing."""
QUICKER, SLOWER = 0.25, 0.1
"""How far one look moves what a request is taken to take without us."""


class Adaptive:
    """The controller; it is told once a look. `limit`: bytes a second. `usual`: seconds that a request takes without
    us, None until that was seen. `held`: whether the guest holds copying back below what it once was."""

    def __init__(self) -> None:
        self.limit = float(START)
        self.usual: float | None = None
        self._before: float | None = None
        self._factor = DOUBLE
        self._slow: float | None = None
        self._in_vain = 0

    @property
    def held(self) -> bool:
        """See above."""
        return self._before is not None

    def look(self, latency: float | None, speed: float) -> float:
        """The limit from now on.

        `latency`: seconds that a request of the guest took since the last look, on average; None: there were too few to
        tell. `speed`: bytes a second that were copied.
        """
        if latency is None:
            self._forward(speed)
            return self.limit
        copied = speed >= LEAST or self.limit <= LEAST
        if self.usual is None:
            self.usual = latency
        elif latency < self.usual:
            self.usual += QUICKER * (latency - self.usual)
        elif copied and speed <= START:
            self.usual += SLOWER * (latency - self.usual)
        much = max(RISE * self.usual, self.usual + NOISE)
        if latency <= much:
            self._slow, self._in_vain = None, 0
            if latency <= (much + self.usual) / 2:
                self._forward(speed)
        elif copied:
            self._disturbed(latency, speed)
        return self.limit

    def _disturbed(self, latency: float, speed: float) -> None:
        """Slow once may be chance. Slow, limit after limit: the lower ones were in vain, and are taken back."""
        before, self._slow = self._slow, latency
        if before is None:
            return
        self._in_vain += latency >= IN_VAIN * before
        if self._in_vain < PATIENCE:
            self._back(speed)
            return
        self.usual, self._slow, self._in_vain = latency, None, 0
        self.limit, self._before = max(self.limit, self._before or 0.0), None

    def _back(self, speed: float) -> None:
        self._factor = FORWARD
        now = min(self.limit, speed)
        if self._before is None:
            self._before = now
        self.limit = max(float(LEAST), BACK * now)

    def _forward(self, speed: float) -> None:
        if speed >= BINDING * self.limit:
            self.limit *= self._factor
        if self._before is not None and self.limit >= self._before:
            self._before = None
