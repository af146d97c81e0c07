"""Commands about libvirt's hook, and its check for hook scripts of others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from qemu_blkmig.cli import options
from qemu_blkmig.cli.form import Commands, command
from qemu_blkmig.errors import Refused, UsageError
from qemu_blkmig.hooks import guard, install


class Guarded(msgspec.Struct, frozen=True):
    """A domain that may be started here."""

    name: str
    uuid: str
    images: list[str]


def add_all(commands: Commands) -> None:
    """Add the commands to the parser."""
    _add_hooks(commands)
    _add_guard(commands)


def _add_hooks(commands: Commands) -> None:
    parser = command(
        commands,
        "hooks",
        "install libvirt's hook, which starts no guest from an image that is incomplete or has moved away",
        "install|status|remove [options]",
        """
  qemu-blkmig hooks install      as root, on all hosts; hooks that are there stay, and are run before ours
  qemu-blkmig hooks status       where it is, what else is there
""",
    )
    parser.add_argument("action", choices=["install", "status", "remove"])
    parser.add_argument(
        "--directory",
        type=Path,
        default=install.DIRECTORY,
        metavar="DIR",
        help=f"libvirt's hooks (default: {install.DIRECTORY})",
    )
    parser.add_argument(
        "--chain",
        action="store_true",
        help="install: as the one hook `qemu`, which runs the one that was there, as is done anyway where libvirt is "
        "older than 6.5 and knows no qemu.d",
    )
    options.add_form(parser)
    parser.set_defaults(run=_hooks)


def _hooks(arguments: argparse.Namespace) -> int:
    if arguments.chain and arguments.action != "install":
        raise UsageError("--chain is for `hooks install`")
    match arguments.action:
        case "install":
            standing = install.install(arguments.directory, way="chain" if arguments.chain else "auto")
        case "remove":
            standing = install.remove(arguments.directory)
        case _:
            standing = install.status(arguments.directory)
    return options.print_outcome(standing, arguments.output, _standing)


def _standing(standing: install.Standing) -> str:
    if standing.installed:
        lines = [f"installed: {standing.path}, with the state directory {standing.state_directory}"]
    else:
        lines = ["not installed"]
    if standing.before:
        lines.append(f"  runs first: {standing.before}, which was there before")
    lines += [f"  another hook: {other}" for other in standing.others]
    lines += [f"  note: {note}" for note in standing.notes]
    return "\n".join(lines)


def _add_guard(commands: Commands) -> None:
    parser = command(
        commands,
        "guard",
        "tell whether a libvirt domain may be started here, by its images' ownership records; libvirt is not asked",
        "DOMAIN | --xml FILE",
        """
  qemu-blkmig guard 3f1c...-...          by UUID or name, from where libvirt keeps definitions; exit code 3: it must not
  In a hook script of your own, which gets the XML on stdin:
    [ "$2" = prepare ] && { qemu-blkmig guard --xml - || exit 1; }
""",
    )
    parser.add_argument("domain", nargs="?", metavar="DOMAIN", help="UUID or name")
    parser.add_argument("--xml", metavar="FILE", help="the domain's XML instead; - is stdin")
    options.add_form(parser)
    parser.set_defaults(run=_guard)


def _guard(arguments: argparse.Namespace) -> int:
    if (arguments.domain is None) == (arguments.xml is None):
        raise UsageError("name a domain, or give its XML by --xml FILE")
    domain = guard.check(guard.definition(arguments.domain) if arguments.xml is None else _read(arguments.xml))
    images = [image for disk in domain.disks for image in disk.images if image]
    return options.print_outcome(Guarded(domain.name, domain.uuid, images), arguments.output, _guarded)


def _read(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise Refused(f"{file}: {error.strerror}") from error


def _guarded(domain: Guarded) -> str:
    return f"domain {domain.name} may be started here: no record says that an image of its is incomplete or old"
