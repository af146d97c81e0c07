"""`--data`: a TCP connection of the data's own, past ssh, as it is asked for; made by `job.datapath_made`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qemu_blkmig.errors import UsageError

FORMS = "tls://[HOST[:PORT]] or, with --insecure, tcp://[HOST[:PORT]]"
INSECURE = "--data tcp: everybody on the way can read and change the guest's disks"
_DATA = re.compile(r"(?P<kind>tls|tcp)://(?:(?:\[(?P<literal>[^\]]+)\]|(?P<host>[^:/\[\]\s]+))(?::(?P<port>\d+))?)?/?")


@dataclass(frozen=True)
class DataPath:
    """`host`: this host's address that the destination connects to; None: the one that leads there. `port` 0: any.

    `certificates`: directory of the user's, on both hosts; None: a key made for the job.
    """

    tls: bool
    host: str | None = None
    port: int = 0
    certificates: str | None = None


def parse_data_path(text: str | None, *, certificates: str | None = None, insecure: bool = False) -> DataPath | None:
    """What --data, --tls-creds and --insecure say together. Raises `UsageError`."""
    if text is None:
        if certificates is not None or insecure:
            raise UsageError("--tls-creds and --insecure are for --data", advice=f"write --data {FORMS}")
        return None
    match = _DATA.fullmatch(text)
    if match is None or not 0 <= int(match["port"] or 0) <= 65535:
        raise UsageError(f"not a way for the data: {text!r}", advice=f"write {FORMS}")
    tls = match["kind"] == "tls"
    if not tls and certificates is not None:
        raise UsageError("--tls-creds is for --data tls://")
    if tls == insecure:
        raise UsageError(
            "--insecure is for --data tcp://, and that only with it",
            advice="tcp is neither encrypted nor does it ask who connects; use tls:// wherever you can",
        )
    return DataPath(tls, match["literal"] or match["host"], int(match["port"] or 0), certificates)
