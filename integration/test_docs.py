"""Every command that the manual shows is run, page by page, in the laboratory that it tells of (`make lab`).

A page's ```console blocks are one session in hosta: lines that begin with `hosta# ` are typed, a backslash continues
them, all others are what was seen and are not compared. `JOB` stands for the name of the one job there is. A comment
before a block may say more:

    <!-- exits: 3 -->                 its last command ends with that code
    <!-- not run here: REASON -->     it cannot be run in the laboratory
    <!-- file: NAME -->               the block, of any language, is what that file is to hold
"""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration.hosts import REPOSITORY
from integration.laboratory import laboratory
from manuals.parsers import programs

DOCS = REPOSITORY / "docs"
PROMPT = "hosta# "
LIMIT = 600
"""Seconds that a page's session may take, on a busy machine too."""
LONG = ("ansible.md", "emptying-a-host.md", "pre-seeding.md", "report.md", "resume.md", "slow-links.md")
"""Pages that only a thorough run has. What they show is in test_ansible.py, test_compare.py, test_report.py,
test_jobs.py, test_data_path.py and test_convergence.py as well, and in the tutorial a job that is resumed,
or told to switch over. That our commands are understood is looked at of them, too."""
_BLOCK = re.compile(r"(?:^<!-- ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.timeout(2 * LIMIT)


@dataclass(frozen=True)
class Block:
    """A fenced block: `note` is the comment before it."""

    note: str
    language: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return self.note.removeprefix("not run here: ") if self.note.startswith("not run here: ") else None

    @property
    def file(self) -> str | None:
        """What it is to be written to."""
        return self.note.removeprefix("file: ") if self.note.startswith("file: ") else None

    @property
    def code(self) -> int:
        """What its last command ends with."""
        return int(self.note.removeprefix("exits: ")) if self.note.startswith("exits: ") else 0

    def commands(self) -> Iterator[str]:
        """What is typed."""
        lines = iter(self.text.splitlines())
        for line in lines:
            if line.startswith(PROMPT):
                command = line.removeprefix(PROMPT)
                while command.endswith("\\"):
                    command += "\n" + next(lines)
                yield command


def blocks(page: Path) -> list[Block]:
    """The page's fenced blocks in order."""
    return [Block(note, language, text) for note, language, text in _BLOCK.findall(page.read_text())]


PROGRAMS = programs()
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if any(block.language == "console" for block in blocks(page))]


def script(page: Path) -> str:
    """The page's session, for bash; each command is told on stderr before it is run."""
    lines = ["exec 2>&1"]
    for block in blocks(page):
        if block.file:
            lines += [f"cat >{block.file} <<'SHOWN'\n{block.text}SHOWN"]
        if block.language != "console" or block.reason:
            continue
        commands = [re.sub(r"\bJOB\b", "$(lab job)", command) for command in block.commands()]
        for command in commands[:-1]:
            lines += [f"cat <<'SHOWN'\n# {command}\nSHOWN", command]
        last = commands[-1]
        lines += [f"cat <<'SHOWN'\n# {last}\nSHOWN"]
        lines += [last] if not block.code else [f"code=0\n{last} || code=$?\n[ $code = {block.code} ]"]
    return "\n".join([*lines, "echo THE END"])


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.thorough] if page.name in LONG else []) for page in PAGES],
    ids=lambda page: str(page.relative_to(DOCS)),
)
def test_every_command_of_the_page_runs_in_the_laboratory(page: Path, tmp_path: Path) -> None:
    left_out = [block.reason for block in blocks(page) if block.language == "console" and block.reason]
    print(*(f"not run: {reason}" for reason in left_out), sep="\n")
    if all(block.reason for block in blocks(page) if block.language == "console"):
        pytest.skip(f"nothing of it can be run here: {'; '.join(filter(None, left_out))}")
    with laboratory(libvirt="lab domain" in script(page)) as lab:
        session = [*lab.hosts.enter, "env", "-C", "/srv/vm", "bash", "-ec", script(page)]
        typed = tmp_path / "session"
        with (
            typed.open("wb") as seen,
            subprocess.Popen(session, env=lab.environment, stdin=subprocess.DEVNULL, stdout=seen) as shell,
        ):
            try:
                code: int | None = shell.wait(LIMIT)
            except subprocess.TimeoutExpired:
                code = None
                shell.kill()
        left = [f"{path.name}: {path.read_text(errors='replace')[-2000:]}" for path in lab.progress()]
    text = typed.read_text(errors="replace")
    assert code == 0 and text.endswith("THE END\n"), "\n".join([f"exit code {code}", text[-6000:], *left])


def ours(command: str) -> Iterator[list[str]]:
    """The words of each command of ours in what is typed."""
    lexer = shlex.shlex(
        re.sub(r"""[12]?>[^\s'"]+""", "", command).replace("\\\n", ""), posix=True, punctuation_chars=True
    )
    lexer.whitespace_split = True
    for ends, words in itertools.groupby(lexer, key=lambda word: word in (";", "&", "&&", "|", "||", "(", ")")):
        if not ends and (found := list(words))[0] in PROGRAMS:
            yield found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_commands_of_ours_are_understood(page: Path) -> None:
    typed = (command for block in blocks(page) if block.language == "console" for command in block.commands())
    for name, *words in itertools.chain.from_iterable(map(ours, typed)):
        try:
            PROGRAMS[name].parse_args(words)
        except SystemExit as asked:
            assert asked.code == 0 and words == ["--version"], words


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_commands_stand_in_blocks_that_are_run(page: Path) -> None:
    for block in blocks(page):
        if block.language == "console":
            assert list(block.commands()), f"a block without a command: {block.text}"
        elif "man" not in page.parts:
            typed = [
                line for line in block.text.splitlines() if re.match(r"\s*([$#] |hosta# |qemu-blkmig |virsh)", line)
            ]
            assert not typed, f"in a block that is not run: {typed}"
