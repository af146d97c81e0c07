"""Domains of libvirt that the agent's job brings here: told to libvirt's hook as long as the agent lives."""

from __future__ import annotations

import os
import uuid

from qemu_blkmig.destination.protocol import Expect
from qemu_blkmig.errors import Refused
from qemu_blkmig.hooks.expected import Expected


class Expecting:
    """What was told to the hook; `end` takes it back."""

    def __init__(self) -> None:
        self._told: dict[str, Expected] = {}

    def expect(self, op: Expect, job: str | None) -> None:
        """Tell of a domain. Raises `Refused`."""
        if job is None:
            raise Refused("a domain is expected by a job only")
        try:
            wanted = str(uuid.UUID(op.domain.uuid))
        except ValueError as error:
            raise Refused(f"{op.domain.uuid!r} is no UUID") from error
        if not op.disks or not all(map(os.path.isabs, op.disks.values())):
            raise Refused("disks of an expected domain need absolute paths")
        try:
            told = Expected(job, wanted, op.domain.name, op.peer, op.disks)
        except OSError as error:
            raise Refused(f"libvirt's hook cannot be told of domain {op.domain.name}: {error}") from error
        before, self._told[wanted] = self._told.get(wanted), told
        if before is not None:
            before.close()

    def end(self) -> None:
        """Expect nothing any more."""
        while self._told:
            self._told.popitem()[1].close()
