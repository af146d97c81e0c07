"""Man pages and reference tell every option of every command, in the words of the parsers."""

from __future__ import annotations

import argparse
import re

import pytest

from manuals.pages import MARK, filled, marked_up
from manuals.parsers import REPOSITORY, every, programs
from qemu_blkmig.cli.main import parser

PAGES = {program: (REPOSITORY / f"docs/man/{program}.1.md").read_text() for program in programs()}


@pytest.mark.parametrize("program", PAGES)
def test_a_man_page_tells_every_option(program: str) -> None:
    page = filled(PAGES[program])
    for each in every(programs()[program]):
        for action in each._actions:
            for name in action.option_strings:
                if not isinstance(action, argparse._HelpAction):
                    assert re.search(rf"^````{{option}} .*{name}\b", page, re.MULTILINE), f"{each.prog} {name}"


def test_a_man_page_tells_every_exit_code() -> None:
    page = filled(PAGES["qemu-blkmig"])
    for code in ("0", "1", "2", "3", "4", "5", "128+n"):
        assert f"\n`{code}`\n: " in page


def test_nothing_is_left_of_what_a_page_asks_for() -> None:
    commands = {page for page in REPOSITORY.glob("docs/man/*.1.md") if page.name[: -len(".1.md")] not in PAGES}
    for page in set(REPOSITORY.glob("docs/**/*.md")) - commands:
        assert not MARK.search(filled(page.read_text())), page


def test_one_command_alone_can_be_asked_for() -> None:
    page = filled("<!-- options: qemu-blkmig set -->")
    assert "{option} --bandwidth RATE" in page and "--launch" not in page


def test_text_that_means_something_to_markdown_is_shown_as_it_is() -> None:
    assert marked_up("a *b* <c> `d` --e-f (x-y)") == r"a \*b\* \<c\> `d` `--e-f` (x-y)"


def test_every_command_is_introduced() -> None:
    page = filled(PAGES["qemu-blkmig"])
    for command in list(every(parser()))[1:]:
        assert f"\n### {command.prog.split()[-1]}\n" in page


@pytest.mark.parametrize("program", PAGES)
def test_a_title_in_backquotes_does_not_end_the_fence_that_it_opens(program: str) -> None:
    assert not re.search(r"^```+[^`\n]+`", filled(PAGES[program]), re.MULTILINE)
