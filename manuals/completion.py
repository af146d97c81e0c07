"""Writes completion for bash, zsh and fish into a folder: python -m manuals.completion FOLDER

What a value is, is told by its metavar. Names of jobs and domains come from a few lines of shell, without Python: a job
is a folder in the state directory (`qemu_blkmig.places`), domains are what virsh lists.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import shtab

from manuals.parsers import every, programs

PLACES = {
    "bash": "bash-completion/completions/{program}",
    "zsh": "zsh/vendor-completions/_{program}",
    "fish": "fish/vendor_completions.d/{program}.fish",
}
"""Where each shell looks, below /usr/share."""

_JOBS = """
state=$QEMU_BLKMIG_STATE_DIR
[ "$state" ] || state=${XDG_STATE_HOME:-$HOME/.local/state}/qemu-blkmig
[ "$QEMU_BLKMIG_STATE_DIR" ] || [ "$(id -u)" -ne 0 ] || state=/var/lib/qemu-blkmig
for each in "$state"/*/record.json; do [ ! -e "$each" ] || basename "$(dirname "$each")"; done
"""
_DOMAINS = "virsh --quiet list --all --name 2>/dev/null"


def _asked(name: str, script: str) -> dict[str, str | dict[str, str]]:
    """A completer for each shell that offers the lines which a script for sh prints; it holds no single quotes."""
    words = f"sh -c '{script.strip()}'"
    return {
        "bash": name,
        "zsh": name,
        "fish": f"({name})",
        "preamble": {
            "bash": f'{name}() {{ compgen -W "$({words})" -- "$1"; }}',
            "zsh": f'{name}() {{ local -a found; found=(${{(f)"$({words})"}}); compadd -a found; }}',
            "fish": f"function {name}\n    {words}\nend",
        },
    }


BY_METAVAR = {
    "JOB": _asked("_qemu_blkmig_jobs", _JOBS),
    "DOMAIN": _asked("_qemu_blkmig_domains", _DOMAINS),
    "DIR": shtab.DIRECTORY,
    **dict.fromkeys(("FILE", "PATH", "SOCK", "IMAGE", "STREAM", "OUT", "HTML"), shtab.FILE),
}


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion of a program in a shell."""
    for each in every(parser):
        for action in each._actions:
            known = BY_METAVAR.get(action.metavar) if isinstance(action.metavar, str) else None
            if known is not None and not action.choices:
                action.complete = known  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def main(folder: Path) -> None:
    """Write all of them."""
    for program, parser in programs().items():
        for shell, place in PLACES.items():
            path = folder / place.format(program=program)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(completion(parser, shell))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
