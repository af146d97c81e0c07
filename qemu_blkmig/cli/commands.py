"""Each command: its options, the one function it calls, how its result is shown."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from qemu_blkmig.cli import show, stream_commands
from qemu_blkmig.cli.clock import RealClock
from qemu_blkmig.demo.run import DemoOptions, demo
from qemu_blkmig.destination import agent
from qemu_blkmig.errors import BlkmigError, Interrupted, Refused, UsageError
from qemu_blkmig.job.check import check
from qemu_blkmig.job.copy import copy
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.migrate import migrate
from qemu_blkmig.job.options import CopyOptions, MigrateOptions, OnStall, Selection, Target, Transfer
from qemu_blkmig.job.place import FORMS, REMOTE_COMMAND, Place, parse_place
from qemu_blkmig.job.record import STATE_VARIABLE, Job, left_behind, state_directory
from qemu_blkmig.job.settle import settle, unsettled
from qemu_blkmig.observe.progress import progress
from qemu_blkmig.units import parse_rate, parse_size

Commands = Any  # argparse keeps the type of its sub-parsers' collection private


def add_all(commands: Commands) -> None:
    """Add every command to the parser."""
    _add_demo(commands)
    _add_check(commands)
    _add_migrate(commands)
    _add_copy(commands)
    _add_jobs(commands)
    _add_cleanup(commands)
    _add_receive(commands)
    stream_commands.add_all(commands)


def _add_migrate(commands: Commands) -> None:
    parser = _command(
        commands,
        "migrate",
        "move a running guest with its disks",
        "SOURCE DEST (--launch CMD | --target-qmp SOCK | --pause-only) [options]",
        """
  Move a guest to a QEMU that we start in /new (it needs the same devices, with the images in /new):
    qemu-blkmig migrate qmp:/run/vm.qmp local:/new --launch \\
        'qemu-system-x86_64 -m 4G ... -qmp unix:/run/new.qmp,server=on,wait=off'
  To one that waits already (-incoming defer), with 100 MiB/s at most and half a second of pause:
    qemu-blkmig migrate qmp:/run/vm.qmp local:/new --target-qmp /run/new.qmp --bandwidth 100 --downtime 500
  Look first, touching nothing: qemu-blkmig check, with the same SOURCE, DEST and destination QEMU.
""",
    )
    _add_ends(parser, images=False)
    group = _add_target(parser)
    group.add_argument(
        "--pause-only",
        action="store_true",
        help="no destination QEMU: move the disks only, leave the guest paused here",
    )
    parser.add_argument(
        "--source-after",
        choices=["quit", "keep"],
        default="quit",
        help="what becomes of the source QEMU after a success (default: quit)",
    )
    _add_selection(parser)
    convergence = _add_convergence(parser)
    convergence.add_argument(
        "--on-stall",
        choices=[choice.value for choice in OnStall],
        default="abort",
        help="if after --max-rounds the pause would still be longer than --downtime: give up, the guest stays (abort, "
        "the default); pause it for as long as it takes (pause); go on trying (wait)",
    )
    _add_transfer(parser)
    _add_output(parser)
    parser.set_defaults(run=_migrate)


def _migrate(arguments: argparse.Namespace) -> int:
    options = MigrateOptions(
        source=_guest(arguments.source),
        target=_target(arguments),
        selection=_selection(arguments),
        transfer=_transfer(arguments),
        downtime=arguments.downtime / 1000,
        max_rounds=arguments.max_rounds,
        on_stall=OnStall(arguments.on_stall),
        pause_only=arguments.pause_only,
        keep_source=arguments.source_after == "keep",
        verify=arguments.verify == "full",
    )
    with progress(arguments.progress) as reporter:
        result = asyncio.run(migrate(options, reporter, Interrupts(reporter.note), RealClock()))
    return _print(result, arguments.output, show.result)


def _add_copy(commands: Commands) -> None:
    parser = _command(
        commands,
        "copy",
        "copy a running guest's disks, or an image file; the guest stays",
        "SOURCE DEST [options]",
        """
  A consistent copy of a running guest's disks; with its guest agent the file systems are frozen for a moment:
    qemu-blkmig copy qmp:/run/vm.qmp local:/backup --agent /run/vm.agent
  An image file that no guest uses:
    qemu-blkmig copy image:/images/vm.qcow2 local:/backup
