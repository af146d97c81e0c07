"""How fast to copy beside a guest whose disks are not to become slow: `--adaptive`.

Copying begins slowly and doubles its limit, look by look. What the guest's requests take at the slow beginning is what
they take without us. When they take much longer, the limit falls by a factor; when they are as quick as before, it
grows again, by steps that have become small. It grows only as long as it is what holds copying back.

What is slow for reasons of its own is not cured by copying less: where requests stay slow although next to nothing is
copied, that is what they take without us from then on. What became quicker counts at once.
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
PATIENCE = 3
"""Looks at the least limit after which what is slow is not our doing."""
FADING = 0.25
"""How far one look moves what a request is taken to take without us, where it takes less."""


class Adaptive:
    """The controller; it is told once a look. `limit`: bytes a second. `usual`: seconds that a request takes without
    us, None until that was seen. `held`: whether the guest holds copying back below what it once was."""

    def __init__(self) -> None:
        self.limit = float(START)
        self.usual: float | None = None
        self._before: float | None = None
        self._factor = DOUBLE
        self._at_least = 0

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
        if self.usual is None:
            self.usual = latency
        elif latency < self.usual:
            self.usual += FADING * (latency - self.usual)
        if latency <= max(RISE * self.usual, self.usual + NOISE):
            self._at_least = 0
            if latency <= max(RISE * self.usual, self.usual + NOISE) / 2 + self.usual / 2:
                self._forward(speed)
        elif speed < LEAST or self._at_least >= PATIENCE:
            self.usual = latency
            self._at_least = 0
        else:
            self._back(speed)
        return self.limit

    def _back(self, speed: float) -> None:
        self._factor = FORWARD
        now = min(self.limit, speed)
        if self._before is None:
            self._before = now
        self.limit = max(float(LEAST), BACK * now)
        if self.limit == LEAST:
            self._at_least += 1

    def _forward(self, speed: float) -> None:
        if speed >= BINDING * self.limit:
            self.limit *= self._factor
        if self._before is not None and self.limit >= self._before:
            self._before = None
