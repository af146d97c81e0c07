"""The agent's command, which the coordinator's starts at the destination: receive.

It loads little, because every migration waits for it.
"""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path

from qemu_blkmig.cli.form import Commands, command
from qemu_blkmig.errors import UsageError


def add_all(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = command(
        commands,
        "receive",
        "the agent beside the destination's storage (the other commands start it)",
        "[--root DIR... [--allow-launch] [--allow-connect]]",
        """
  A line of ~/.ssh/authorized_keys on the destination host, whose key can do nothing but bring images below /srv/vm:
    command="qemu-blkmig receive --root /srv/vm",restrict,port-forwarding ssh-ed25519 AAAA... admin@source
  With --allow-launch whoever has the key may run any program there, as `migrate --launch` does. `--data tls://` works
  from the address that the ssh connection comes from, with --allow-connect from any that is named.
""",
    )
    parser.add_argument(
        "--root",
        nargs="+",
        metavar="DIR",
        help="work below these directories only, whatever is asked for (default: no bounds but the user's rights)",
    )
    parser.add_argument(
        "--allow-launch", action="store_true", help="with --root: let the destination's QEMU be launched all the same"
    )
    parser.add_argument(
        "--allow-connect", action="store_true", help="with --root: let --data name any host, not just the ssh client's"
    )
    parser.set_defaults(run=_receive)


def _receive(arguments: argparse.Namespace) -> int:
    from qemu_blkmig.destination import agent
    from qemu_blkmig.destination.confine import Bounds, ssh_client

    for root in arguments.root or ():
        if not Path(root).is_absolute() or not Path(root).is_dir():
            raise UsageError(f"--root {root} is not the absolute path of a directory")
    for descriptor in (0, 1):
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            raise UsageError(
                "receive speaks to a program, over pipes on its stdin and stdout",
                advice="there is no need to start it: migrate and copy do",
            )
    bounds = Bounds(arguments.root, arguments.allow_launch, arguments.allow_connect, ssh_client())
    agent.main(bounds)
