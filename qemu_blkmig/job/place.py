"""Where a job's images go, as the command line names it and the record keeps it."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import msgspec

from qemu_blkmig.errors import UsageError

REMOTE_COMMAND = "qemu-blkmig"
FORMS = "local:/directory or ssh://[user@]host[:port]/directory"
_SSH = re.compile(
    r"(?:(?P<user>[^@/\s]+)@)?(?:\[(?P<literal>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^@:/\[\]\s]+))(?::(?P<port>\d+))?(?P<dir>/.*)"
)


class Local(msgspec.Struct, frozen=True, tag="local"):
    """A directory of this host."""

    directory: str

    def __str__(self) -> str:
        return f"local:{self.directory}"


class Ssh(msgspec.Struct, frozen=True, tag="ssh"):
    """A directory of a host that ssh reaches; None: what the user's ssh configuration says.

    `remote_command`: how qemu-blkmig is called there, in words of the login shell.
    """

    host: str
    directory: str
    user: str | None = None
    port: int | None = None
    remote_command: str = REMOTE_COMMAND

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port else ""
        return f"ssh://{user}{host}{port}{self.directory}"


Place = Local | Ssh


def parse_place(text: str, remote_command: str = REMOTE_COMMAND) -> Place:
    """`local:/directory` or `ssh://[user@]host[:port]/directory`; an IPv6 address in brackets. Raises `UsageError`."""
    kind, _, rest = text.partition(":")
    if kind == "local" and rest:
        return Local(str(Path(rest).absolute()))
    if kind == "ssh" and rest.startswith("//"):
        return _parse_ssh(text, rest[2:], remote_command)
    raise UsageError(f"not a destination: {text!r}", advice=f"write {FORMS}")


def _parse_ssh(text: str, rest: str, remote_command: str) -> Ssh:
    match = _SSH.fullmatch(rest)
    if match is None:
        raise UsageError(
            f"not a destination: {text!r}", advice="write ssh://[user@]host[:port]/directory, an IPv6 host in brackets"
        )
    host, port = match["literal"] or match["host"], match["port"]
    # ssh would take such a word for an option.
    if host.startswith("-") or (match["user"] or "").startswith("-"):
        raise UsageError(f"no name of a host or user begins with a hyphen: {text!r}")
    if port is not None and not 1 <= int(port) <= 65535:
        raise UsageError(f"not a port: {port}", advice="from 1 to 65535")
    return Ssh(host, str(Path(match["dir"])), match["user"], int(port) if port else None, remote_command)


def host_name(place: Place | None) -> str:
    """What the host of `place` is called; None: this one."""
    return place.host if isinstance(place, Ssh) else socket.gethostname()
