"""How much of a disk the bulk pass asks for at once, and how often it is flushed where nothing goes on beside that."""

from __future__ import annotations

from collections import deque

MOST_UNFLUSHED = 256 << 20
"""Bytes of the pass after which it is flushed, however large the disk is; a range is copied to its end before."""
FIRST_STRIDE = 32 << 20
PART, LONGEST = 128, 16 << 30
"""A range is no longer than this part of a disk, nor than so many bytes: a failure throws a few of them away."""
CHANGE = 8
"""How many times as long as the last range the next one is at most, or as short."""
MEASURED = 4
"""Ranges that tell how fast it goes: of those that are under way together several may arrive at once."""


class Stride:
    """How many bytes of a disk to ask for at once, so that it takes about `seconds`, by what the last ranges took.

    What every range costs (a question, a flush, an entry in a journal) is then little beside it; and what a failure
    throws away is little. Where nothing is stored, ranges become long.
    """

    def __init__(self, seconds: float, chunk_size: int) -> None:
        self._seconds = seconds
        self._chunk = chunk_size
        self._length: int | None = None
        self._took: deque[tuple[int, float]] = deque(maxlen=MEASURED)

    def length(self, size: int, interval: int) -> int:
        """Whole chunks, of a disk of `size` bytes; no more than `interval` until something was measured."""
        wanted = min(FIRST_STRIDE, interval) if self._length is None else self._length
        most = min(size // PART, LONGEST) // self._chunk * self._chunk
        return max(self._chunk, min(wanted, most))

    def took(self, length: int, seconds: float) -> None:
        """A range of `length` bytes has arrived, so long after the one before it."""
        self._took.append((length, seconds))
        total, lasted = (sum(each) for each in zip(*self._took, strict=True))
        wanted = total * self._seconds / lasted if lasted > 0 else CHANGE * length
        bounded = min(CHANGE * length, max(length / CHANGE, wanted))
        self._length = max(self._chunk, int(bounded) // self._chunk * self._chunk)


def flush_interval(size: int, flushes: int, chunk_size: int) -> int:
    """Bytes (whole chunks) after which the pass over a disk of `size` bytes is flushed: about `flushes` times."""
    chunks = min(size // flushes, MOST_UNFLUSHED) // chunk_size
    return max(1, chunks) * chunk_size
