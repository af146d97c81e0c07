"""How long it will take until the last round fits, and how far such a forecast may be believed.

The forecast plays the rounds to come: each copies what is dirty, at the speed measured, while the guest dirties on at
the rate measured. It is worth what such forecasts were worth so far: each round's, of how much would be dirty when it
ended, is held against what then was.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

MOST_ROUNDS = 200
"""Rounds that are played at most."""
JUDGED = 8
"""The last forecasts that tell what the next one is worth."""
LEAST_JUDGED = 2
"""Forecasts before which nothing is said of their worth."""


@dataclass(frozen=True)
class Outlook:
    """What a forecast goes by: bytes, bytes a second, seconds.

    `bulk`: what the bulk pass has left; `dirty`: what is dirty now. `overhead`: what a round takes beyond copying.
    `downtime`: what the final round may take.
    """

    bulk: int
    dirty: int
    speed: float
    dirtying: float
    overhead: float
    downtime: float


def time_to_converge(outlook: Outlook) -> float | None:
    """Seconds until the final round fits; None if it does not come to fit."""
    seconds = outlook.bulk / outlook.speed
    dirty = outlook.dirty + outlook.dirtying * seconds
    for _ in range(MOST_ROUNDS):
        if not dirty or dirty / outlook.speed + outlook.overhead <= outlook.downtime:
            return seconds
        took = dirty / outlook.speed + outlook.overhead
        seconds += took
        before, dirty = dirty, outlook.dirtying * took
        if dirty >= before and outlook.dirtying:
            return None
    return None


class Forecasts:
    """What forecasts of what would be dirty after a round were worth."""

    def __init__(self) -> None:
        self._forecast: float | None = None
        self._errors: deque[float] = deque(maxlen=JUDGED)

    def expect(self, dirty: float | None) -> None:
        """So many bytes are going to be dirty when the round that begins has ended; None: nothing tells."""
        self._forecast = dirty

    def came(self, dirty: float) -> None:
        """That many are."""
        if self._forecast is not None and max(self._forecast, dirty) > 0:
            self._errors.append(abs(self._forecast - dirty) / max(self._forecast, dirty))
        self._forecast = None

    @property
    def confidence(self) -> float | None:
        """From 0, never right, to 1, always: one less the mean relative error; None until there were some."""
        if len(self._errors) < LEAST_JUDGED:
            return None
        return 1 - sum(self._errors) / len(self._errors)
