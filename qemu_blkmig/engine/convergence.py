"""When to switch over: what was measured of copying and dirtying, and what that says of the final round.

Prediction: dirty bytes / speed + flushes + the fixed cost of a round.

Speeds are averages in which a sample weighs by how long it took, and fades with a memory of `MEMORY` seconds of
measured time. So a round of a single cluster, which says more about latency than about speed, cannot wipe out what
ten seconds of copying have told, while a link that has become slow is believed within seconds. Costs that occur once
a round are averages over rounds, the last one counting half: they jump (a flush meets somebody else's writeback), and
the next one resembles the last more than the first.

Speed is payload only, and what is dirty is taken for payload: ranges dirtied to zero cost next to nothing, and a
guest that zeroes 100 GiB once would otherwise make the link look a thousand times as fast as it is.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from qemu_blkmig.engine.ports import CopyKind, CopyReport

MEMORY = 2.0
"""Seconds of measured time after which a speed sample has faded to 1/e."""
RESOLUTION = 1e-6
"""Seconds; shorter times are not believed, so that no speed is infinite."""


PUT_OFF = 0.35
"""The part of the budget that what is put off may take: the rest is for what is dirtied while a round goes on."""
IN_STEP = 0.5
"""The part of the budget that what a round can take away may come to take before one is due, while RAM migrates."""
MOST_IN_STEP = 0.75
"""The same, of all that is dirty."""


@dataclass
class Policy:
    """`downtime`: seconds that the final round of the disks may take. `max_rounds`: None for no bound.

    `put_off`: whether what the guest writes all the time is copied last. May be changed while the engine goes by it: it
    is looked at before every decision.
    """

    downtime: float
    max_rounds: int | None
    put_off: bool = True


class Verdict(enum.Enum):
    """FITS: the final round is predicted to fit the budget. STALLED: it did not come to do so."""

    FITS = "fits"
    STALLED = "stalled"


class Rate:
    """Amount a second, averaged by duration; `value` is None until something was measured."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, amount: float, seconds: float) -> None:
        """`amount` was moved (or dirtied) in `seconds`."""
        seconds = max(seconds, RESOLUTION)
        sample = amount / seconds
        old = sample if self.value is None else self.value
        self.value = old + (1 - math.exp(-seconds / MEMORY)) * (sample - old)


class Cost:
    """Seconds that something takes once, averaged over its occurrences; `value` is 0 until it occurred."""

    def __init__(self) -> None:
        self.value = 0.0
        self._measured = False

    def add(self, seconds: float) -> None:
        """It took `seconds` this time."""
        self.value = (self.value + seconds) / 2 if self._measured else seconds
        self._measured = True


class Pace:
    """What has been measured so far, in bytes and seconds.

    `dirtying`: bytes a second that the guest makes dirty. `flush`: one flush of one disk in a dirty round.
    `overhead`: what a round costs beyond copying and flushing (harvest, reading the extents, retiring).
    """

    def __init__(self) -> None:
        self.dirtying = Rate()
        self.flush = Cost()
        self.overhead = Cost()
        self._payload = {CopyKind.BULK: Rate(), CopyKind.DIRTY: Rate()}
        self._zeroes = Rate()

    def copied(self, kind: CopyKind, report: CopyReport, seconds: float) -> None:
        """A batch took `seconds`, the way to the mover and back included."""
        if report.copied:
            self._payload[kind].add(report.copied, seconds)
        elif report.zeroed:
            self._zeroes.add(report.zeroed, seconds)

    @property
    def speed(self) -> float | None:
        """Payload of dirty rounds; until there was any, of the bulk pass; if all has been zeroes, that of zeroing."""
        return self._payload[CopyKind.DIRTY].value or self._payload[CopyKind.BULK].value or self._zeroes.value

    def copying(self, dirty: int) -> float | None:
        """Seconds that copying `dirty` bytes will take; None if nothing tells."""
        if not dirty:
            return 0.0
        speed = self.speed
        return dirty / speed if speed else None

    def dirtied_in_round(self, length: int, disks: int) -> float | None:
        """Bytes that the guest dirties while a round of `length` bytes goes on; None if nothing tells."""
        took = self.final_round(length, disks)
        return None if took is None or self.dirtying.value is None else took * self.dirtying.value

    def room(self, policy: Policy, disks: int) -> int:
        """Bytes that a round may put off; none where the guest may stand still for ever: it will wait for them all."""
        if not policy.put_off or math.isinf(policy.downtime):
            return 0
        left = PUT_OFF * policy.downtime - disks * self.flush.value - self.overhead.value
        return int(max(0.0, left) * (self.speed or 0.0))

    def due_in_step(self, dirty: int, left_off: int, downtime: float) -> bool:
        """Whether a round is worth it now, if `dirty` bytes are, of which it would put `left_off` off again.

        Only what a round can take away counts: a flush that alone costs half the budget must not set off round upon
        round, and neither must what is put off. A round is as long as it is big, and the guest dirties on meanwhile:
        so a big one begins at once, and for a small one more is waited for.
        """
        everything, fresh = self.copying(dirty), self.copying(max(0, dirty - left_off))
        if everything is None or fresh is None:
            return True
        return fresh > IN_STEP * downtime or (everything > MOST_IN_STEP * downtime and fresh > 0)

    def final_round(self, dirty: int, disks: int) -> float | None:
        """Seconds that a round of `dirty` bytes and a flush of each of `disks` will take; None if nothing tells."""
        copying = self.copying(dirty)
        return None if copying is None else copying + disks * self.flush.value + self.overhead.value
