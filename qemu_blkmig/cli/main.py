"""`qemu-blkmig`: the command line's root, and how errors and exit codes are shown."""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import itertools
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

import msgspec

from qemu_blkmig import __version__
from qemu_blkmig.cli import commands
from qemu_blkmig.cli.form import Parser, as_json
from qemu_blkmig.errors import BlkmigError, Interrupted, kind_of

EXIT_CODES = """\
exit codes:
  0      done
  1      failed; the source is the truth
  2      the command line makes no sense
  3      refused; nothing that existed was touched
  4      undecided or unfinished; a person must look, then: qemu-blkmig cleanup JOB
  5      the contents of the two sides differ
  128+n  ended by signal n
"""

# A process that ends gives its memory back all at once: to look through it for what nobody uses takes the interpreter
# 20 ms, which the user would wait.
atexit.register(gc.freeze)


class ErrorReport(msgspec.Struct, frozen=True):
    """`kind`: a class of errors.py, as in source-read; `what` happened to which `disk`, how things stand now (`state`),
    and what to do next (`advice`).

    `suspended`: the job that `resume` goes on with.
    """

    exit_code: int
    kind: str
    what: str
    disk: str | None
    state: str | None
    advice: str | None
    suspended: str | None


class Failure(msgspec.Struct, frozen=True):
    """What a command that failed prints on stdout with --output json."""

    error: ErrorReport


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (0 done, 1 failed, 2 usage, 3 refused, 4 undecided, 5 differ, 128+n)."""
    given = sys.argv[1:] if arguments is None else arguments
    named = next((word for word in given if word in ("-h", "--help") or not word.startswith("-")), None)
    return run(lambda: parser(named), given)


def run(make: Callable[[], argparse.ArgumentParser], given: Sequence[str]) -> int:
    """Do what a command line of the program with this parser asks for; its exit code."""
    verbose = False
    program = "qemu-blkmig"
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr: a name that cannot be written here as it is does not make a failure of what was done.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        root = make()
        program = root.prog
        options = root.parse_args(given)
        verbose = options.debug
        _set_up_logging(verbose=verbose)
        return int(options.run(options))
    except BlkmigError as error:
        failure = error
    except KeyboardInterrupt:
        failure = Interrupted(signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            _discard_output()
            return 128 + signal.SIGPIPE
        failure = BlkmigError(
            f"a defect of qemu-blkmig: {type(error).__name__}: {error}",
            advice="please report it, with what --verbose shows; `qemu-blkmig jobs` tells whether a job was left",
        )
        failure.__cause__ = error
    show_error(failure, verbose=verbose, program=program)
    if _wants_json(given):
        _print_json(failure)
    return failure.exit_code


def show_error(error: BlkmigError, *, verbose: bool, program: str = "qemu-blkmig") -> None:
    """What happened, how things stand now, what to do next: a line each, on stderr; with `verbose` its causes first.

    What has several lines may be another host's words: those are further in, and pass for none of ours.
    """
    lines = [f"{program}: {error}"]
    if error.state:
        lines.append(f"  now:  {error.state}")
    if error.advice:
        lines.append(f"  next: {error.advice}")
    lines = [line.replace("\n", "\n        ") for line in lines]
    try:
        if verbose:
            traceback.print_exception(error)
        print("\n".join(lines), file=sys.stderr, flush=True)
    except OSError:
        return


def report(error: BlkmigError) -> ErrorReport:
    """`error` as programs get it."""
    return ErrorReport(
        error.exit_code, kind_of(type(error)), error.what, error.disk, error.state, error.advice, error.suspended
    )


def _print_json(error: BlkmigError) -> None:
    try:
        print(as_json(Failure(report(error))), flush=True)
    except OSError:
        _discard_output()


def _reader_is_gone() -> bool:
    """Whether nobody reads our output any more (`| head`)."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)
    return bool(poller.poll(0))


def _discard_output() -> None:
    """Python would try to flush it once more when it exits, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether --output json was given, as far as a command line tells that may make no sense."""
    pairs = itertools.pairwise(arguments)
    return "--output=json" in arguments or ("--output", "json") in pairs


def _set_up_logging(*, verbose: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.ERROR, format="%(name)s: %(levelname)s: %(message)s"
    )
    if not verbose:
        # It logs every connection that fails as an error, before our own error tells of it.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


def parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """The whole command line; manuals and completion are made from it. `wanted`: what this command needs suffices."""
    root = Parser(
        prog="qemu-blkmig",
        usage="%(prog)s [-v] COMMAND ...",
        description="Moves a running QEMU guest with its local disks to another QEMU, without shared storage.",
        epilog=f"`%(prog)s COMMAND --help` tells a command's options and shows examples.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"qemu-blkmig {__version__}")
    root.add_argument(
        "-v", "--verbose", dest="debug", action="store_true", help="show causes and what is done in detail"
    )
    commands.add_all(
        root.add_subparsers(title="commands", prog="qemu-blkmig", required=True, metavar="COMMAND"), wanted
    )
    return root


if __name__ == "__main__":
    sys.exit(main())
