"""What the parsers know takes the place of comments in the pages.

    <!-- commands: qemu-blkmig -->             a section for each command: usage, options, examples
    <!-- options: virsh-blkmigrate -->         the options of a program that has no commands, or of one command
    <!-- exit codes -->                        the exit codes
    <!-- errors -->                            the kinds of errors
    <!-- journal -->                           the journal's tables
    <!-- metrics -->                           Prometheus' metrics
    <!-- schemas -->                           the JSON schemas, and what they are of

They are comments, so that the pages can also be read as they are. Options become the standard domain's, which can be
referred to: {option}`qemu-blkmig migrate --launch`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from manuals.parsers import programs, subcommands
from manuals.schemas import OUTPUTS
from qemu_blkmig import errors
from qemu_blkmig.cli.main import EXIT_CODES
from qemu_blkmig.errors import BlkmigError, kind_of
from qemu_blkmig.job.journal import SCHEMA
from qemu_blkmig.observe.metrics import Metrics

MARK = re.compile(r"^<!-- (commands|options|exit codes|errors|journal|metrics|schemas)(?:: (.+?))? -->$", re.MULTILINE)


def filled(text: str) -> str:
    """A page with all that its comments ask for."""
    return MARK.sub(lambda found: "\n".join(_asked(found[1], found[2])), text)


def _asked(what: str, of: str | None) -> Iterator[str]:
    if what == "exit codes":
        for line in EXIT_CODES.splitlines()[1:]:
            code, meaning = line.split(maxsplit=1)
            yield f"`{code}`\n: {marked_up(meaning)}\n"
        return
    if what == "errors":
        yield from _errors(BlkmigError)
        return
    if what == "journal":
        yield from _tables()
        return
    if what == "metrics":
        yield from _metrics()
        return
    if what == "schemas":
        yield from (f"`{output.name}.json`\n: {marked_up(output.by)}\n" for output in OUTPUTS)
        return
    program, _, command = (of or "").partition(" ")
    parser = programs()[program]
    if what == "options":
        yield from _options(subcommands(parser)[command] if command else parser)
        return
    yield from _options(parser)
    for name, each in subcommands(parser).items():
        yield f"\n### {name}\n"
        yield f"```text\n{_usage(each)}\n```\n"
        if each.description:
            yield f"{marked_up(each.description)}\n"
        yield from _options(each, but=parser)
        if each.epilog:
            yield f"```text\n{(each.epilog % {'prog': each.prog}).strip()}\n```\n"


def _errors(kind: type[BlkmigError]) -> Iterator[str]:
    for each in kind.__subclasses__():
        if each.__module__ == errors.__name__:
            told = (each.__doc__ or "").split("\n\n")[0]
            yield f"`{kind_of(each)}`\n: {marked_up(' '.join(told.split()))}\n"
            yield from _errors(each)


def _tables() -> Iterator[str]:
    for name, columns in re.findall(r"CREATE TABLE IF NOT EXISTS (\w+) \((.*?)\);", SCHEMA, re.DOTALL):
        words = [column.split()[0] for column in columns.split(",")]
        yield f"`{name}`\n: {', '.join(f'`{word}`' for word in words)}\n"


def _metrics() -> Iterator[str]:
    for family in Metrics("", "", "").collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        yield f"`{name}`\n: {marked_up(family.documentation)}\n"


def _usage(parser: argparse.ArgumentParser) -> str:
    return " ".join(parser.format_usage().removeprefix("usage: ").split())


def _options(parser: argparse.ArgumentParser, but: argparse.ArgumentParser | None = None) -> Iterator[str]:
    """Each group with its options, `but` for those that this other one has, too; nothing of commands, nor of --help."""
    known = {name for action in but._actions for name in action.option_strings} if but else set()
    yield f"```{{program}} {parser.prog}\n```\n"
    usual = ("positional arguments", "options")
    for group in parser._action_groups:
        shown = [each for each in group._group_actions if _is_shown(each) and not known.issuperset(_names(each))]
        if not shown:
            continue
        if group.title and group.title not in usual:
            # Not in backquotes: a title may have some.
            yield f"~~~{{rubric}} {marked_up(group.title[0].upper() + group.title[1:])}\n~~~\n"
        for action in shown:
            yield f"````{{option}} {_signature(action)}\n{_help(parser, action)}\n````\n"


def _names(action: argparse.Action) -> list[str]:
    return list(action.option_strings) or [action.dest]


def _is_shown(action: argparse.Action) -> bool:
    hidden = action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    return not hidden


def _signature(action: argparse.Action) -> str:
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    if not action.option_strings:
        return str(value)
    spelled = (name if action.nargs == 0 else f"{name} {value}" for name in action.option_strings)
    return ", ".join(spelled)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return marked_up(_sentence(text))


def _sentence(text: str) -> str:
    """With a capital at its beginning, unless that is something to be typed, and a full stop."""
    first = text.split(maxsplit=1)[0] if text else ""
    begin = text[:1].upper() if first.rstrip(",;.:").isalpha() and ":/" not in first else text[:1]
    return begin + text[1:] + ("" if text.endswith((".", "!")) else ".")


def marked_up(text: str) -> str:
    """Plain text as Markdown: options and what is in backquotes become literals, all else stays as it is."""
    pieces = re.split(r"(`[^`]+`|(?<![\w-])--?[a-zA-Z][\w-]*|\{\"[^}]*\}\}?)", text)
    return "".join(
        (piece if piece.startswith("`") else f"`{piece}`")
        if place % 2
        else re.sub(r"([\\*_<>\[\]{}|$#~@^!])", r"\\\1", piece)
        for place, piece in enumerate(pieces)
    )
