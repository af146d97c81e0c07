"""A domain that runs here, and the libvirts that it goes from and to."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from qemu_blkmig.errors import Refused
from qemu_blkmig.job.arrangement import chosen
from qemu_blkmig.job.beginning import Beginning
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.virt.connection import SOURCE, TARGET, Connection
from qemu_blkmig.virt.domain import Domain
from qemu_blkmig.virt.kept import own_variables


@dataclass(frozen=True)
class Ends:
    """`handle` is the binding's own domain, at the source."""

    source: Connection
    target: Connection
    handle: Any
    domain: Domain

    @classmethod
    async def open(
        cls, options: ManagedOptions, stack: contextlib.AsyncExitStack, beginning: Beginning | None = None
    ) -> Ends:
        """Connect to both; they are closed with `stack`. `beginning`: of the connection to the destination's.

        Raises `Refused`, also where there is no such domain or it does not run (or does, offline), and what
        `Connection.call` raises.
        """
        source = await Connection.open(options.source_uri, SOURCE)
        stack.push_async_callback(source.close)
        if urlsplit(source.uri).hostname:
            raise Refused(
                f"{source.uri} is another host's libvirt, and the disks are read on the host where the domain runs",
                advice="run virsh-blkmigrate on that host",
            )
        handle = await source.domain(options.domain)
        active = bool(await source.call(handle.isActive))
        if not active and not options.offline:
            raise Refused(
                f"domain {options.domain} does not run",
                advice="virsh-blkmigrate --offline --persistent moves one that does not",
            )
        if active and options.offline:
            raise Refused(f"domain {options.domain} runs", advice="without --offline it moves while it runs")
        begun = beginning.take_libvirt() if beginning is not None else None
        target = await (begun or Connection.open(options.target_uri, TARGET))
        stack.push_async_callback(target.close)
        domain = Domain.parse(await source.call(handle.XMLDesc))
        if options.offline:
            # No QEMU tells which files a volume of a pool is.
            domain = await chosen(replace(domain, nvram=own_variables(domain, source.uri)), options, source)
        return cls(source, target, handle, domain)
