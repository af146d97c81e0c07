"""`virsh-blkmigrate`: a domain moves with its disks, in the words of `virsh migrate`.

What it cannot honour it refuses, with the reason: an option is never ignored.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qemu_blkmig import __version__
from qemu_blkmig.cli import options, resume_command, show
from qemu_blkmig.cli.main import EXIT_CODES, Parser, run
from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import OnStall
from qemu_blkmig.job.place import REMOTE_COMMAND, Local, Place, Ssh, parse_place
from qemu_blkmig.job.source_images import Afterwards

NOT_NEEDED = {
    "--unsafe": "there is no need for it: the disks are copied, whatever their cache mode is",
    "--change-protection": "there is no need for it: the domain is protected anyway",
    "--direct": "QEMU's driver knows no direct migration, with virsh neither",
}
REFUSED = {
    "--postcopy": "the guest would run there before its disks are proven equal, and could not be given back",
    "--postcopy-after-precopy": "see --postcopy",
    "--postcopy-resume": "see --postcopy",
    "--timeout-postcopy": "see --postcopy; --timeout-suspend is what --timeout does",
    "--tunnelled": "libvirt's own connection would carry the stream past our gate; ours, through ssh, is as safe",
    "--copy-storage-synchronous-writes": "the disks are copied by rounds; a guest that writes faster than that is "
    "slowed by --on-stall throttle",
    "--compressed": "compression of RAM is not offered",
    "--rdma-pin-all": "the stream must pass our gate, which speaks TCP and unix sockets",
    "--zerocopy": "the stream must pass our gate",
}
REFUSED_VALUES = {
    "--comp-methods": "see --compressed",
    "--comp-mt-level": "see --compressed",
    "--comp-mt-threads": "see --compressed",
    "--comp-mt-dthreads": "see --compressed",
    "--comp-xbzrle-cache": "see --compressed",
    "--postcopy-bandwidth": "see --postcopy",
    "--disks-port": "the disks go through ssh: no port is opened for them",
    "--disks-uri": "the disks go through ssh: no port is opened for them",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, as `qemu-blkmig` does."""
    return run(parser, sys.argv[1:] if arguments is None else arguments)


def parser() -> argparse.ArgumentParser:
    """The whole command line; manuals and completion are made from it."""
    root = Parser(
        prog="virsh-blkmigrate",
        usage="%(prog)s [-c URI] DOMAIN DESTURI [options]\n       %(prog)s --resume JOB",
        description="Moves a running domain of libvirt's with its local disks to another host, as `virsh migrate` "
        "does. Its disks are copied by qemu-blkmig, and proven equal before the guest runs there.",
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
    )
    root.add_argument("--version", action="version", version=f"virsh-blkmigrate {__version__}")
    root.add_argument("--debug", action="store_true", help="show causes and what is done in detail")
    root.add_argument("-c", "--connect", metavar="URI", help="this host's libvirt (default: libvirt's own)")
    root.add_argument("domain", nargs="?", metavar="DOMAIN", help="name or UUID of a domain that runs here")
    root.add_argument(
        "desturi", nargs="?", metavar="DESTURI", help="the destination's libvirt, such as qemu+ssh://hostb/system"
    )
    _add_as_virsh(root)
    _add_ours(root)
    options.add_selection(root)
    convergence = options.add_convergence(root)
    options.add_switchover(convergence)
    options.add_transfer(root)
    resume_command.add_retry(root)
    options.add_output(root)
    root.set_defaults(run=_run, data=None, tls_creds=None, insecure=False)
    return root


