"""The form of our command lines: how commands are added, and how a mistake in them is told."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import msgspec

from qemu_blkmig.errors import UsageError

_T = TypeVar("_T")
Commands = Any  # argparse keeps the type of its sub-parsers' collection private


class Parser(argparse.ArgumentParser):
    """Tells of a mistake in our form, without a page of usage before it."""

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`."""
        raise UsageError(message, advice=f"see {self.prog} --help")


def command(commands: Commands, name: str, what: str, usage: str, examples: str = "") -> argparse.ArgumentParser:
    """A command's parser; `what` is its help, `usage` what stands behind its name."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        usage=f"%(prog)s {usage}",
        epilog=f"examples:{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-v", "--verbose", dest="debug", action="store_true", default=argparse.SUPPRESS,
        help="show causes and what is done in detail",
    )  # fmt: skip
    parser.set_defaults(command=name)
    return parser


def as_json(outcome: msgspec.Struct) -> str:
    """As programs get it. What of a file's name is no UTF-8 is told as Python has it: a \\udcXX for each byte XX."""
    try:
        return msgspec.json.format(msgspec.json.encode(outcome)).decode()
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(outcome), indent=2)


def argument(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """`parse` as argparse wants it, which then names the option in its message."""

    def parsed(text: str) -> _T:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(f"{error}" + (f": {error.advice}" if error.advice else "")) from error

    return parsed
