"""How fast a first pass is on the whole, before the engine has measured a batch of it."""

from __future__ import annotations

LEAST_MEASURED = 0.5
"""Seconds of copying that an average speed is told after."""


class Average:
    """From `began` (seconds) on, when `brought` bytes were settled already, by an earlier attempt."""

    def __init__(self, began: float, brought: int) -> None:
        self.began = began
        self._brought = brought

    def until(self, now: float, settled: int) -> float | None:
        """Bytes a second, when `settled` are; None as long as that says nothing."""
        elapsed, copied = now - self.began, settled - self._brought
        return copied / elapsed if elapsed >= LEAST_MEASURED and copied > 0 else None
