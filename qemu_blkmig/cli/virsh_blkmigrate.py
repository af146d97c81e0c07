"""`virsh-blkmigrate`: a domain moves with its disks, in the words of `virsh migrate`.

What it cannot honour it refuses, with the reason: an option is never ignored.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qemu_blkmig import __version__
from qemu_blkmig.cli import options, resume_command, show, virsh_options
from qemu_blkmig.cli.form import Parser
from qemu_blkmig.cli.libvirt_ends import agent_place, disk_paths
from qemu_blkmig.cli.main import EXIT_CODES, run
from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.moment import AT_ONCE
from qemu_blkmig.job.options import Afterwards, OnStall

_CHANGED = ("bandwidth", "downtime", "max_rounds", "on_stall", "switchover", "xml", "persistent_xml")
"""What may be other than it was when a job is resumed; None: as it was."""
_RUNNING = (
    "suspend", "timeout", "auto_converge", "tls", "migrateuri", "migrateuri_option", "listen_address",
    "abort_on_error", "graphicsuri", "switchover", "retry", "data", "adaptive",
)  # fmt: skip
"""What is of no use to a domain that does not run."""
_OF_THIS_RUN = (
    "resume",
    "compare",
    "retry",
    "progress",
    "output",
    "verbose",
    "debug",
    "metrics_file",
    "metrics_listen",
)
_PLACED = ("domain", "desturi", "migrateuri")
"""What words without an option are, in this order."""


class _Parser(Parser):
    """As with virsh, options may stand between DOMAIN and DESTURI."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse`. Raises `UsageError`."""
        words = sys.argv[1:] if args is None else list(args)
        if any(word.partition("=")[0] == "--resume" for word in words):
            self.set_defaults(**dict.fromkeys(_CHANGED))
        # Whatever is behind -- is no option, as with virsh; argparse forgets that on its second way through the words.
        end = words.index("--") if "--" in words else len(words)
        parsed, behind = self.parse_intermixed_args(words[:end], namespace), words[end + 1 :]
        for name in _PLACED:
            if behind and getattr(parsed, name) is None:
                setattr(parsed, name, behind.pop(0))
        if behind:
            self.error(f"unrecognized arguments: {' '.join(behind)}")
        return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, as `qemu-blkmig` does."""
    return run(parser, sys.argv[1:] if arguments is None else arguments)


def parser() -> argparse.ArgumentParser:
    """The whole command line; manuals and completion are made from it."""
    root = _Parser(
        prog="virsh-blkmigrate",
        usage="%(prog)s [-c URI] DOMAIN DESTURI [MIGRATEURI] [options]\n       %(prog)s --resume JOB [options]",
        description="Moves a domain of libvirt's with its local disks to another host, as `virsh migrate` does. Its "
        "disks are copied by qemu-blkmig, and proven equal before the guest runs there.",
        epilog=f"""\
examples:
  virsh-blkmigrate web1 qemu+ssh://hostb/system --persistent --undefinesource --verbose
  Look first, touching nothing; the domain's XML for the destination is printed:
    virsh-blkmigrate web1 qemu+ssh://hostb/system --dry-run
  The destination has the base image; the overlay goes to another place there:
    virsh-blkmigrate web1 qemu+ssh://hostb/system --copy-storage-inc --disk vda=/srv/vm/web1.qcow2

`qemu-blkmig jobs`, `status`, `set`, `switchover`, `cancel` and `cleanup` work with its jobs.

{EXIT_CODES}""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"virsh-blkmigrate {__version__}")
    virsh_options.add_all(root)
    root.set_defaults(run=_run, command=root.prog)
    return root


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.verbose and arguments.progress == "auto" and not sys.stderr.isatty():
        arguments.progress = "none"
    if arguments.resume is not None:
        _check_resumed(arguments)
        return resume_command.resume_job(
            arguments.resume,
            arguments,
            xml=_contents("--xml", arguments.xml),
            persistent_xml=_contents("--persistent-xml", arguments.persistent_xml),
        )
    wanted = wish(arguments)
    if arguments.dry_run:
        return _look(wanted, arguments)
    return resume_command.carry(wanted, arguments, wanted.target_uri, f"libvirt:{wanted.domain}")


def _check_resumed(arguments: argparse.Namespace) -> None:
    """What a job that goes on cannot be told anew is an error."""
    known = parser()
    for action in known._actions:
        free = action.dest in (*_CHANGED, *_OF_THIS_RUN) or action.dest not in arguments
        if not free and getattr(arguments, action.dest) != known.get_default(action.dest):
            name = action.option_strings[0] if action.option_strings else action.metavar
            raise UsageError(f"{name} cannot be given with --resume: the job goes on as it was asked for at first")


