"""A domain of libvirt's as the SOURCE of `migrate` and `check`: libvirt:DOMAIN."""

from __future__ import annotations

import argparse

from qemu_blkmig.cli import options, resume_command, show
from qemu_blkmig.errors import UsageError
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import Afterwards, OnStall
from qemu_blkmig.job.place import Ssh

PREFIX = "libvirt:"
_BY_LIBVIRT = {
    "launch": "libvirt starts the destination's QEMU",
    "target_qmp": "libvirt starts the destination's QEMU",
    "pause_only": "libvirt's domains move with their guest, or by virsh-blkmigrate --offline",
    "ram_uri": "virsh-blkmigrate --migrateuri names the way of RAM",
}


def is_domain(source: str) -> bool:
    """Whether a SOURCE is meant to be a domain."""
    return source.startswith(PREFIX)


def migrate_domain(arguments: argparse.Namespace) -> int:
    """`migrate libvirt:DOMAIN DEST`. Raises `UsageError`."""
    if arguments.source_after == "keep":
        raise UsageError("--source-after keep is not for libvirt's domains: libvirt ends the source's QEMU")
    asked = _domain_and_place(arguments)
    wanted = ManagedOptions(
        *asked,
        on_stall=OnStall(arguments.on_stall),
        switchover=arguments.switchover,
        put_off=arguments.put_off == "yes",
        source_images=Afterwards(arguments.source_images),
        directory=asked[2].directory,
        **options.common(arguments),
    )
    return resume_command.carry(wanted, arguments, wanted.target_uri)


def check_domain(arguments: argparse.Namespace) -> int:
    """`check libvirt:DOMAIN DEST`; the exit code. Raises `UsageError`."""
    import asyncio

    from qemu_blkmig.job.managed_check import check_managed

    asked = _domain_and_place(arguments)
    wanted = ManagedOptions(*asked, selection=options.selection(arguments), directory=asked[2].directory)
    outcome = asyncio.run(check_managed(wanted))
    options.print_outcome(outcome, arguments.output, show.checked_domain)
    return 0 if outcome.ready else 3


def _domain_and_place(arguments: argparse.Namespace) -> tuple[str, str, Ssh]:
    """The domain, the destination's libvirt, and the directory there."""
    from qemu_blkmig.cli.libvirt_ends import uri_of

    domain, place = arguments.source.removeprefix(PREFIX), options.place(arguments)
    if not domain:
        raise UsageError("libvirt: names no domain", advice="write libvirt:DOMAIN")
    for name, why in _BY_LIBVIRT.items():
        if getattr(arguments, name, None):
            raise UsageError(f"--{name.replace('_', '-')} is not for libvirt's domains: {why}")
    if not isinstance(place, Ssh):
        raise UsageError(f"{place} is on this host, and so is the domain", advice="write ssh://[user@]host[:port]/DIR")
    return domain, uri_of(place), place
