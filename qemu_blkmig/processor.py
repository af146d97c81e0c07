"""What this host's processor does by itself."""

from __future__ import annotations

import re
from pathlib import Path

_KNOWS_AES = re.compile(r"^(flags|Features)\s*:.*\baes\b", re.MULTILINE)
"""proc_cpuinfo(5), of x86 and of ARM."""


def knows_aes(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether it computes AES itself: then AES-GCM is the cheapest of ciphers, else ChaCha20-Poly1305 is."""
    try:
        return _KNOWS_AES.search(cpuinfo.read_text()) is not None
    except OSError:
        return False
