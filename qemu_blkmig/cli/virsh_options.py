"""The options of `virsh-blkmigrate`: those of `virsh migrate` with their meaning, then ours."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from qemu_blkmig.cli import options, resume_command
from qemu_blkmig.cli.form import argument
from qemu_blkmig.cli.libvirt_ends import DESTINATION
from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.place import REMOTE_COMMAND

_NO_POSTCOPY = (
    "the guest would run there before its disks are proven equal, and could not be given back; --auto-converge, "
    "--on-stall and --timeout bring a busy guest over"
)
_NO_MIRROR = "the disks are not copied by QEMU's mirror"
_NO_COMPRESSION = "RAM is sent as it is"
_NO_PARALLEL = (
    "at the destination its connections wait for what the gate withholds of the first one; the guest would not arrive, "
    "and might stand still here"
)
REFUSED = {
    "--direct": "QEMU's driver knows no direct migration; virsh takes no heed of it beside --p2p",
    "--tunnelled": "libvirt's own connection would carry the stream past our gate; ours, through ssh, is as safe",
    "--postcopy": _NO_POSTCOPY,
    "--postcopy-after-precopy": _NO_POSTCOPY,
    "--postcopy-resume": _NO_POSTCOPY,
    "--timeout-postcopy": _NO_POSTCOPY,
    "--copy-storage-synchronous-writes": f"{_NO_MIRROR}; a guest that writes too fast is slowed by --on-stall throttle",
    "--compressed": _NO_COMPRESSION,
    "--parallel": _NO_PARALLEL,
    "--rdma-pin-all": "the stream must pass our gate, which speaks TCP and unix sockets",
    "--zerocopy": "the stream must pass our gate",
}
REFUSED_VALUES = {
    "--comp-methods": _NO_COMPRESSION,
    "--comp-mt-level": _NO_COMPRESSION,
    "--comp-mt-threads": _NO_COMPRESSION,
    "--comp-mt-dthreads": _NO_COMPRESSION,
    "--comp-xbzrle-cache": _NO_COMPRESSION,
    "--comp-zlib-level": _NO_COMPRESSION,
    "--comp-zstd-level": _NO_COMPRESSION,
    "--available-switchover-bandwidth": "QEMU would go by it, and pause the guest before its disks are read back; "
    "--downtime says how long the pause may be",
    "--migrate-disks-detect-zeroes": f"{_NO_MIRROR}; what the source's image knows to be zeroes is a hole there, and "
    "data is not searched for zeroes",
    "--parallel-connections": _NO_PARALLEL,
    "--postcopy-bandwidth": _NO_POSTCOPY,
    "--disks-port": f"{_NO_MIRROR}, and go through ssh; --data tls://:PORT takes them past it",
    "--disks-uri": f"{_NO_MIRROR}, and go through ssh; --data tls://[HOST[:PORT]] takes them past it",
}


class _Refused(argparse.Action):
    """An option that is there to tell why it cannot be."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        """Raise `UsageError`."""
        raise UsageError(f"{option_string} cannot be honoured: {self.help}")


def add_all(parser: argparse.ArgumentParser) -> None:
    """Add every option to the parser."""
    parser.add_argument("--debug", action="store_true", help="show causes and what is done in detail")
    _add_ends(parser)
    _add_domain(parser)
    _add_ram(parser)
    _add_storage(parser)
    _add_run(parser)
    options.add_selection(parser, "--shared-base", "--copy-storage-inc")
    convergence = options.add_convergence(parser)
    options.add_switchover(convergence)
    convergence.add_argument("--timeout", type=argument(options.count), metavar="SECONDS",
                             help="when it has taken that long, the guest is paused until it has moved; the first "
                             "pass over the disks is waited for")  # fmt: skip
    convergence.add_argument("--timeout-suspend", action="store_true", help="what --timeout does")
    options.add_transfer(parser)
    options.add_data_path(parser)
    resume_command.add_retry(parser)
    options.add_output(parser)
    options.add_metrics(parser)
    _add_refused(parser)


def _add_ends(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("domain", nargs="?", metavar="DOMAIN", help="name, id or UUID of a domain of this host")
    parser.add_argument(
        "desturi",
        nargs="?",
        metavar="DESTURI",
        help=f"the destination's libvirt, {DESTINATION}; the agent that writes the images is reached by the same ssh",
    )
    parser.add_argument("migrateuri", nargs="?", metavar="MIGRATEURI", help="as --migrateuri; virsh has it here, too")
    parser.add_argument("--domain", dest="domain_option", metavar="DOMAIN", help="DOMAIN as an option")
    parser.add_argument("--desturi", dest="desturi_option", metavar="DESTURI", help="DESTURI as an option")
    parser.add_argument("-c", "--connect", metavar="URI", help="this host's libvirt (default: libvirt's own)")
    parser.add_argument("--agent", metavar="PLACE", help="the host of DESTURI by ssh, such as ssh://root@hostb:2222, "
                        "where DESTURI does not tell (default: as DESTURI has it)")  # fmt: skip
    parser.add_argument(
        "--remote-command",
        metavar="CMD",
        default=REMOTE_COMMAND,
        help=f"how qemu-blkmig is called on the destination host (default: {REMOTE_COMMAND})",
    )


def _add_domain(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the domain (as of `virsh migrate`)")
    group.add_argument(
        "--live",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the guest runs while it moves (the default, other than of virsh); --no-live: it is paused while its RAM "
        "does, its disks being copied before that",
    )
    _add_flags(
        group,
        {
            "--offline": "the domain does not run: its images are copied, and it is defined there (with --persistent)",
            "--persistent": "the domain is defined there",
            "--undefinesource": "the domain is no longer defined here",
            "--suspend": "the guest is paused there",
            "--abort-on-error": "an I/O error of the guest while it is migrated ends the migration",
            "--change-protection": "not needed: the domain is protected from changes anyway",
            "--unsafe": "a disk that is not copied, or that libvirt does not know of, may lie on storage that is not "
            "shared, and so may persistent memory; the destination may have too few free huge pages; else not needed: "
            "the disks are copied, whatever their cache mode is",
        },
    )
    _add_values(
        group,
        {
            "--dname": ("NAME", "the domain's name there"),
            "--xml": ("FILE", "the domain's XML for the destination, in place of its own; images go where it says"),
            "--persistent-xml": ("FILE", "the same, of the domain that is defined there (--persistent)"),
            "--graphicsuri": ("URI", "where clients of the guest's display are sent to"),
        },
    )


def _add_ram(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the way of RAM (as of `virsh migrate`)")
    _add_flags(
        group,
        {
            "--p2p": "the source's libvirt speaks to the destination's by DESTURI, not this command",
            "--auto-converge": "slow the guest's CPUs when its RAM does not converge",
            "--tls": "libvirt's migration of RAM uses TLS (qemu.conf, migrate_tls_x509_cert_dir)",
        },
    )
    group.add_argument("--migrateuri", dest="migrateuri_option", metavar="URI",
                       help="where the destination's QEMU listens for RAM, as this host reaches it, such as "
                       "tcp://hostb:49152 (default: a unix socket, through ssh: no port is opened)")  # fmt: skip
    _add_values(
        group,
        {
            "--listen-address": ("ADDRESS", "which address the destination's QEMU listens on, with --migrateuri"),
            "--tls-destination": ("NAME", "the name in the destination's certificate (default: the host of DESTURI)"),
        },
    )  # fmt: skip
    for name, told in (
        ("--auto-converge-initial", "of --auto-converge, percent by which CPUs are slowed at first"),
        ("--auto-converge-increment", "of --auto-converge, percent more each time"),
    ):
        group.add_argument(name, type=argument(options.count), metavar="N", help=told)


def _add_storage(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the images")
    group.add_argument("--copy-storage-all", action="store_true", help="all of the disks are copied (the default)")
    group.add_argument("--disk", action="append", default=[], metavar="TARGET=PATH",
                       help="where the image of a disk is to be there, such as vda=/srv/vm/web1.qcow2; can be given "
                       "several times (default: the path that it has here)")  # fmt: skip
    group.add_argument("--target-pool", metavar="POOL", help="the storage pool there that takes all other images")
    options.add_source_images(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("this run")
    group.add_argument("--dry-run", action="store_true", help="tell everything that would fail and what would be done, "
                       "with the domain's XML for the destination; nothing is touched")  # fmt: skip
    group.add_argument("--resume", metavar="JOB",
                       help="go on with a migration that was suspended, as it was asked for at first but for "
                       "--bandwidth, --downtime, --max-rounds, --on-stall, --compare, --xml and --persistent-xml "
                       "(images stay where they are)")  # fmt: skip
    group.add_argument("--verbose", action="store_true", help="show progress also where stderr is no terminal")


def _add_refused(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of `virsh migrate` that are refused")
    for name, why in REFUSED.items():
        group.add_argument(name, action=_Refused, nargs=0, help=why)
    for name, why in REFUSED_VALUES.items():
        group.add_argument(name, action=_Refused, metavar="VALUE", help=why)


def _add_flags(group: Any, flags: dict[str, str]) -> None:
    for name, told in flags.items():
        group.add_argument(name, action="store_true", help=told)


def _add_values(group: Any, values: dict[str, tuple[str, str]]) -> None:
    for name, (metavar, told) in values.items():
        group.add_argument(name, metavar=metavar, help=told)
