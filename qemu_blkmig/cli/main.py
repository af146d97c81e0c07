"""`qemu-blkmig`: the command line's root, and how errors and exit codes are shown."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence

from qemu_blkmig import __version__
from qemu_blkmig.cli import commands
from qemu_blkmig.errors import BlkmigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (0 done, 1 failed, 2 usage, 3 refused, 4 undecided, 5 differ, 128+n)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.ERROR, format="%(name)s: %(levelname)s: %(message)s"
    )
    if not options.verbose:
        # It logs every connection that fails as an error, before our own error tells of it.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    try:
        return int(options.run(options))
    except BlkmigError as error:
        show_error(error, verbose=options.verbose)
        return error.exit_code


def show_error(error: BlkmigError, *, verbose: bool) -> None:
    """What happened, how things stand now, what to do next: a line each, on stderr."""
    lines = [f"qemu-blkmig: {error}"]
    if error.state:
        lines.append(f"  now:  {error.state}")
    if error.advice:
        lines.append(f"  next: {error.advice}")
    print("\n".join(lines), file=sys.stderr)
    if verbose:
        traceback.print_exception(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qemu-blkmig",
        description="Moves a running QEMU guest with its local disks to another QEMU, without shared storage.",
        epilog="Exit codes: 0 done; 1 failed, the source is the truth; 2 usage; 3 refused, nothing touched; "
        "4 undecided, a person must look; 5 contents differ; 128+n ended by signal n.",
    )
    parser.add_argument("--version", action="version", version=f"qemu-blkmig {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show causes and what is done in detail")
    commands.add_all(parser.add_subparsers(title="commands", required=True, metavar="COMMAND"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
