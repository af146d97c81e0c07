"""Sizes, rates and durations as people write and read them."""

from __future__ import annotations

import re

from qemu_blkmig.errors import UsageError

_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes from `4096`, `64k`, `1M`, `2G`, `1T` (powers of 1024). Raises `UsageError`."""
    match = re.fullmatch(r"(\d+)([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise UsageError(f"not a size: {text!r}", advice="write a number with k, M, G or T, such as 64k or 2G")
    return int(match[1]) * _FACTORS[match[2]]


def parse_rate(text: str) -> int:
    """Bytes a second; a bare number is MiB/s, as virsh has it, a suffix (k, M, G) is taken at its word."""
    return int(text) << 20 if text.strip().isdecimal() else parse_size(text)


def show_bytes(count: float) -> str:
    """`count` bytes for people, such as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def show_rate(rate: float) -> str:
    """A rate in MiB/s."""
    return f"{rate / (1 << 20):.1f} MiB/s"


def show_seconds(seconds: float) -> str:
    """A duration: milliseconds below a second."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
