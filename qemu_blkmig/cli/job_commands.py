"""Commands about jobs that run or ran: which there are, how they stand, and what becomes of them."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

from qemu_blkmig.cli import options, show
from qemu_blkmig.cli.options import Commands
from qemu_blkmig.errors import Interrupted, Refused
from qemu_blkmig.job.record import Job, left_behind
from qemu_blkmig.job.settle import settle, unsettled
from qemu_blkmig.places import STATE_VARIABLE, state_directory


def add_all(commands: Commands) -> None:
    """Add the commands to the parser."""
    _add_jobs(commands)
    _add_cleanup(commands)


def _add_jobs(commands: Commands) -> None:
    parser = options.command(commands, "jobs", "list the jobs that run, or were left behind", "[options]")
    options.add_form(parser)
    parser.set_defaults(run=_jobs)


def _jobs(arguments: argparse.Namespace) -> int:
    try:
        # What cannot be read must not look like nothing.
        list(state_directory().iterdir())
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Refused(
            f"the state directory {state_directory()} cannot be read: {error.strerror}",
            advice=f"run as the user that migrated, or name another place by {STATE_VARIABLE}",
        ) from error
    outcome = show.Jobs(str(state_directory()), list(left_behind()))
    if not outcome.jobs and arguments.output == "text":
        print(f"no jobs in {outcome.directory}", file=sys.stderr)
        return 0
    return options.print_outcome(outcome, arguments.output, show.jobs)


def _add_cleanup(commands: Commands) -> None:
    parser = options.command(
        commands,
        "cleanup",
        "bring a job that was left behind to rest, and remove what it made",
        "JOB [options]",
        """
  qemu-blkmig jobs
  qemu-blkmig cleanup 1a2b3c4d
  Who has the guest is found out, never guessed. Exit code 4: not settled, the job stays listed; try again once
  what is told was mended.
""",
    )
    parser.add_argument("job", metavar="JOB", help="as `qemu-blkmig jobs` lists it")
    options.add_form(parser)
    parser.set_defaults(run=_cleanup)


def _cleanup(arguments: argparse.Namespace) -> int:
    job = Job.load(arguments.job)
    name = job.record.job
    try:
        settlement = asyncio.run(settle(job))
    except KeyboardInterrupt:
        raise Interrupted(
            signal.SIGINT, state=f"job {name} is not settled yet", advice=f"run again: qemu-blkmig cleanup {name}"
        ) from None
    if not settlement.decided:
        job.release()
        raise unsettled(f"job {name} could not be settled", settlement, name)
    job.remove()
    return options.print_outcome(
        show.Cleaned(name, settlement.owner.value, settlement.facts), arguments.output, show.cleaned
    )
