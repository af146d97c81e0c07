"""The end of a migration stream of QEMU's: the mark, without which no destination finishes, and what stands behind it.

0x00                                  the end of the sections
0x06, 32 bits of length, JSON         a description of the device state, for people who debug
"""

from __future__ import annotations

DESCRIPTION_LIMIT = 1 << 20
"""Bytes of a description that are looked at; longer ones are not known."""
_MARK, _DESCRIPTION = 0x00, 0x06
_HEAD = 6


def ending(tail: bytes) -> int | None:
    """How many bytes at the end of `tail` are a stream's end mark and a description; None: it does not end so.

    Data that looks like that may also come amid a stream; the one that ends it is never taken for shorter than it is:
    JSON has no zero bytes, so that the last ones are those of the length before it.
    """
    if not tail.endswith(b"}"):
        return None
    zero = tail.rfind(0)
    for start in range(zero + 1, min(zero + 5, len(tail))):
        head = start - _HEAD
        if head < 0 or tail[start] != ord("{"):
            continue
        length = int.from_bytes(tail[start - 4 : start], "big")
        if tail[head] == _MARK and tail[head + 1] == _DESCRIPTION and length == len(tail) - start:
            return len(tail) - head
    return None