""",
    )
    _add_ends(parser, images=True)
    parser.add_argument(
        "--agent", metavar="SOCK", help="the guest agent's unix socket: file systems are frozen for the copy"
    )
    parser.add_argument("--source-format", metavar="FMT", help="format of an image: source (default: as recognized)")
    _add_selection(parser)
    convergence = _add_convergence(parser)
    convergence.add_argument("--freeze-limit", type=float, default=10.0, metavar="SECONDS",
                             help="longest time that the guest may be frozen or paused, whatever --downtime says "
                             "(default: 10)")  # fmt: skip
    _add_transfer(parser)
    _add_output(parser)
    parser.set_defaults(run=_copy)


def _copy(arguments: argparse.Namespace) -> int:
    kind, place = _source(arguments.source)
    options = CopyOptions(
        target=Target(_place(arguments)),
        source=place if kind == "qmp" else None,
        image=place if kind == "image" else None,
        image_format=arguments.source_format,
        agent=arguments.agent,
        selection=_selection(arguments),
        transfer=_transfer(arguments),
        downtime=arguments.downtime / 1000,
        max_rounds=arguments.max_rounds,
        freeze_limit=arguments.freeze_limit,
        verify=arguments.verify == "full",
    )
    with progress(arguments.progress) as reporter:
        result = asyncio.run(copy(options, reporter, Interrupts(reporter.note), RealClock()))
    return _print(result, arguments.output, show.result)


def _add_check(commands: Commands) -> None:
    parser = _command(
        commands,
        "check",
        "tell everything that would fail, before anything is touched",
        "SOURCE DEST [--launch CMD | --target-qmp SOCK] [options]",
        """
  qemu-blkmig check qmp:/run/vm.qmp local:/new --launch 'qemu-system-x86_64 -m 4G ...'
  The exit code is 0 if a migration would start, 3 if not. The --launch command is not run.
""",
    )
    _add_ends(parser, images=False)
    _add_target(parser)
    _add_selection(parser)
    _add_form(parser)
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    if arguments.launch is not None and arguments.target_qmp is not None:
        raise UsageError("name the destination's QEMU in one way only: --target-qmp SOCK or --launch CMD")
    outcome = asyncio.run(check(_guest(arguments.source), _target(arguments), _selection(arguments)))
    _print(outcome, arguments.output, show.checked)
    return 0 if outcome.ready else 3


def _add_demo(commands: Commands) -> None:
    parser = _command(commands, "demo", "watch a real guest move, and see proof that nothing is lost", "[options]")
    parser.add_argument("--disk-size", type=_argument(parse_size), default=parse_size("512M"), metavar="SIZE",
                        help="of the guest's disk (default: 512M)")  # fmt: skip
    parser.add_argument("--writer", choices=["idle", "random", "hot", "sequential"], default="random",
                        help="how the guest writes: now and then (idle), all over its disk (random, the default), "
                        "mostly in one place (hot), in order (sequential)")  # fmt: skip
    parser.add_argument(
        "--format", choices=["raw", "qcow2"], default="raw", help="format of the guest's disk (default: raw)"
    )
    parser.add_argument("--shared-base", action="store_true", help="a qcow2 overlay on a base that both sides have")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work in DIR, new or empty, and leave everything there"
    )
    _add_output(parser)
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    options = DemoOptions(
        disk_size=arguments.disk_size,
        writer=arguments.writer,
        format=arguments.format,
        shared_base=arguments.shared_base,
        keep=arguments.keep,
    )
    with progress(arguments.progress) as reporter:
        outcome = asyncio.run(demo(options, reporter, RealClock()))
    _print(outcome, arguments.output, show.demo)
    return 0 if outcome.proven else 5


def _add_jobs(commands: Commands) -> None:
    parser = _command(commands, "jobs", "list the jobs that run, or were left behind", "[options]")
    _add_form(parser)
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
    return _print(outcome, arguments.output, show.jobs)


def _add_cleanup(commands: Commands) -> None:
    parser = _command(
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
    _add_form(parser)
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
    return _print(show.Cleaned(name, settlement.owner.value, settlement.facts), arguments.output, show.cleaned)


def _add_receive(commands: Commands) -> None:
    parser = _command(
        commands, "receive", "the agent beside the destination's storage (the other commands start it)", ""
    )
    parser.set_defaults(run=_receive)


def _receive(_: argparse.Namespace) -> int:
    for descriptor in (0, 1):
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            raise UsageError(
                "receive speaks to a program, over pipes on its stdin and stdout",
                advice="there is no need to start it: migrate and copy do",
            )
    agent.main()


def _command(commands: Commands, name: str, what: str, usage: str, examples: str = "") -> argparse.ArgumentParser:
    """A command's parser; `what` is its help, `usage` what stands behind its name."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        usage=f"%(prog)s {usage}",
        epilog=f"examples:{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="show causes and what is done in detail"
    )
    return parser


