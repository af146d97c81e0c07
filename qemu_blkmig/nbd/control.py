"""What another thread may do to a copy under way: look at its figures, have it look up from its poll, cancel it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field


class Cancelled(Exception):
    """What was under way was cancelled, and nothing of it is in flight any more."""


@dataclass
class Tally:
    """Bytes settled so far."""

    copied: int = 0
    zeroed: int = 0
    skipped: int = 0


@dataclass
class Control:
    """Belongs to one copy, or some that follow each other; `cancel` and `nudge` may be called from any thread."""

    tally: Tally = field(default_factory=Tally)
    cancelled: bool = False
    wake: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def cancel(self) -> None:
        """Have the copy stop soon."""
        self.cancelled = True
        os.eventfd_write(self.wake, 1)

    def nudge(self) -> None:
        """Have the copy look at once whether there is more to do."""
        os.eventfd_write(self.wake, 1)

    def nudged(self) -> None:
        """Forget the nudges so far; a cancel is not forgotten: whoever else waits by `wake` is to hear of it, too."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake)
        if self.cancelled:
            os.eventfd_write(self.wake, 1)

    def close(self) -> None:
        """Free the descriptor; nobody may cancel any more."""
        os.close(self.wake)
