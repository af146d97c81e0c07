"""The command that shows a guest move: demo."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from qemu_blkmig.cli import options, show
from qemu_blkmig.cli.clock import RealClock
from qemu_blkmig.cli.form import Commands, argument, command
from qemu_blkmig.observe.progress import progress
from qemu_blkmig.units import parse_size


def add_all(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = command(commands, "demo", "watch a real guest move, and see proof that nothing is lost", "[options]")
    parser.add_argument("--disk-size", type=argument(parse_size), default=parse_size("512M"), metavar="SIZE",
                        help="of the guest's disk (default: 512M)")  # fmt: skip
    parser.add_argument("--writer", choices=["idle", "random", "hot", "sequential", "zipf", "log"], default="random",
                        help="how the guest writes: now and then (idle), all over its disk (random, the default), "
                        "mostly in one place (hot), in order (sequential)")  # fmt: skip
    parser.add_argument(
        "--format", choices=["raw", "qcow2"], default="raw", help="format of the guest's disk (default: raw)"
    )
    parser.add_argument("--shared-base", action="store_true", help="a qcow2 overlay on a base that both sides have")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work in DIR, new or empty, and leave everything there"
    )
    options.add_output(parser)
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from qemu_blkmig.demo.run import DemoOptions, demo

    wanted = DemoOptions(
        disk_size=arguments.disk_size,
        writer=arguments.writer,
        format=arguments.format,
        shared_base=arguments.shared_base,
        keep=arguments.keep,
    )
    with progress(arguments.progress) as reporter:
        outcome = asyncio.run(demo(wanted, reporter, RealClock()))
    options.print_outcome(outcome, arguments.output, show.demo)
    return 0 if outcome.proven else 5
