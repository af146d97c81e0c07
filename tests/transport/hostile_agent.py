"""An agent that means harm: `python -m tests.transport.hostile_agent KIND SEED` answers on stdout as KIND says."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import typing
from collections.abc import Callable
from typing import Any

import qemu_blkmig
from qemu_blkmig.destination import protocol
from tests.destination.hostile import Drawer

TEXTS = ("", "x", "\x1b]0;owned\x07\x1b[2J", "a\0b", "x" * 100_000, "%s{0}", "/etc/passwd")


def say(data: bytes) -> None:
    """Write it all to the coordinator, for as long as there is one."""
    while data:
        data = data[os.write(1, data) :]


def line(message: dict[str, Any]) -> bytes:
    """A message as it is sent."""
    return json.dumps(message).encode() + b"\n"


def greet() -> None:
    """Answer hello as an agent would."""
    number = json.loads(sys.stdin.readline())["id"]
    hello = Drawer(0, ("x",)).struct(protocol.HelloReply)
    hello |= {"version": qemu_blkmig.__version__, "protocol": protocol.PROTOCOL}
    say(line({"type": "reply", "id": number, "outcome": hello}))


def garbage(dice: random.Random) -> None:
    """What a shell's greeting might say, and worse."""
    say(b"Welcome to hostb!\n" + dice.randbytes(1000) + b"\n")


def endless_line(_: random.Random) -> None:
    """A line that has no end."""
    while True:
        say(b"x" * (1 << 20))


def stderr_flood(_: random.Random) -> None:
    """More on stderr than anybody wants to keep."""
    for _number in range(100):
        os.write(2, b"\x1b[31mnonsense " * 4096)


def wrong_ids(dice: random.Random) -> None:
    """Answers to what was never asked, and no others."""
    for _number in range(2000):
        say(line({"type": "reply", "id": dice.randrange(-(1 << 60), 1 << 60), "outcome": {"type": "done"}}))


def progress_flood(dice: random.Random) -> None:
    """Progress on disks that there are not, of amounts that there cannot be."""
    for _number in range(2000):
        figures = {name: dice.randrange(1 << 62) for name in ("copied", "zeroed", "skipped")}
        say(line({"type": "progress", "disk": "x" * dice.randrange(100)} | figures))


def deep(_: random.Random) -> None:
    """More brackets than a parser's stack holds."""
    say(b'{"type": "reply", "id": 2, "outcome": ' + b"[" * 1_000_000 + b"\n")


def silent(_: random.Random) -> None:
    """Nothing at all, not even an end."""
    time.sleep(1000)


def closed(_: random.Random) -> None:
    """Stdout ends, the process does not, and it will not be asked to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.close(1)
    time.sleep(1000)


def drawn(dice: random.Random) -> None:
    """Each request gets an answer of the right form with any content, or nearly."""
    draw = Drawer(dice.randrange(1 << 30), TEXTS)
    for asked in sys.stdin:
        outcome = draw.struct(dice.choice(typing.get_args(protocol.Outcome)))
        if dice.random() < 0.03:
            outcome = draw.damaged(outcome)
        say(line({"type": "reply", "id": json.loads(asked)["id"], "outcome": outcome}))


KINDS: dict[str, Callable[[random.Random], None]] = {
    kind.__name__: kind
    for kind in (
        garbage, endless_line, stderr_flood, wrong_ids, progress_flood, deep, silent, closed, drawn,
    )
}  # fmt: skip


def main() -> None:
    """Be it, after a hello that is sound."""
    greet()
    KINDS[sys.argv[1]](random.Random(int(sys.argv[2])))
    for _line in sys.stdin:
        pass


if __name__ == "__main__":
    main()
