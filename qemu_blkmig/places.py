"""Where things are kept between runs. The standard library only, and little of it: libvirt's hook starts with this."""

from __future__ import annotations

import os
from pathlib import Path

STATE_VARIABLE = "QEMU_BLKMIG_STATE_DIR"


def state_directory() -> Path:
    """Where job records live: $QEMU_BLKMIG_STATE_DIR, else /var/lib/qemu-blkmig for root, else the XDG state home."""
    if chosen := os.environ.get(STATE_VARIABLE):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/qemu-blkmig")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "qemu-blkmig"
