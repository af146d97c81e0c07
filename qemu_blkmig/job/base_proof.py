"""Proof that both sides' shared bases are the same: by content, before anything is copied upon them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_blkmig.destination import images
from qemu_blkmig.destination.basecache import BaseCache
from qemu_blkmig.destination.bases import Chain, Root, digests_within, root_of
from qemu_blkmig.destination.protocol import BaseDigest, BaseDigestReply, BaseDigests, DigestsReply
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import Refused
from qemu_blkmig.hashing import Algorithm
from qemu_blkmig.job.bases import Base
from qemu_blkmig.job.compare import at_once
from qemu_blkmig.job.options import BaseCheck
from qemu_blkmig.nbd.control import Control
from qemu_blkmig.nbd.digests import MOST, SECTOR, UNIT, differing_units
from qemu_blkmig.qmp.disks import Disk, plain_filename
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.mover import carry_out
from qemu_blkmig.units import show_bytes

_WITH_BACKING = {"qcow2", "qed", "qcow", "vmdk"}
"""Formats that can have a backing file: where QEMU uses none, that has to be said."""
_MEND = (
    "copy the source's base there, or go without --shared-base (virsh-blkmigrate: without --copy-storage-inc), so that "
    "it is copied along"
)
"""Either command's user is told the option that he typed."""


@dataclass(frozen=True)
class Proof:
    """How bases are compared: how thoroughly, and by what hash."""

    agent: AgentClient
    check: BaseCheck
    algorithm: Algorithm
    tell: Callable[[str], None]

    async def compare(self, disk: Disk, base: Base, there: str, image_format: str, process: int | None) -> str | None:
        """Compare the source's base of `disk` with the image `there`, of `image_format`, at the destination.

        `process`: the source QEMU's. Returns a warning where not all is proven. Raises `Refused`: they differ, or one
        of them cannot be read.
        """
        if self.check is BaseCheck.NONE:
            return f"disk {disk.name}: the base {base.file} was not compared (--base-check none): it is taken on trust"
        compared = _Compared(self, disk.name, there, image_format)
        try:
            chain = await asyncio.to_thread(chain_of, disk, base, process)
            await compared.sizes(chain)
            if self.check is BaseCheck.FULL:
                self.tell(f"disk {disk.name}: comparing its base {base.file} with {there} at the destination")
                ours, theirs = await compared.contents(chain)
                self.tell(
                    f"disk {disk.name}: the bases are equal "
                    f"(read {show_bytes(ours.read)} here, {show_bytes(theirs.read)} there)"
                )
                return None
        except Refused as error:
            error.disk = disk.name
            raise
        return (
            f"disk {disk.name}: only the size of the base {base.file} was compared (--base-check size): "
            "its content may differ"
        )


@dataclass(frozen=True)
class _Compared:
    """The base of one disk at the destination, compared with the source's."""

    proof: Proof
    disk: str
    path: str
    format: str

    async def sizes(self, chain: Chain) -> None:
        """Raise `Refused` where the virtual sizes differ."""
        op = BaseDigest(self.disk, self.path, self.format, None)
        reply = await carry_out(self.proof.agent, op, BaseDigestReply)
        if reply.size != chain.size:
            raise Refused(
                f"the base {self.path} at the destination holds {reply.size} bytes, the source's {chain.files[0]} "
                f"{chain.size}: {_MEND}"
            )

    async def contents(self, chain: Chain) -> tuple[Root, Root]:
        """Raise `Refused` where the contents differ, with the first bytes that do."""
        op = BaseDigest(self.disk, self.path, self.format, self.proof.algorithm)
        ours, reply = await at_once(self._root(chain), carry_out(self.proof.agent, op, BaseDigestReply))
        if ours.digest == reply.root:
            return ours, Root(reply.root, reply.read)
        first = await self._first_difference(chain)
        where = f"first in bytes {first.offset} to {first.end - 1}" if first else "but no more now: it is being changed"
        raise Refused(
            f"the base {self.path} at the destination is not the source's {chain.files[0]}: they differ, {where}: "
            f"{_MEND}"
        )

    async def _root(self, chain: Chain) -> Root:
        with _control() as control:
            return await root_of(chain, self.proof.algorithm, control, BaseCache())

    async def _first_difference(self, chain: Chain) -> Extent | None:
        for offset in range(0, chain.size, MOST * UNIT):
            extent = Extent(offset, min(MOST * UNIT, chain.size - offset))
            if found := await self._differing(chain, extent, UNIT):
                unit = Extent(found[0].offset, min(UNIT, found[0].length))
                return next(iter(await self._differing(chain, unit, SECTOR)), unit)
        return None

    async def _differing(self, chain: Chain, extent: Extent, unit: int) -> list[Extent]:
        algorithm = self.proof.algorithm
        op = BaseDigests(self.disk, self.path, self.format, extent.offset, extent.length, unit, algorithm)
        with _control() as control:
            here = digests_within(chain, extent, unit, algorithm, control)
            ours, theirs = await at_once(here, carry_out(self.proof.agent, op, DigestsReply))
        return differing_units(ours, theirs.digests, extent, unit, algorithm)


@contextlib.contextmanager
def _control() -> Iterator[Control]:
    """Cancelled at the end, so that no thread goes on reading."""
    control = Control()
    try:
        yield control
    finally:
        control.cancel()
        control.close()


def chain_of(disk: Disk, base: Base, process: int | None) -> Chain:
    """The base with all beneath it, just as the source QEMU, process `process`, has them open.

    Raises `Refused` where that is no file that can be read from here. Blocks.
    """
    description: dict[str, Any] | None = None
    files: list[str] = []
    size = 0
    for layer in reversed([layer for layer in disk.layers[base.above :] if not layer.filter]):
        path = path_here(plain_filename(layer.filename), process)
        size, own = images.chain(path, layer.format, alone=True)
        files = own + files
        protocol = "host_device" if Path(path).is_block_device() else "file"
        above: dict[str, Any] = {"driver": layer.format, "file": {"driver": protocol, "filename": path}}
        if description is not None or layer.format in _WITH_BACKING:
            above["backing"] = description
        description = above
    return Chain(f"json:{json.dumps(description)}", None, tuple(files), size)


def path_here(name: str, process: int | None) -> str:
    """The path of a file as `process` names it. Raises `Refused`."""
    path = os.path.realpath(name if process is None else Path(f"/proc/{process}/cwd", name))
    if not Path(path).exists():
        raise Refused(
            f"the base {name} cannot be read from here: there is no such file",
            advice="--base-check none goes without the proof",
        )
    return path
