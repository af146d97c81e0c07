"""The commands that setup.cfg installs, and their parsers."""

from __future__ import annotations

import argparse
import configparser
import importlib
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def programs() -> dict[str, argparse.ArgumentParser]:
    """Each console script's parser: its module has a function `parser` that makes it."""
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    scripts = (line.partition("=") for line in settings["options.entry_points"]["console_scripts"].split("\n") if line)
    modules = {name.strip(): importlib.import_module(target.split(":")[0].strip()) for name, _, target in scripts}
    return {name: module.parser() for name, module in modules.items()}


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Its commands by name, in order; none for a command that has none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def every(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its commands."""
    yield parser
    for command in subcommands(parser).values():
        yield from every(command)


if __name__ == "__main__":
    print(*programs())
