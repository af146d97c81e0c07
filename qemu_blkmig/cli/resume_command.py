"""`resume`, and the `--retry` of the commands that can be resumed."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

from qemu_blkmig.cli import options, show
from qemu_blkmig.cli.form import Commands, argument, command
from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.beginning import Beginning
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.moment import parse_moment
from qemu_blkmig.job.options import CopyOptions, MigrateOptions, OnStall
from qemu_blkmig.job.work import work_of

if TYPE_CHECKING:
    from qemu_blkmig.engine.ports import Clock
    from qemu_blkmig.job.interrupts import Interrupts
    from qemu_blkmig.job.layers import Persist, Work
    from qemu_blkmig.job.reporting import Reporter
    from qemu_blkmig.job.result import Result
    from qemu_blkmig.observe.asked import Asked

    First = Callable[[Reporter, Persist], Awaitable[Work]]


def add_all(commands: Commands) -> None:
    """Add `resume` to the parser."""
    parser = command(
        commands,
        "resume",
        "go on with a migration or copy that was suspended",
        "JOB [options]",
        """
  qemu-blkmig jobs
  qemu-blkmig resume 1a2b3c4d
  The source QEMU was restarted meanwhile, so nobody knows what the guest has written since:
    qemu-blkmig resume 1a2b3c4d --compare
  What is not given is as it was asked for at first, or by `qemu-blkmig set` since.
""",
    )
    parser.add_argument("job", metavar="JOB", help="as `qemu-blkmig jobs` lists it")
    parser.add_argument(
        "--compare", action="store_true", help="read both sides and copy what differs, whatever was recorded"
    )
    parser.add_argument(
        "--bandwidth", type=argument(options.rate_or_none), metavar="RATE", help="as of migrate, or none"
    )
    parser.add_argument("--downtime", type=argument(options.count), metavar="MS", help="as of migrate")
    parser.add_argument("--max-rounds", type=argument(options.count), metavar="N", help="as of migrate")
    parser.add_argument("--launch", metavar="CMD", help="as of migrate: another command for the destination QEMU")
    parser.add_argument("--on-stall", choices=[choice.value for choice in OnStall], help="as of migrate")
    parser.add_argument("--switchover", type=argument(parse_moment), metavar="WHEN", help="as of migrate")
    add_retry(parser)
    options.add_output(parser)
    options.add_metrics(parser)
    parser.set_defaults(run=_resume)


def add_retry(parser: argparse.ArgumentParser) -> None:
    """Add `--retry`."""
    parser.add_argument(
        "--retry",
        type=argument(options.count),
        default=0,
        metavar="N",
        help="when it is suspended, by a failure that may pass, resume it up to N times, after 1, 2, 4 .. 30 s "
        "(default: 0)",
    )


def carry(
    wanted: MigrateOptions | CopyOptions | ManagedOptions,
    arguments: argparse.Namespace,
    destination: object,
    source: str | None = None,
) -> int:
    """Do what is wanted, or, with --flatten no, what is left of that once the layers are there.

    `source` (as given on the command line, unless it is named), `destination`: as metrics are to name them.
    """
    source = source or arguments.source
    if wanted.selection.flatten:
        return _carry_at_once(wanted, arguments, source, destination)

    async def layers_first(reporter: Reporter, persist: Persist) -> Work:
        from qemu_blkmig.job.layers import bring_layers

        return partial(work_of(wanted), await bring_layers(wanted, reporter, persist))

    return run(partial(work_of(wanted), wanted), arguments, source, destination, layers_first)


def _carry_at_once(
    wanted: MigrateOptions | CopyOptions | ManagedOptions,
    arguments: argparse.Namespace,
    source: str,
    destination: object,
) -> int:
    """The way to the destination is begun before all that does it is loaded."""
    beginning = Beginning(wanted.place)

    async def work(reporter: Reporter, interrupts: Interrupts, clock: Clock) -> Result:
        import asyncio

        ends = (None, wanted.target_uri) if isinstance(wanted, ManagedOptions) else (wanted.source, None)
        async with beginning.reaching(*ends):
            with interrupts.before_there_is_a_job():
                do = await asyncio.to_thread(work_of, wanted)
                return await do(wanted, reporter, interrupts, clock, beginning=beginning)

    return run(work, arguments, source, destination, beginning=beginning)


def run(
    work: Work,
    arguments: argparse.Namespace,
    source: str,
    destination: object,
    first: First | None = None,
    beginning: AbstractContextManager[object] | None = None,
) -> int:
    """Do the work, and resume it as often as `--retry` says; show the result.

    `source`, `destination`: as metrics are to name them. `first`: what has jobs of its own, which are resumed as often;
    what it returns is the work then. `beginning`: what may begin before the program is loaded.
    """
    if arguments.retry < 0:
        raise UsageError("--retry must not be negative")
    asked = options.asked(arguments, source, str(destination))
    with beginning or contextlib.nullcontext():
        result = _done(work, asked, arguments.retry, first)
    return options.print_outcome(result, arguments.output, show.result)


def _done(work: Work, asked: Asked, retries: int, first: First | None) -> Result:
    import asyncio

    from qemu_blkmig.cli.clock import RealClock
    from qemu_blkmig.job.persist import persist
    from qemu_blkmig.observe.watch import watching

    if retries:
        from qemu_blkmig.job.resume import Changes, resume

    clock = RealClock()
    with watching(asked) as watch:
        reporter = watch.reporter

        async def again(job: str, interrupts: Interrupts) -> Result:
            return await resume(job, Changes(), reporter, interrupts, clock)

        async def persistently(work: Work, *, more_follows: bool = False) -> Result:
            return await persist(
                lambda interrupts: work(reporter, interrupts, clock), again, retries, reporter, clock, watch.failed,
                more_follows=more_follows,
            )  # fmt: skip

        async def all_of_it() -> Result:
            layers = partial(persistently, more_follows=True)
            return await persistently(work if first is None else await first(reporter, layers))

        result = asyncio.run(all_of_it())
        watch.done(result)
    return result


def _resume(arguments: argparse.Namespace) -> int:
    return resume_job(arguments.job, arguments, launch=arguments.launch)


def resume_job(
    job: str,
    arguments: argparse.Namespace,
    launch: str | None = None,
    xml: str | None = None,
    persistent_xml: str | None = None,
) -> int:
    """Go on with `job`, with what was given anew of bandwidth, downtime, max_rounds, on_stall, switchover, compare."""
    import asyncio

    from qemu_blkmig.job import others
    from qemu_blkmig.job.resume import Changes, resume

    changes = Changes(
        bandwidth=arguments.bandwidth,
        downtime=None if arguments.downtime is None else arguments.downtime / 1000,
        max_rounds=arguments.max_rounds,
        on_stall=None if arguments.on_stall is None else OnStall(arguments.on_stall),
        switchover=arguments.switchover,
        launch=launch,
        xml=xml,
        persistent_xml=persistent_xml,
        compare=arguments.compare,
    )
    others.not_over(job)
    stood = asyncio.run(others.stand(job))
    return run(
        lambda reporter, interrupts, clock: resume(job, changes, reporter, interrupts, clock),
        arguments,
        stood.source or "",
        stood.destination or "",
    )
