"""`report`: a job's report as a page in a file, or served while the job runs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from pathlib import Path

from qemu_blkmig.cli import options
from qemu_blkmig.cli.form import Commands, argument, command
from qemu_blkmig.errors import Refused, UsageError

PORTS = range(1 << 16)


def add_all(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = command(
        commands,
        "report",
        "show a job, over or under way, as a page with figures: phases, rates, downtime, a map of each disk",
        "JOB [--html OUT] [--live [--port N]]",
        """
  qemu-blkmig report 1a2b3c4d --html report.html     one file that needs nothing else
  qemu-blkmig report 1a2b3c4d --live                 prints a URL of this host's; the page there is always the latest
""",
    )
    parser.add_argument("job", metavar="JOB", help="as `qemu-blkmig jobs --all` lists it")
    parser.add_argument("--html", metavar="OUT", help="write the page to this file (-: stdout), when --live ends anew")
    parser.add_argument(
        "--live",
        action="store_true",
        help="serve the page on 127.0.0.1 until the job is over, or interrupted by Ctrl-C",
    )
    parser.add_argument("--port", type=argument(options.count), default=0, metavar="N",
                        help="with --live: the port (default: any that is free)")  # fmt: skip
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from qemu_blkmig.observe.report.material import gather
    from qemu_blkmig.observe.report.page import render

    if arguments.html is None and not arguments.live:
        raise UsageError("nowhere to show it", advice="give --html OUT, --live, or both")
    if arguments.port not in PORTS or (arguments.port and not arguments.live):
        raise UsageError("--port is for --live, and from 0 to 65535")
    page = render(asyncio.run(gather(arguments.job)))
    if arguments.live:
        _serve(arguments.job, arguments.port)
        page = render(asyncio.run(gather(arguments.job)))
    if arguments.html == "-":
        sys.stdout.write(page)
    elif arguments.html is not None:
        _write(Path(arguments.html), page)
    return 0


def _serve(job: str, port: int) -> None:
    from qemu_blkmig.observe.report.live import LiveReport

    live = LiveReport(job, port)
    live.start()
    try:
        print(live.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            live.wait()
    finally:
        live.close()


def _write(path: Path, page: str) -> None:
    """Whoever opens the file never sees a part. Raises `Refused`."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise Refused(f"{path} cannot be written: {error.strerror}") from error
