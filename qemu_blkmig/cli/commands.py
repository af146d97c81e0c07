"""Each command: its options, the one function it calls, how its result is shown."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from qemu_blkmig.cli import show
from qemu_blkmig.demo.run import DemoOptions, demo
from qemu_blkmig.destination import agent
from qemu_blkmig.errors import BlkmigError, UsageError
from qemu_blkmig.job.check import check
from qemu_blkmig.job.copy import copy
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.migrate import migrate
from qemu_blkmig.job.options import CopyOptions, MigrateOptions, OnStall, Selection, Target, Transfer
from qemu_blkmig.job.record import Job, left_behind
from qemu_blkmig.job.settle import settle
from qemu_blkmig.observe.progress import progress
from qemu_blkmig.units import parse_rate, parse_size

Commands = Any  # argparse keeps the type of its sub-parsers' collection private


class RealClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


def add_all(commands: Commands) -> None:
    """Add every command to the parser."""
    _add_demo(commands)
    _add_check(commands)
    _add_migrate(commands)
    _add_copy(commands)
    _add_jobs(commands)
    _add_cleanup(commands)
    _add_receive(commands)


def _add_migrate(commands: Commands) -> None:
    parser = commands.add_parser("migrate", help="move a running guest with its disks")
    _add_ends(parser)
    _add_target(parser)
    parser.add_argument(
        "--pause-only", action="store_true", help="disks only: complete with the guest paused, leave it paused"
    )
    parser.add_argument(
        "--source-after", choices=["quit", "keep"], default="quit", help="what becomes of the source QEMU"
    )
    parser.add_argument("--on-stall", choices=[choice.value for choice in OnStall], default="abort",
                        help="when the last round does not come to fit --downtime (default: abort)")  # fmt: skip
    _add_selection(parser)
    _add_transfer(parser)
    _add_convergence(parser)
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
    parser = commands.add_parser("copy", help="copy a running guest's disks, or an image file; the guest stays")
    _add_ends(parser)
    parser.add_argument(
        "--agent", metavar="SOCK", help="the guest agent's unix socket: file systems are frozen for the copy"
    )
    parser.add_argument("--source-format", metavar="FMT", help="format of an image: source (default: as recognized)")
    parser.add_argument("--freeze-limit", type=float, default=10.0, metavar="SECONDS",
                        help="longest time that the guest may be frozen or paused (default 10)")  # fmt: skip
    _add_selection(parser)
    _add_transfer(parser)
    _add_convergence(parser)
    _add_output(parser)
    parser.set_defaults(run=_copy)


def _copy(arguments: argparse.Namespace) -> int:
    kind, place = _source(arguments.source)
    options = CopyOptions(
        target=Target(_directory(arguments.destination)),
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
    parser = commands.add_parser("check", help="tell everything that would fail, before anything is touched")
    _add_ends(parser)
    _add_target(parser)
    _add_selection(parser)
    parser.add_argument("--output", choices=["text", "json"], default="text")
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    outcome = asyncio.run(check(_guest(arguments.source), _target(arguments), _selection(arguments)))
    _print(outcome, arguments.output, show.checked)
    return 0 if outcome.ready else 3


def _add_demo(commands: Commands) -> None:
    parser = commands.add_parser("demo", help="watch a real guest move, and see proof that nothing is lost")
    parser.add_argument("--disk-size", type=_argument(parse_size), default=parse_size("512M"), metavar="SIZE")
    parser.add_argument("--writer", choices=["idle", "random", "hot", "sequential"], default="random")
    parser.add_argument("--format", choices=["raw", "qcow2"], default="raw")
    parser.add_argument("--shared-base", action="store_true", help="a qcow2 overlay on a base that both sides have")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR and leave everything there")
    parser.add_argument("--progress", choices=["auto", "bar", "json", "none"], default="auto")
    parser.add_argument("--output", choices=["text", "json"], default="text")
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
    parser = commands.add_parser("jobs", help="list the jobs that run, or were left behind")
    parser.set_defaults(run=_jobs)


def _jobs(_: argparse.Namespace) -> int:
    for record in left_behind():
        print(f"{record.job}  source qmp:{record.source_qmp}  owner of the guest: {record.owner.value}")
    return 0


def _add_cleanup(commands: Commands) -> None:
    parser = commands.add_parser("cleanup", help="bring a job that was left behind to rest, and remove what it made")
    parser.add_argument("job", metavar="JOB")
    parser.set_defaults(run=_cleanup)


def _cleanup(arguments: argparse.Namespace) -> int:
    job = Job.load(arguments.job)
    settlement = asyncio.run(settle(job))
    print("\n".join(settlement.facts))
    if settlement.decided:
        job.remove()
        return 0
    job.release()
    return 4


def _add_receive(commands: Commands) -> None:
    parser = commands.add_parser("receive", help="the agent beside the destination's storage (started by the others)")
    parser.set_defaults(run=lambda _: agent.main())


def _add_ends(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="qmp:/path/to.sock (copy: or image:/path)")
    parser.add_argument("destination", metavar="DEST", help="local:/directory for the images")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target-qmp", metavar="SOCK", help="QMP socket of a destination QEMU waiting with -incoming defer"
    )
    parser.add_argument(
        "--launch",
        metavar="CMD",
        help="command of the destination QEMU, run in DEST; we append -S -incoming defer -qmp ...",
    )


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--migrate-disks", metavar="LIST", help="only these disks, by drive id, device id or node name")
    parser.add_argument(
        "--shared-base", action="store_true", help="the destination has the backing files: send the overlays only"
    )
    parser.add_argument("--target-is-zero", action="store_true", help="existing destination images read as zeroes")
    parser.add_argument("--allow-plaintext", action="store_true", help="an encrypted disk may be written in plain text")


def _add_transfer(parser: argparse.ArgumentParser) -> None:
    usual = Transfer()
    group = parser.add_argument_group("tuning (sizes take k, M, G, T)")
    group.add_argument(
        "--bandwidth", type=_argument(parse_rate), metavar="RATE", help="MiB/s, or bytes a second with a suffix"
    )
    group.add_argument("--connections", type=int, default=usual.connections, metavar="N")
    group.add_argument("--requests", type=int, default=usual.requests, metavar="N", help="in flight on a connection")
    group.add_argument("--request-size", type=_argument(parse_size), default=usual.request_size, metavar="SIZE")
    group.add_argument("--chunk-size", type=_argument(parse_size), default=usual.chunk_size, metavar="SIZE")
    group.add_argument("--granularity", type=_argument(parse_size), default=usual.granularity, metavar="SIZE",
                       help="of the dirty bitmaps (default 64k)")  # fmt: skip


def _add_convergence(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--downtime", type=int, default=300, metavar="MS", help="longest pause of the guest (default 300)"
    )
    parser.add_argument(
        "--max-rounds", type=int, default=30, metavar="N", help="dirty rounds before it is a stall (default 30)"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", choices=["none", "full"], default="none",
                        help="full: compare both sides completely while the guest is paused")  # fmt: skip
    parser.add_argument("--progress", choices=["auto", "bar", "json", "none"], default="auto")
    parser.add_argument("--output", choices=["text", "json"], default="text")


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
        raise UsageError(f"not a source: {text!r}", advice="write qmp:/path/to.sock, or for copy also image:/path")
    return kind, place


def _guest(text: str) -> str:
    kind, place = _source(text)
    if kind != "qmp":
        raise UsageError(f"{text!r} is no running guest", advice="write qmp:/path/to.sock; `copy` takes image:/path")
    return place


def _directory(text: str) -> Path:
    kind, _, place = text.partition(":")
    if kind != "local" or not place:
        raise UsageError(f"not a destination: {text!r}", advice="write local:/directory")
    return Path(place).absolute()


def _target(arguments: argparse.Namespace) -> Target:
    return Target(_directory(arguments.destination), arguments.target_qmp, arguments.launch)


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
    except BrokenPipeError as error:
        raise BlkmigError("the result could not be written to stdout, but it is done") from error
    return 0