def _add_as_virsh(root: argparse.ArgumentParser) -> None:
    group = root.add_argument_group("as of virsh migrate")
    group.add_argument(
        "--live",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the guest runs while it moves (the default); --no-live: it is paused while its RAM does, its disks being "
        "copied before that",
    )
    flags = {
        "--p2p": "the source's libvirt speaks to the destination's by DESTURI, not this command",
        "--persistent": "the domain is defined there",
        "--undefinesource": "the domain is no longer defined here",
        "--suspend": "the guest is paused there",
        "--auto-converge": "slow the guest's CPUs when its RAM does not converge",
        "--abort-on-error": "an I/O error of the guest while it is migrated ends the migration",
        "--tls": "libvirt's migration of RAM uses TLS (qemu.conf, migrate_tls_x509_cert_dir)",
        "--parallel": "RAM goes by several connections; with --migrateuri",
        "--copy-storage-all": "all of the disks are copied (the default)",
        "--copy-storage-inc": "the destination has the backing files: the overlays are copied, as by --shared-base",
        "--verbose": "show progress also where stderr is no terminal",
        "--timeout-suspend": "what --timeout does",
    }
    for name, told in flags.items():
        group.add_argument(name, action="store_true", help=told)
    values = {
        "--migrateuri": ("URI", "where the destination's QEMU listens for RAM, as this host reaches it, such as "
                         "tcp://hostb:49152 (default: a unix socket, through ssh: no port is opened)"),
        "--listen-address": ("ADDRESS", "which address the destination's QEMU listens on, with --migrateuri"),
        "--dname": ("NAME", "the domain's name there"),
        "--xml": ("FILE", "the domain's XML for the destination, in place of its own"),
        "--persistent-xml": ("FILE", "the same, of the domain that is defined there (--persistent)"),
        "--tls-destination": ("NAME", "the name in the destination's certificate (default: the host of DESTURI)"),
    }  # fmt: skip
    for name, (metavar, told) in values.items():
        group.add_argument(name, metavar=metavar, help=told)
    group.add_argument("--parallel-connections", type=options.argument(options.count), metavar="N",
                       help="of --parallel (default: 2)")  # fmt: skip
    group.add_argument("--timeout", type=options.argument(options.count), metavar="SECONDS",
                       help="when it has taken that long, the guest is paused until it has moved; the first pass over "
                       "the disks is waited for")  # fmt: skip
    for name, why in {**NOT_NEEDED, **REFUSED}.items():
        told = f"accepted: {why}" if name in NOT_NEEDED and name != "--direct" else f"refused: {why}"
        group.add_argument(name, action="store_true", help=told)
    for name, why in REFUSED_VALUES.items():
        group.add_argument(name, metavar="VALUE", help=f"refused: {why}")


def _add_ours(root: argparse.ArgumentParser) -> None:
    group = root.add_argument_group("beyond virsh migrate")
    group.add_argument("--dry-run", action="store_true", help="tell everything that would fail and what would be done, "
                       "with the domain's XML for the destination; nothing is touched")  # fmt: skip
    group.add_argument("--resume", metavar="JOB", help="go on with a migration that was suspended")
    group.add_argument("--disk", action="append", default=[], metavar="TARGET=PATH",
                       help="where the image of a disk is to be there, such as vda=/srv/vm/web1.qcow2; can be given "
                       "several times (default: the path that it has here)")  # fmt: skip
    group.add_argument("--target-pool", metavar="POOL", help="the storage pool there that takes all other images")
    group.add_argument("--agent", metavar="PLACE", help="the host of DESTURI by ssh, such as ssh://root@hostb:2222, "
                       "where DESTURI does not tell (default: as DESTURI has it)")  # fmt: skip
    group.add_argument(
        "--remote-command",
        metavar="CMD",
        default=REMOTE_COMMAND,
        help=f"how qemu-blkmig is called on the destination host (default: {REMOTE_COMMAND})",
    )
    options.add_source_images(root)


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.verbose and arguments.progress == "auto" and not sys.stderr.isatty():
        arguments.progress = "none"
    if arguments.resume is not None:
        return _resume(arguments)
    wanted = wish(arguments)
    if arguments.dry_run:
        return _look(wanted, arguments)
    from qemu_blkmig.job.managed import migrate_managed

    return resume_command.run(lambda *shown: migrate_managed(wanted, *shown), arguments)


def _resume(arguments: argparse.Namespace) -> int:
    from qemu_blkmig.job.resume import Changes, resume

    if arguments.domain is not None:
        raise UsageError("--resume takes all else from the job that it goes on with")
    changes = Changes(compare=arguments.compare)
    return resume_command.run(lambda *shown: resume(arguments.resume, changes, *shown), arguments)


def _look(wanted: ManagedOptions, arguments: argparse.Namespace) -> int:
    import asyncio

    from qemu_blkmig.job.managed_check import check_managed

    outcome = asyncio.run(check_managed(wanted))
    options.print_outcome(outcome, arguments.output, show.checked_domain)
    return 0 if outcome.ready else 3