def _look(wanted: ManagedOptions, arguments: argparse.Namespace) -> int:
    from qemu_blkmig.job.managed_check import check_managed

    outcome = asyncio.run(check_managed(wanted))
    options.print_outcome(outcome, arguments.output, show.checked_domain)
    return 0 if outcome.ready else 3


def wish(arguments: argparse.Namespace) -> ManagedOptions:
    """What the command line asks for. Raises `UsageError`, with the reason, for what cannot be honoured."""
    domain, target_uri, migrate_uri = _ends(arguments)
    if domain is None or target_uri is None:
        raise UsageError("name a domain and the destination's libvirt", advice="see virsh-blkmigrate --help")
    # To virsh, and libvirt, 0 is no limit.
    arguments.bandwidth = arguments.bandwidth or None
    arguments.timeout = arguments.timeout or None
    _check_together(arguments)
    return ManagedOptions(
        domain=domain,
        source_uri=arguments.connect,
        target_uri=target_uri,
        place=agent_place(target_uri, arguments.agent, arguments.remote_command),
        on_stall=OnStall(arguments.on_stall),
        switchover=arguments.switchover,
        put_off=arguments.put_off == "yes",
        source_images=Afterwards(arguments.source_images),
        live=arguments.live,
        offline=arguments.offline,
        peer_to_peer=arguments.p2p,
        persistent=arguments.persistent,
        undefine_source=arguments.undefinesource,
        suspend=arguments.suspend,
        auto_converge=arguments.auto_converge,
        auto_converge_initial=arguments.auto_converge_initial,
        auto_converge_increment=arguments.auto_converge_increment,
        tls=arguments.tls,
        tls_destination=arguments.tls_destination,
        abort_on_error=arguments.abort_on_error,
        unsafe=arguments.unsafe,
        dname=arguments.dname,
        graphics_uri=arguments.graphicsuri,
        xml=_contents("--xml", arguments.xml),
        persistent_xml=_contents("--persistent-xml", arguments.persistent_xml),
        migrate_uri=migrate_uri,
        listen_address=arguments.listen_address,
        timeout=arguments.timeout,
        paths=disk_paths(arguments.disk),
        pool=arguments.target_pool,
        **options.common(arguments),
    )


def _ends(arguments: argparse.Namespace) -> list[str | None]:
    """DOMAIN, DESTURI and MIGRATEURI: as in virsh, words without an option are those of them that no option gives."""
    placed = [word for name in _PLACED if (word := getattr(arguments, name)) is not None]
    given = [getattr(arguments, f"{name}_option") for name in _PLACED]
    ends = [(placed.pop(0) if placed else None) if named is None else str(named) for named in given]
    if placed:
        raise UsageError(f"there is no use for {placed[0]}: DOMAIN, DESTURI and MIGRATEURI are all given without it")
    return ends


def _check_together(arguments: argparse.Namespace) -> None:
    """Options that contradict each other, and those that are of no use without another one."""
    if arguments.copy_storage_all and arguments.shared_base:
        raise UsageError("--copy-storage-all and --copy-storage-inc contradict each other")
    for option, given in (("--base", arguments.base is not None), ("--flatten no", arguments.flatten == "no")):
        if given and not arguments.shared_base:
            raise UsageError(f"{option} is of no use without --copy-storage-inc")
    for option in _RUNNING if arguments.offline else ():
        if getattr(arguments, option) not in (None, False, 0, AT_ONCE):
            raise UsageError(f"--{option.removesuffix('_option').replace('_', '-')} is for a domain that runs")
    if arguments.timeout is not None and arguments.timeout < 1:
        raise UsageError("--timeout must be at least 1 second")
    for option, needed in (
        ("timeout_suspend", "timeout"),
        ("auto_converge_initial", "auto_converge"),
        ("auto_converge_increment", "auto_converge"),
        ("tls_destination", "tls"),
    ):
        value = getattr(arguments, option)
        if value is not None and value is not False and not getattr(arguments, needed):
            spelled = [f"--{each.replace('_', '-')}" for each in (option, needed)]
            raise UsageError(f"{spelled[0]} is of no use without {spelled[1]}")


def _contents(option: str, path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


if __name__ == "__main__":
    sys.exit(main())
