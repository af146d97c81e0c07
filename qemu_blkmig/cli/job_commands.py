"""Commands about jobs that run or ran: which there are, how they stand, and what becomes of them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys

import msgspec

from qemu_blkmig.cli import options, show_job
from qemu_blkmig.cli.form import Commands, argument, command
from qemu_blkmig.errors import Interrupted, Refused, UsageError
from qemu_blkmig.job import others
from qemu_blkmig.job.control import Change
from qemu_blkmig.job.history import OWNER, note_end
from qemu_blkmig.job.record import Job
from qemu_blkmig.job.settle import DESTINATION_IS_OFF, settle
from qemu_blkmig.job.settlement import unsettled
from qemu_blkmig.job.standin import ask_to_leave
from qemu_blkmig.job.status import RUNNING
from qemu_blkmig.places import STATE_VARIABLE, state_directory


def add_all(commands: Commands) -> None:
    """Add the commands to the parser."""
    _add_jobs(commands)
    _add_status(commands)
    _add_set(commands)
    _add_switchover(commands)
    _add_cancel(commands)
    _add_cleanup(commands)


def _add_jobs(commands: Commands) -> None:
    parser = command(commands, "jobs", "list the jobs that run, or were left behind", "[options]")
    parser.add_argument("--all", action="store_true", help="also those that are over, of which the last 100 are kept")
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
    outcome = show_job.Jobs(str(state_directory()), asyncio.run(others.listed(with_past=arguments.all)))
    if not outcome.jobs and arguments.output == "text":
        print(f"no jobs in {outcome.directory}", file=sys.stderr)
        return 0
    return options.print_outcome(outcome, arguments.output, show_job.jobs)


def _add_status(commands: Commands) -> None:
    parser = command(
        commands,
        "status",
        "tell how a job stands: how far it is, who has the guest, what to do next",
        "JOB [options]",
        """
  qemu-blkmig status 1a2b3c4d
  qemu-blkmig status 1a2b3c4d --follow --output json     one JSON object a line and second, until it is over
""",
    )
    _add_job(parser)
    parser.add_argument("--follow", action="store_true", help="go on until the job is over")
    options.add_form(parser)
    parser.set_defaults(run=_status)


def _status(arguments: argparse.Namespace) -> int:
    with contextlib.suppress(KeyboardInterrupt):
        if not arguments.follow:
            return options.print_outcome(asyncio.run(others.stand(arguments.job)), arguments.output, show_job.status)
        asyncio.run(_follow(arguments.job, arguments.output))
    return 0


async def _follow(name: str, form: str) -> None:
    async for job in others.follow(name):
        if form == "json":
            print(msgspec.json.encode(job).decode(), flush=True)
        else:
            print(show_job.line(job) if job.state == RUNNING else show_job.status(job), flush=True)


def _add_set(commands: Commands) -> None:
    parser = command(
        commands,
        "set",
        "change the limits of a running job; it takes effect at once",
        "JOB [--bandwidth RATE|none] [--downtime MS] [options]",
        """
  qemu-blkmig set 1a2b3c4d --bandwidth 50
  qemu-blkmig set 1a2b3c4d --bandwidth none --downtime 500