def wish(arguments: argparse.Namespace) -> ManagedOptions:
    """What the command line asks for. Raises `UsageError`, with the reason, for what cannot be honoured."""
    if arguments.domain is None or arguments.desturi is None:
        raise UsageError("name a domain and the destination's libvirt", advice="see virsh-blkmigrate --help")
    _refuse(arguments)
    if arguments.timeout is None and arguments.timeout_suspend:
        raise UsageError("--timeout-suspend is of no use without --timeout")
    if arguments.timeout is not None and arguments.timeout < 1:
        raise UsageError("--timeout must be at least 1 second")
    if arguments.copy_storage_inc:
        arguments.shared_base = True
    parallel = arguments.parallel_connections or (2 if arguments.parallel else None)
    if parallel is not None and not arguments.parallel:
        raise UsageError("--parallel-connections is of no use without --parallel")
    if (arguments.tls_destination is not None) and not arguments.tls:
        raise UsageError("--tls-destination is of no use without --tls")
    return ManagedOptions(
        domain=arguments.domain,
        source_uri=arguments.connect,
        target_uri=arguments.desturi,
        place=place_of(arguments.desturi, arguments.agent, arguments.remote_command),
        on_stall=OnStall(arguments.on_stall),
        switchover=arguments.switchover,
        put_off=arguments.put_off == "yes",
        source_images=Afterwards(arguments.source_images),
        live=arguments.live,
        peer_to_peer=arguments.p2p,
        persistent=arguments.persistent,
        undefine_source=arguments.undefinesource,
        suspend=arguments.suspend,
        auto_converge=arguments.auto_converge,
        tls=arguments.tls,
        tls_destination=arguments.tls_destination,
        parallel=parallel,
        abort_on_error=arguments.abort_on_error,
        dname=arguments.dname,
        xml=_contents("--xml", arguments.xml),
        persistent_xml=_contents("--persistent-xml", arguments.persistent_xml),
        migrate_uri=arguments.migrateuri,
        listen_address=arguments.listen_address,
        timeout=arguments.timeout,
        paths=dict(map(_disk, arguments.disk)),
        pool=arguments.target_pool,
        **options.common(arguments),
    )


def _refuse(arguments: argparse.Namespace) -> None:
    for name, why in {**REFUSED, **REFUSED_VALUES, "--direct": NOT_NEEDED["--direct"]}.items():
        if getattr(arguments, name.removeprefix("--").replace("-", "_")):
            raise UsageError(f"{name} cannot be honoured: {why}")


def _disk(text: str) -> tuple[str, str]:
    target, equals, path = text.partition("=")
    if not equals or not path.startswith("/"):
        raise UsageError(f"not a disk: {text!r}", advice="write --disk TARGET=/PATH, such as vda=/srv/vm/web1.qcow2")
    return target, path


def _contents(option: str, path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {path} cannot be read: {error}") from error


def place_of(uri: str, agent: str | None, remote_command: str) -> Place:
    """The host of libvirt's `uri` as ssh reaches it, or what `agent` says. Raises `UsageError`."""
    if agent is not None:
        place = parse_place(agent if re.match(r"\w+://[^/]+/", agent) or "://" not in agent else f"{agent}/",
                            remote_command)  # fmt: skip
        return Local("/") if isinstance(place, Local) else Ssh(place.host, "/", place.user, place.port, remote_command)
    parts = urlsplit(uri)
    driver, _, transport = parts.scheme.partition("+")
    if driver != "qemu":
        raise UsageError(f"not a libvirt of QEMUs: {uri!r}", advice="write qemu+ssh://HOST/system")
    if not parts.hostname:
        raise UsageError(f"{uri!r} names no host", advice="write qemu+ssh://HOST/system")
    if transport not in ("ssh", "libssh", "libssh2"):
        raise UsageError(
            f"{uri!r} does not tell how the disks get there", advice="name the host by ssh, too: --agent ssh://HOST"
        )
    host = parts.netloc.rpartition("@")[2]
    host = host[1 : host.index("]")] if host.startswith("[") else host.partition(":")[0]
    user = unquote(parts.username) if parts.username else None
    return parse_place(
        f"ssh://{f'{user}@' if user else ''}{f'[{host}]' if ':' in host else host}"
        f"{f':{parts.port}' if parts.port else ''}/",
        remote_command,
    )


if __name__ == "__main__":
    sys.exit(main())