def _add_ends(parser: argparse.ArgumentParser, *, images: bool) -> None:
    other = "; or image:/path of an image file that no guest uses" if images else ""
    parser.add_argument("source", metavar="SOURCE", help=f"qmp:/path/to.sock, the running guest's QMP socket{other}")
    parser.add_argument(
        "destination",
        metavar="DEST",
        help=f"directory for the images, {FORMS}; they get the names, formats and sizes of the source's. "
        "One that is there must have the same size; it is overwritten",
    )
    parser.add_argument(
        "--remote-command",
        metavar="CMD",
        default=REMOTE_COMMAND,
        help=f"how qemu-blkmig is called on the host of an ssh:// destination (default: {REMOTE_COMMAND})",
    )


def _add_target(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("destination QEMU (one of)")
    group.add_argument(
        "--launch",
        metavar="CMD",
        help="start it by this shell command, run in DEST, with the same devices as the source's and the images in "
        "DEST; we append -S -incoming defer -qmp ...",
    )
    group.add_argument(
        "--target-qmp", metavar="SOCK", help="the QMP socket of one that waits already, with -incoming defer"
    )
    return group


def _add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which disks, and what the destination has already")
    group.add_argument(
        "--migrate-disks",
        metavar="LIST",
        help="only these disks, by drive id, device id or node name, such as vda,vdb (default: all writable ones)",
    )
    group.add_argument(
        "--shared-base", action="store_true", help="the destination has the backing files: send the overlays only"
    )
    group.add_argument(
        "--target-is-zero", action="store_true", help="existing destination images read as zeroes: do not write any"
    )
    group.add_argument("--allow-plaintext", action="store_true", help="an encrypted disk may be written in plain text")


def _add_transfer(parser: argparse.ArgumentParser) -> None:
    usual = Transfer()
    group = parser.add_argument_group("tuning (sizes take k, M, G, T: powers of 1024)")
    group.add_argument(
        "--bandwidth",
        type=_argument(parse_rate),
        metavar="RATE",
        help="most MiB/s, such as 100; or bytes a second with a suffix, such as 512k (default: no limit)",
    )
    group.add_argument("--connections", type=_argument(_count), default=usual.connections, metavar="N",
                       help=f"NBD connections for each disk, 1 to 64 (default: {usual.connections})")  # fmt: skip
    group.add_argument("--requests", type=_argument(_count), default=usual.requests, metavar="N",
                       help=f"requests in flight on a connection, 1 to 64 (default: {usual.requests})")  # fmt: skip
    group.add_argument("--request-size", type=_argument(parse_size), default=usual.request_size, metavar="SIZE",
                       help="largest request, 64k to 32M (default: 4M)")  # fmt: skip
    group.add_argument("--chunk-size", type=_argument(parse_size), default=usual.chunk_size, metavar="SIZE",
                       help="unit of the first pass, 64k to 32M (default: 1M)")  # fmt: skip
    group.add_argument("--granularity", type=_argument(parse_size), default=usual.granularity, metavar="SIZE",
                       help="unit in which QEMU notes what the guest writes, 512 to 2G (default: 64k)")  # fmt: skip


def _add_convergence(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("the guest's pause")
    group.add_argument("--downtime", type=_argument(_count), default=300, metavar="MS",
                       help="longest pause of the guest to aim at, in milliseconds (default: 300)")  # fmt: skip
    group.add_argument("--max-rounds", type=_argument(_count), default=30, metavar="N",
                       help="how often what the guest has written meanwhile is copied, before it is a stall "
                       "(default: 30)")  # fmt: skip
    group.add_argument("--verify", choices=["none", "full"], default="none",
                       help="full: compare both sides completely while the guest is paused: certain, but the pause is "
                       "as long as reading both sides takes (default: none)")  # fmt: skip
    return group


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--progress", choices=["auto", "bar", "json", "none"], default="auto",
                        help="on stderr: a bar, one JSON object a line, or nothing (default: auto, a bar on a "
                        "terminal, else a line for each phase)")  # fmt: skip
    _add_form(parser)


def _add_form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", choices=["text", "json"], default="text",
                        help="the result on stdout, as text (default) or one JSON object; with json an error is one, "
                        'too: {"error": {"exit_code", "kind", "what", "disk", "state", "advice"}}')  # fmt: skip


