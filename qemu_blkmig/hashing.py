"""The hash functions that both sides know, and what they are called in options and in the protocol."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from typing import Literal

from qemu_blkmig.errors import Refused

Algorithm = Literal["xxh3-128", "blake3", "sha256"]
USUAL: Algorithm = "xxh3-128"
"""Tells faults apart, at a tenth of the cost of the others; not made to withstand somebody who forges contents."""
SIZES: dict[Algorithm, int] = {"xxh3-128": 16, "blake3": 32, "sha256": 32}
"""Bytes of a digest."""

Hash = Callable[[memoryview], bytes]


def hash_function(algorithm: Algorithm) -> Hash:
    """From bytes to their digest. Raises `Refused` where this host lacks what computes it."""
    try:
        match algorithm:
            case "xxh3-128":
                from xxhash import xxh3_128_digest

                return xxh3_128_digest
            case "blake3":
                from blake3 import blake3

                return lambda data: blake3(data).digest()
            case "sha256":
                return lambda data: hashlib.sha256(data).digest()
    except ImportError as error:
        package = "python3-xxhash or PyPI's xxhash" if algorithm == "xxh3-128" else "PyPI's blake3"
        raise Refused(
            f"the hash {algorithm} cannot be computed on {socket.gethostname()}: {error}",
            advice=f"install {package} on both hosts, or choose --hash sha256",
        ) from error
