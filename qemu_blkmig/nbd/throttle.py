"""A limit on payload bytes a second that all disks share and that may change while they copy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_BURST_SECONDS = 0.025
_REQUEST_SHARE = 40
_SMALLEST_REQUEST = 64 << 10


class Throttle:
    """A token bucket that may go into debt: a request proceeds whenever nothing is owed, however low the limit.

    Payload is what is read from the source, zeroes found in it included. Used by many threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._rate: int | None = None
        self._balance = 0.0
        self._told = clock()
        self.taken = 0
        """Bytes of payload so far, whatever the limit."""

    def limit(self, rate: int | None) -> None:
        """Allow `rate` bytes a second from now on (at least 1); None: no limit, and no debt.

        What went out under a higher limit must not hold up a lower one for long: it owes no more time than before.
        """
        with self._lock:
            self._refill()
            if rate is None or self._rate is None:
                self._balance = 0.0
            elif rate < self._rate:
                self._balance *= rate / self._rate
            self._rate = rate

    def delay(self) -> float:
        """Seconds until the next request may be taken; 0.0: now."""
        with self._lock:
            self._refill()
            if self._rate is None or self._balance >= 0:
                return 0.0
            return -self._balance / self._rate

    def take(self, length: int) -> None:
        """Account for a request of `length` bytes."""
        with self._lock:
            self._refill()
            self.taken += length
            if self._rate is not None:
                self._balance -= length

    def largest_request(self, wish: int) -> int:
        """How much of a request of `wish` bytes to make at once.

        A fortieth of a second's bytes, so that with what may be saved up any second holds 5 % more than the limit at
        most (but where that is less than the smallest request).
        """
        rate = self._rate
        if rate is None:
            return wish
        share = rate // _REQUEST_SHARE // _SMALLEST_REQUEST * _SMALLEST_REQUEST
        return min(wish, max(_SMALLEST_REQUEST, share))

    def _refill(self) -> None:
        now = self._clock()
        if self._rate is not None:
            earned = (now - self._told) * self._rate
            self._balance = min(self._rate * _BURST_SECONDS, self._balance + earned)
        self._told = now