def _count(text: str) -> int:
    if not text.strip().lstrip("-").isdecimal():
        raise UsageError(f"not a whole number: {text!r}", advice="write digits only, such as 300")
    return int(text)


def _argument(parse: Callable[[str], int]) -> Callable[[str], int]:
    """`parse` as argparse wants it, which then names the option in its message."""

    def parsed(text: str) -> int:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(f"{error}: {error.advice}") from error

    return parsed


def _source(text: str) -> tuple[str, str]:
    kind, _, place = text.partition(":")
    if kind not in ("qmp", "image") or not place:
        raise UsageError(
            f"not a source: {text!r}", advice="write qmp:/path/to.sock (copy: or image:/path); there are no others yet"
        )
    return kind, place


def _guest(text: str) -> str:
    kind, place = _source(text)
    if kind != "qmp":
        raise UsageError(f"{text!r} is no running guest", advice="write qmp:/path/to.sock; `copy` takes image:/path")
    return place


def _place(arguments: argparse.Namespace) -> Place:
    return parse_place(arguments.destination, arguments.remote_command)


def _target(arguments: argparse.Namespace) -> Target:
    return Target(_place(arguments), arguments.target_qmp, arguments.launch)


def _selection(arguments: argparse.Namespace) -> Selection:
    names = arguments.migrate_disks
    return Selection(
        disks=tuple(name.strip() for name in names.split(",")) if names is not None else None,
        shared_base=arguments.shared_base,
        target_is_zero=arguments.target_is_zero,
        allow_plaintext=arguments.allow_plaintext,
    )


def _transfer(arguments: argparse.Namespace) -> Transfer:
    return Transfer(
        chunk_size=arguments.chunk_size,
        granularity=arguments.granularity,
        connections=arguments.connections,
        requests=arguments.requests,
        request_size=arguments.request_size,
        bandwidth=arguments.bandwidth,
    )


def _print(outcome: msgspec.Struct, form: str, render: Any) -> int:
    text = msgspec.json.format(msgspec.json.encode(outcome)).decode() if form == "json" else render(outcome)
    try:
        print(text, flush=True)
    except OSError as error:
        # Python would try to flush it once more when it exits, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise BlkmigError(
            f"the result could not be written to stdout: {error.strerror}", state="what was asked for is done"
        ) from error
    return 0
