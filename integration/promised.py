"""Holds what the tool printed as JSON against the schemas that programs rely on: no key is missing, none unknown."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any

from jsonschema import Draft202012Validator

from manuals.schemas import FOLDER, closed

BY_COMMAND = {
    **dict.fromkeys(("migrate", "copy", "save", "resume"), "result"),
    **dict.fromkeys(("set", "switchover"), "told"),
    **{name: name for name in ("check", "jobs", "status", "load", "inspect", "hooks", "guard", "demo")},
    "cleanup": "cleaned",
    "cancel": "cancelled",
}
LINES = {"status": "--follow", "load": "--list"}
"""Options with which a command prints an object a line."""


@functools.cache
def validator(name: str) -> Draft202012Validator:
    """Of the schema in the repository, which is taken to name all keys."""
    return Draft202012Validator(closed(json.loads((FOLDER / f"{name}.json").read_text())))


def assert_promised(name: str, document: Any) -> None:
    """Assert that the document is as the schema `name` has it."""
    errors = [f"{error.json_path}: {error.message}" for error in validator(name).iter_errors(document)]
    assert not errors, f"not as {name}.json has it: {errors}: {document}"


def assert_output_promised(command: Sequence[object], stdout: str, stderr: str) -> None:
    """Assert that all that a run of the tool by this command line printed as JSON is as the schemas have it."""
    words = [str(word) for word in command]
    if _option(words, "--progress", "json"):
        for line in stderr.splitlines(keepends=True):
            # The last one is not whole where the tool was killed.
            if line.startswith("{") and line.endswith("\n"):
                assert_promised("progress", json.loads(line))
    if not _option(words, "--output", "json") or not stdout.startswith("{"):
        return
    name = expected(words)
    if name is None:
        return
    if name in LINES and LINES[name] in words:
        for line in stdout.splitlines():
            assert_promised("block" if name == "load" else name, json.loads(line))
        return
    document = json.loads(stdout)
    if "error" in document:
        name = "error"
    elif name == "check" and "left_alone" in document:
        name = "plan"
    elif name == "cancelled" and "owner" in document:
        name = "cleaned"
    assert_promised(name, document)


def expected(words: Sequence[str]) -> str | None:
    """The schema of what the tool prints when it is called so; None if these are no words of the tool's."""
    for place, word in enumerate(words):
        if word in ("qemu_blkmig.cli.virsh_blkmigrate", "virsh-blkmigrate"):
            return "plan" if "--dry-run" in words else "result"
        if word in ("qemu_blkmig", "qemu-blkmig"):
            command = next((each for each in words[place + 1 :] if not each.startswith("-")), "")
            return BY_COMMAND.get(command)
    return None


def _option(words: Sequence[str], option: str, value: str) -> bool:
    return f"{option}={value}" in words or (option, value) in itertools.pairwise(words)
