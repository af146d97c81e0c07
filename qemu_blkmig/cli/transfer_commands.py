"""The commands that carry disks from a guest, or an image, to another place: check, migrate, copy.

What a command runs is loaded only then: to load all of it takes as long as to copy some hundred MiB.
"""

from __future__ import annotations

import argparse
import os

from qemu_blkmig.cli import domain_source, options, resume_command, show
from qemu_blkmig.cli.form import Commands, command
from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.options import Afterwards, CopyOptions, MigrateOptions, OnStall, Target


def add_all(commands: Commands) -> None:
    """Add the commands to the parser."""
    _add_check(commands)
    _add_migrate(commands)
    _add_copy(commands)


def _add_migrate(commands: Commands) -> None:
    parser = command(
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
    return resume_command.carry(wanted, arguments, wanted.target.place)


def _add_copy(commands: Commands) -> None:
    parser = command(
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
    options.add_source_format(parser)
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
    kind, place = options.source(arguments.source)
    if kind == "image" and arguments.adaptive:
        raise UsageError("--adaptive goes by how quick a guest's disks are, and image: has no guest")
    wanted = CopyOptions(
        target=Target(options.place(arguments)),
        source=place if kind == "qmp" else None,
        image=os.path.abspath(place) if kind == "image" else None,  # noqa: PTH100 - links stay
        image_format=arguments.source_format,
        agent=arguments.agent,
        freeze_limit=arguments.freeze_limit,
        **options.common(arguments),
    )
    return resume_command.carry(wanted, arguments, wanted.target.place)


def _add_check(commands: Commands) -> None:
    parser = command(
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
    import asyncio

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
