"""The ends of a libvirt domain's migration, as command lines name them: the other libvirt, and the agent beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import msgspec

from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.place import Local, Place, Ssh, parse_place
from qemu_blkmig.transport.route import COMMAND_VARIABLE

DESTINATION = "qemu+ssh://[user@]host[:port]/system"
_BY_SSH = ("qemu+ssh", "qemu+libssh", "qemu+libssh2")
_OTHERS = ("qemu", "qemu+unix", "qemu+tcp", "qemu+tls")
_OF_SSH = ("command", "keyfile", "known_hosts", "no_verify", "known_hosts_verify", "sshauth")
"""Parameters of libvirt's URIs that tell ssh what only ssh's own configuration could tell ours."""


def agent_place(uri: str, agent: str | None, remote_command: str) -> Place:
    """Where the agent runs that writes the images: where `agent` says, else by the ssh that libvirt's `uri` names.

    Raises `UsageError`.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise UsageError(f"{uri}: {error}", advice=f"write {DESTINATION}") from error
    if parts.scheme not in (*_BY_SSH, *_OTHERS):
        raise UsageError(f"not the URI of a QEMU host's libvirt: {uri!r}", advice=f"write {DESTINATION}")
    if agent is not None:
        return _named(agent, remote_command)
    if not parts.hostname:
        raise UsageError(f"{uri} names no other host", advice=f"write {DESTINATION}")
    if parts.scheme not in _BY_SSH:
        raise UsageError(
            f"{uri} does not tell how the host's storage is reached",
            advice=f"name it by ssh: --agent ssh://[user@]host[:port]; or write {DESTINATION}",
        )
    return _by_ssh(uri, parts, remote_command)


def _named(agent: str, remote_command: str) -> Place:
    kind, _, rest = agent.partition(":")
    if kind == "local":
        return Local("/")
    place = parse_place(agent if "/" in rest.removeprefix("//") else f"{agent}/", remote_command)
    if place.directory != "/":
        raise UsageError(f"--agent names a host, no directory: {agent!r}", advice="images: --disk, --target-pool")
    return place


def _by_ssh(uri: str, parts: SplitResult, remote_command: str) -> Place:
    told = [name for name in _OF_SSH if name in parse_qs(parts.query)]
    if told and COMMAND_VARIABLE not in os.environ:
        raise UsageError(
            f"{uri}: the agent's own ssh knows nothing of {', '.join(told)}",
            advice=f"put it into ~/.ssh/config, or set {COMMAND_VARIABLE}, such as to 'ssh -i KEYFILE'",
        )
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    user, port = _user_and_port(uri, parts)
    place = parse_place(f"ssh://{user}{host}{port}/", remote_command)
    if isinstance(place, Ssh):
        # As libvirt reads its URIs: admin%40corp is the user admin@corp.
        name = unquote(place.user) if place.user is not None else None
        place = msgspec.structs.replace(place, host=unquote(place.host), user=name)
    return place


def _user_and_port(uri: str, parts: SplitResult) -> tuple[str, str]:
    try:
        return f"{parts.username}@" if parts.username else "", f":{parts.port}" if parts.port is not None else ""
    except ValueError as error:
        raise UsageError(f"{uri}: {error}", advice=f"write {DESTINATION}") from error


def uri_of(place: Ssh) -> str:
    """The libvirt of the host that `place` is on."""
    user = f"{place.user}@" if place.user else ""
    host = f"[{place.host}]" if ":" in place.host else place.host
    port = f":{place.port}" if place.port else ""
    return f"qemu+ssh://{user}{host}{port}/system"


def disk_paths(given: Sequence[str]) -> dict[str, str]:
    """Paths of images by their disk's target, from TARGET=PATH. Raises `UsageError`."""
    paths: dict[str, str] = {}
    for text in given:
        target, equals, path = text.partition("=")
        if not equals or not target or not path.startswith("/"):
            raise UsageError(
                f"--disk {text}: no disk and path", advice="write TARGET=PATH, such as vda=/srv/vm/a.qcow2"
            )
        if paths.setdefault(target, path) != path:
            raise UsageError(f"--disk names two paths for {target}: {paths[target]} and {path}")
    return paths
