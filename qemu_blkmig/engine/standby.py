"""How often disks are kept in step while the switchover waits, for days if need be: no oftener than it is worth.

Looking what is dirty is cheap, a round is not. A round is due when the final one would come to take more than its
share of the downtime before the next look, or when what is dirty has waited for too long. A guest that leaves little
dirty is looked at ever less often; one that dirties faster than can be copied gets longer and longer rests, because
rounds on end would cost a link's worth of traffic and bring nothing.
"""

from __future__ import annotations

SHARE = 0.5
"""Of the downtime that the final round may come to take before a round is due."""
LEAST, MOST = 0.2, 15.0
"""Seconds between two looks."""
GROWTH = 1.5
"""How much longer each pause is than the last one while nothing becomes due."""
STALE = 600.0
"""Seconds after which what is dirty is copied, however little it is."""
REST, MOST_REST = 1.0, 16.0
"""A rest after a round, in multiples of what the round took; it grows while rounds do not help."""


class Standby:
    """The policy: what to do next, by the figures of the last look. All times are seconds."""

    def __init__(self, now: float) -> None:
        self._pause = LEAST
        self._rest = REST
        self._last_round = now

    def due(self, predicted: float | None, dirty: int, downtime: float, now: float) -> bool:
        """Whether a round is to be run now."""
        if not dirty:
            return False
        return predicted is None or predicted > downtime * SHARE or now - self._last_round >= STALE

    def rest(self, took: float, predicted: float | None, downtime: float, now: float) -> float:
        """How long to leave guest and link alone after a round that took `took`; `predicted` after it."""
        self._last_round = now
        helped = predicted is not None and predicted <= downtime
        self._rest = REST if helped else min(MOST_REST, 2 * self._rest)
        self._pause = LEAST
        return max(LEAST, min(took, STALE) * self._rest)

    def pause(self, predicted: float, slope: float, downtime: float) -> float:
        """How long to wait until the next look, if no round is due.

        `slope`: seconds that `predicted` grows each second. Longer each time, but half the way at most to where a
        round becomes due.
        """
        self._pause = min(MOST, self._pause * GROWTH)
        if slope > 0:
            self._pause = min(self._pause, max(0.0, downtime * SHARE - predicted) / slope / 2)
        self._pause = max(LEAST, self._pause)
        return self._pause