""",
    )
    _add_job(parser)
    parser.add_argument(
        "--bandwidth",
        type=argument(options.rate_or_none),
        metavar="RATE",
        help="most MiB/s, such as 100; or bytes a second with a suffix, such as 512k; or none",
    )
    parser.add_argument("--downtime", type=argument(options.count), metavar="MS",
                        help="longest pause of the guest to aim at, in milliseconds")  # fmt: skip
    options.add_form(parser)
    parser.set_defaults(run=_set)


def _set(arguments: argparse.Namespace) -> int:
    if arguments.bandwidth is None and arguments.downtime is None:
        raise UsageError("nothing to be set", advice="give --bandwidth RATE, --downtime MS, or both")
    wanted = Change(
        bandwidth=msgspec.UNSET if arguments.bandwidth is None else arguments.bandwidth or None,
        downtime=msgspec.UNSET if arguments.downtime is None else arguments.downtime / 1000,
    )
    text = asyncio.run(others.change(arguments.job, wanted))
    return options.print_outcome(show_job.Told(arguments.job, text), arguments.output, show_job.told)


def _add_switchover(commands: Commands) -> None:
    parser = command(
        commands,
        "switchover",
        "let a guest move whose migration waits for that (migrate --switchover manual or at=TIME)",
        "JOB [options]",
    )
    _add_job(parser)
    options.add_form(parser)
    parser.set_defaults(run=_switchover)


def _switchover(arguments: argparse.Namespace) -> int:
    text = asyncio.run(others.switch_over(arguments.job))
    return options.print_outcome(show_job.Told(arguments.job, text), arguments.output, show_job.told)


def _add_cancel(commands: Commands) -> None:
    parser = command(
        commands,
        "cancel",
        "give a job up, as Ctrl-C does: the guest stays, what was made is removed",
        "JOB [options]",
        """
  qemu-blkmig cancel 1a2b3c4d
  Returns when the job has ended. Of a job that was left behind, what is left is removed (as cleanup does). Exit
  code 1: it ended in another way, which is told; 4: a person must look.
""",
    )
    _add_job(parser)
    options.add_form(parser)
    parser.set_defaults(run=_cancel, destination_is_off=False)


def _cancel(arguments: argparse.Namespace) -> int:
    ended = asyncio.run(others.cancel(arguments.job))
    if ended is None:
        return _cleanup(arguments)
    outcome = show_job.Cancelled(arguments.job, ended.text, ended.guest)
    return options.print_outcome(outcome, arguments.output, show_job.cancelled)


def _add_cleanup(commands: Commands) -> None:
    parser = command(
        commands,
        "cleanup",
        "bring a job that was left behind to rest, and remove what it made",
        "JOB [options]",
        """
  qemu-blkmig jobs
  qemu-blkmig cleanup 1a2b3c4d
  Who has the guest is found out, never guessed. Exit code 0 also if the job is over already, by an earlier cleanup
  or its watchdog; 4: not settled, the job stays listed; try again once what is told was mended. Where the destination
  host cannot be reached and was told to start the guest, only you can know: --destination-is-off gives the guest back
  to the source.
""",
    )
    _add_job(parser)
    parser.add_argument(
        DESTINATION_IS_OFF,
        action="store_true",
        help="you have seen to it that the guest does not run there; it counts only if that host cannot be reached",
    )
    options.add_form(parser)
    parser.set_defaults(run=_cleanup)


def _cleanup(arguments: argparse.Namespace) -> int:
    ask_to_leave(state_directory() / arguments.job, others.SETTLING)
    try:
        job = Job.load(arguments.job)
    except Refused:
        # Its watchdog, or an earlier cleanup, may have been there before.
        if others.find(arguments.job) is not None:
            raise
        return options.print_outcome(_over(arguments.job), arguments.output, show_job.cleaned)
    name = job.record.job
    try:
        settlement = asyncio.run(settle(job, destination_is_off=arguments.destination_is_off, long_after=True))
    except KeyboardInterrupt:
        raise Interrupted(
            signal.SIGINT, state=f"job {name} is not settled yet", advice=f"run again: qemu-blkmig cleanup {name}"
        ) from None
    if not settlement.decided:
        job.release()
        raise unsettled(f"job {name} could not be settled", settlement, name)
    note_end(job.directory, "given up, and cleaned up", settlement.facts, settlement.owner.value)
    job.remove()
    return options.print_outcome(
        show_job.Cleaned(name, settlement.owner.value, settlement.facts), arguments.output, show_job.cleaned
    )


def _over(name: str) -> show_job.Cleaned:
    owner = others.chronicle(name).facts().get(OWNER, "unknown")
    return show_job.Cleaned(name, owner, [f"job {name} was over already: {others.how_it_ended(name)}"])


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help="as `qemu-blkmig jobs` lists it")
