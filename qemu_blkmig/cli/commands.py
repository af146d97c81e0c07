"""Each command: its options, the one function it calls, how its result is shown.

What a command runs is loaded only then: to load all of it takes as long as to copy some hundred MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import stat
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu_blkmig.cli import (
    domain_source,
    hook_commands,
    job_commands,
    options,
    report_command,
    resume_command,
    show,
    stream_commands,
)
from qemu_blkmig.cli.clock import RealClock
from qemu_blkmig.cli.options import Commands
from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.options import CopyOptions, MigrateOptions, OnStall, Target
from qemu_blkmig.job.source_images import Afterwards
from qemu_blkmig.observe.progress import progress
from qemu_blkmig.units import parse_size

if TYPE_CHECKING:
    from qemu_blkmig.job.layers import Work


def add_all(commands: Commands) -> None:
    """Add every command to the parser."""
    _add_demo(commands)
    _add_check(commands)
    _add_migrate(commands)
    _add_copy(commands)
    resume_command.add(commands)
    job_commands.add_all(commands)
    report_command.add(commands)
    _add_receive(commands)
    stream_commands.add_all(commands)
    hook_commands.add_all(commands)


def _add_migrate(commands: Commands) -> None:
    parser = options.command(
        commands,
        "migrate",
        "move a running guest with its disks",
        "SOURCE DEST [--launch CMD | --target-qmp SOCK | --pause-only] [options]",
        """
  Move a guest to a QEMU that we start in /new (it needs the same devices, with the images in /new):
    qemu-blkmig migrate qmp:/run/vm.qmp local:/new --launch \\
        'qemu-system-x86_64 -m 4G ... -qmp unix:/run/new.qmp,server=on,wait=off'
  To one that waits already (-incoming defer), with 100 MiB/s at most and half a second of pause:
    qemu-blkmig migrate qmp:/run/vm.qmp local:/new --target-qmp /run/new.qmp --bandwidth 100 --downtime 500
  A domain of libvirt's, its images to /new on another host (virsh-blkmigrate has more to choose):
    qemu-blkmig migrate libvirt:web1 ssh://hostb/new
  Look first, touching nothing: qemu-blkmig check, with the same SOURCE, DEST and destination QEMU.
""",
    )
    options.add_ends(parser, domains=True)
    group = options.add_target(parser)
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
    options.add_source_images(parser)
    options.add_selection(parser)
    convergence = options.add_convergence(parser)
    options.add_switchover(convergence)
    options.add_transfer(parser)
    options.add_data_path(parser)
    resume_command.add_retry(parser)
    options.add_output(parser)
    options.add_metrics(parser)
    parser.set_defaults(run=_migrate)


def _migrate(arguments: argparse.Namespace) -> int:
    from qemu_blkmig.job.layers import bring_layers
    from qemu_blkmig.job.migrate import migrate

    if domain_source.is_domain(arguments.source):
        return domain_source.migrate_domain(arguments)
    wanted = MigrateOptions(
        source=options.guest(arguments.source),
        target=options.target(arguments),
        on_stall=OnStall(arguments.on_stall),
        pause_only=arguments.pause_only,
        switchover=arguments.switchover,
        put_off=arguments.put_off == "yes",
        keep_source=arguments.source_after == "keep",
        source_images=Afterwards(arguments.source_images),
        **options.common(arguments),
    )

    async def layers_first(*told: Any) -> Work:
        return partial(migrate, await bring_layers(wanted, *told))

    first = None if wanted.selection.flatten else layers_first
    return resume_command.run(partial(migrate, wanted), arguments, arguments.source, wanted.target.place, first)


def _add_copy(commands: Commands) -> None:
    parser = options.command(
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
    options.add_ends(parser, domains=False)
    parser.add_argument(
        "--agent", metavar="SOCK", help="the guest agent's unix socket: file systems are frozen for the copy"
    )
    parser.add_argument("--source-format", metavar="FMT", help="format of an image: source (default: as recognized)")
    options.add_selection(parser)
    convergence = options.add_convergence(parser)
    convergence.add_argument("--freeze-limit", type=float, default=10.0, metavar="SECONDS",
                             help="longest time that the guest may be frozen or paused, whatever --downtime says "
                             "(default: 10)")  # fmt: skip
    options.add_transfer(parser)
    options.add_data_path(parser)
    resume_command.add_retry(parser)
    options.add_output(parser)
    options.add_metrics(parser)
    parser.set_defaults(run=_copy)


def _copy(arguments: argparse.Namespace) -> int:
    from qemu_blkmig.job.copy import copy
    from qemu_blkmig.job.layers import bring_layers

    kind, place = options.source(arguments.source)
    wanted = CopyOptions(
        target=Target(options.place(arguments)),
        source=place if kind == "qmp" else None,
        image=os.path.abspath(place) if kind == "image" else None,  # noqa: PTH100 - links stay
        image_format=arguments.source_format,
        agent=arguments.agent,
        freeze_limit=arguments.freeze_limit,
        **options.common(arguments),
    )

    async def layers_first(*told: Any) -> Work:
        return partial(copy, await bring_layers(wanted, *told))

    first = None if wanted.selection.flatten else layers_first
    return resume_command.run(partial(copy, wanted), arguments, arguments.source, wanted.target.place, first)


def _add_check(commands: Commands) -> None:
    parser = options.command(
        commands,
        "check",
        "tell everything that would fail, before anything is touched",
        "SOURCE DEST [--launch CMD | --target-qmp SOCK] [options]",
        """
  qemu-blkmig check qmp:/run/vm.qmp local:/new --launch 'qemu-system-x86_64 -m 4G ...'
  The exit code is 0 if a migration would start, 3 if not. The --launch command is not run.
""",
    )
    options.add_ends(parser, domains=True)
    options.add_target(parser)
    options.add_selection(parser)
    options.add_form(parser)
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from qemu_blkmig.job.check import check

    if domain_source.is_domain(arguments.source):
        return domain_source.check_domain(arguments)
    if arguments.launch is not None and arguments.target_qmp is not None:
        raise UsageError("name the destination's QEMU in one way only: --target-qmp SOCK or --launch CMD")
    outcome = asyncio.run(
        check(options.guest(arguments.source), options.target(arguments), options.selection(arguments))
    )
    options.print_outcome(outcome, arguments.output, show.checked)
    return 0 if outcome.ready else 3


def _add_demo(commands: Commands) -> None:
    parser = options.command(
        commands, "demo", "watch a real guest move, and see proof that nothing is lost", "[options]"
    )
    parser.add_argument("--disk-size", type=options.argument(parse_size), default=parse_size("512M"), metavar="SIZE",
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


def _add_receive(commands: Commands) -> None:
    parser = options.command(
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
