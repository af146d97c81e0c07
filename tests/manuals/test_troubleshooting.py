"""The messages that the manual explains are those that the code has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from manuals.parsers import REPOSITORY

PAGE = REPOSITORY / "docs" / "troubleshooting.md"
MESSAGES = re.findall(r"^### `(.*)`$", PAGE.read_text(), re.MULTILINE)


def texts() -> Iterator[str]:
    """Every text in the code, with … where something is put in."""
    for file in REPOSITORY.joinpath("qemu_blkmig").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(each.value) if isinstance(each, ast.Constant) else "…" for each in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.fixture(scope="module")
def known() -> list[str]:
    """All of them."""
    return list(texts())


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_exists(message: str, known: list[str]) -> None:
    pieces = message.split("…")
    pattern = ".*".join(map(re.escape, pieces))
    assert any(re.search(pattern, text) for text in known if all(piece in text for piece in pieces))


def test_there_are_messages_and_each_is_explained_once() -> None:
    assert len(MESSAGES) > 20
    assert len(set(MESSAGES)) == len(MESSAGES)
