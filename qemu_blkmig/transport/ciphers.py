"""Which ciphers ssh is to prefer for a disk's worth of data, where nobody has chosen any.

OpenSSH prefers chacha20-poly1305, which no processor computes by itself; AES-GCM, which it accepts by default just as
well, moves about twice the bytes a second where the processor knows AES.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from qemu_blkmig.processor import knows_aes

PREFERRED = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"
"""ssh_config(5), Ciphers: put before the default ones. Both hosts know them, or the rest is as it was."""


def preferred_ciphers(ssh: Sequence[str], account: Sequence[str], host: str) -> list[str]:
    """Options for `ssh` to `host`; none where the user's or the system's configuration names ciphers. It blocks."""
    if not knows_aes():
        return []
    asked = _ask([*ssh, "-G", *account, "--", host]), _ask([*ssh, "-G", "-F", "none", "--", host])
    chosen, default = (_told(process) for process in asked)
    return ["-o", f"Ciphers={PREFERRED}"] if chosen is not None and chosen == default else []


def _ask(command: Sequence[str]) -> subprocess.Popen[bytes] | None:
    """An ssh that says what it would offer; None where there is none."""
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        return None


def _told(process: subprocess.Popen[bytes] | None) -> str | None:
    """The ciphers that it would offer; None where it does not say."""
    if process is None:
        return None
    told, _ = process.communicate()
    found = re.search(r"^ciphers (.+)$", told.decode(errors="replace"), re.MULTILINE)
    return found[1] if found else None
