"""What a base image holds, with all that lies beneath it, in one digest; what is known is not read again.

Both sides use it: the agent for the destination's base, the coordinator for the source's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from qemu_blkmig.destination import images, protocol, qemu_nbd
from qemu_blkmig.destination.basecache import BaseCache, identity
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import ConnectionLost, DestinationFailed, Refused
from qemu_blkmig.hashing import Algorithm, hash_function
from qemu_blkmig.nbd.control import Cancelled, Control
from qemu_blkmig.nbd.digests import SLICE, UNIT, digests_of, fault_of
from qemu_blkmig.nbd.reader import NbdReader


@dataclass(frozen=True)
class Chain:
    """An image with all that lies beneath it.

    `opened`: its path, of `format`; or where that is None a json: pseudo-filename, for a chain as a QEMU has it open.
    `files`: all that its content comes from. `size`: virtual, bytes.
    """

    opened: str
    format: str | None
    files: tuple[str, ...]
    size: int

    @classmethod
    def at(cls, path: str, image_format: str) -> Chain:
        """The chain as the image files tell it. Raises `Refused`. Blocks."""
        size, files = images.chain(path, image_format)
        return cls(os.path.realpath(path), image_format, tuple(os.path.realpath(each) for each in files), size)


@dataclass(frozen=True)
class Root:
    """`digest` of all of an image; `read`: bytes that were read to tell it."""

    digest: bytes
    read: int


def nothing_to_check() -> None:
    """Whatever the chain is, it may be read."""


async def root_of(
    chain: Chain, algorithm: Algorithm, control: Control, cache: BaseCache, check: Callable[[], None] = nothing_to_check
) -> Root:
    """One digest of the virtual disk: of its size, and of the digests of its units of `UNIT` bytes, slice by slice.

    Remembered for as long as no file of the chain changes. `check` is called in a thread before anything is read, when
    nobody can write to the chain any more. Raises `Refused`, `Cancelled`, and what `check` raises.
    """
    known = identity(chain.files)
    if known is not None and (digest := cache.find(known, algorithm)) is not None:
        return Root(digest, 0)
    async with _served(chain, check) as reader:
        digest = await _reading(chain, lambda: _root(reader, chain.size, algorithm, control))
    if known is not None and identity(chain.files) == known:
        cache.keep(known, algorithm, digest)
    return Root(digest, control.tally.copied)


async def digests_within(
    chain: Chain,
    extent: Extent,
    unit: int,
    algorithm: Algorithm,
    control: Control,
    check: Callable[[], None] = nothing_to_check,
) -> bytes:
    """`nbd.digests.digests_of` of the image; `check` as of `root_of`. Raises `Refused`, `Cancelled`."""
    if (fault := fault_of(extent, unit, chain.size)) is not None:
        raise Refused(fault)
    async with _served(chain, check) as reader:
        return await _reading(chain, lambda: digests_of(reader, extent, unit, algorithm, control))


class Bases:
    """The agent's answers about bases. `cancel` reaches those under way. `check`: whether what a base, now that it is
    open, consists of may be read; raises `Refused`."""

    def __init__(self, check: Callable[[protocol.BaseDigest | protocol.BaseDigests], None]) -> None:
        self._check = check
        self._cache = BaseCache()
        self._under_way: dict[str, Control] = {}

    async def answer(
        self, op: protocol.BaseDigest | protocol.BaseDigests
    ) -> protocol.BaseDigestReply | protocol.DigestsReply:
        """What `op` asks for. Raises `Refused`, `Cancelled`."""
        if op.disk in self._under_way:
            raise Refused("its base is being read already", disk=op.disk)
        control = self._under_way[op.disk] = Control()
        try:
            return await self._answer(op, control)
        except Refused as error:
            error.disk = op.disk
            raise
        finally:
            del self._under_way[op.disk]
            control.close()

    def cancel(self, disk: str | None) -> None:
        """End the reading for `disk` (None: for all)."""
        for name, control in self._under_way.items():
            if disk in (None, name):
                control.cancel()

    async def _answer(
        self, op: protocol.BaseDigest | protocol.BaseDigests, control: Control
    ) -> protocol.BaseDigestReply | protocol.DigestsReply:
        chain = await asyncio.to_thread(Chain.at, op.path, op.format)
        if isinstance(op, protocol.BaseDigests):
            extent = Extent(op.offset, op.length)
            digests = await digests_within(chain, extent, op.unit, op.algorithm, control, lambda: self._check(op))
            return protocol.DigestsReply(digests, control.tally.copied)
        if op.algorithm is None:
            return protocol.BaseDigestReply(chain.size, b"", 0)
        root = await root_of(chain, op.algorithm, control, self._cache, lambda: self._check(op))
        return protocol.BaseDigestReply(chain.size, root.digest, root.read)


def _root(reader: NbdReader, size: int, algorithm: Algorithm, control: Control) -> bytes:
    hashed = hash_function(algorithm)
    root = hashed(memoryview(f"{size} bytes in units of {UNIT}".encode()))
    for offset in range(0, size, SLICE):
        digests = digests_of(reader, Extent(offset, min(SLICE, size - offset)), UNIT, algorithm, control)
        if digests:
            root = hashed(memoryview(root + offset.to_bytes(8, "big") + digests))
        if control.cancelled:
            raise Cancelled
    return root


@contextlib.asynccontextmanager
async def _served(chain: Chain, check: Callable[[], None]) -> AsyncIterator[NbdReader]:
    try:
        server = await qemu_nbd.start_reading(chain.opened, chain.format)
    except DestinationFailed as error:
        raise Refused(f"the base {chain.files[0]} cannot be read: {error.what}") from error
    try:
        await asyncio.to_thread(check)
        yield NbdReader(server.connections[0])
    finally:
        # It only reads, and that ends a thread that is left reading, too.
        await asyncio.to_thread(server.kill)


async def _reading(chain: Chain, work: Callable[[], bytes]) -> bytes:
    """What `work`, in a thread, tells of the chain; a cancelled caller does not wait for it."""
    try:
        return await asyncio.to_thread(work)
    except (OSError, ConnectionLost) as error:
        raise Refused(f"the base {chain.files[0]} cannot be read: {error}") from error
