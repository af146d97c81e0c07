"""Which chunks of which device came in a stream: a byte a chunk, in regions that exist only where something came."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import StreamError
from qemu_blkmig.stream.events import CHUNK, Block

REGION = 1024
"""Chunks in a region: 1 GiB of the device."""
MOST_REGIONS = 1 << 16
"""Of all devices together: 64 TiB that are touched, in at most 70 MiB of memory, whatever a stream claims."""

_TOO_MANY = f"the blocks so far lie in more than {MOST_REGIONS >> 10} TiB of disks"

NEVER, ZERO, DATA = 0, 1, 2


class ChunkMap:
    """One device. `blocks`, `zero_blocks`: records that came; `end`: the first byte after the highest one."""

    def __init__(self) -> None:
        self._regions: dict[int, bytearray] = {}
        self.blocks = 0
        self.zero_blocks = 0
        self.end = 0
        self.received = 0

    @property
    def regions(self) -> int:
        """How many regions have been touched."""
        return len(self._regions)

    def state(self, chunk: int) -> int:
        """NEVER, ZERO or DATA: what came last for the chunk."""
        region = self._regions.get(chunk // REGION)
        return region[chunk % REGION] if region else NEVER

    def mark(self, block: Block) -> None:
        """Note a record; one that is not aligned to chunks completes none. Raises `StreamError`, see `MOST_REGIONS`."""
        self.blocks += 1
        self.zero_blocks += block.zero
        self.end = max(self.end, block.position + CHUNK)
        if block.position % CHUNK:
            return
        chunk = block.position // CHUNK
        region = self._regions.get(chunk // REGION)
        if region is None:
            if len(self._regions) == MOST_REGIONS:
                raise StreamError(_TOO_MANY, offset=block.offset)
            region = self._regions[chunk // REGION] = bytearray(REGION)
        self.received += region[chunk % REGION] == NEVER
        region[chunk % REGION] = ZERO if block.zero else DATA

    def missing(self, size: int) -> Iterator[Extent]:
        """What of the device's `size` bytes never came, joined."""
        begin: int | None = None
        for chunk, came in self._turns(-(-size // CHUNK)):
            if came and begin is not None:
                yield Extent(begin * CHUNK, (chunk - begin) * CHUNK)
                begin = None
            elif not came and begin is None:
                begin = chunk
        if begin is not None:
            yield Extent(begin * CHUNK, size - begin * CHUNK)

    def picture(self, width: int) -> str:
        """At most `width` characters: # data, 0 zero, . nothing came, + some of each."""
        chunks = -(-self.end // CHUNK)
        per = max(1, -(-chunks // width))
        touched = sorted(self._regions)
        signs = {frozenset({NEVER}): ".", frozenset({ZERO}): "0", frozenset({DATA}): "#"}
        cells = (range(begin, min(chunks, begin + per)) for begin in range(0, chunks, per))
        return "".join(signs.get(self._states(cell, touched), "+") for cell in cells)

    def _turns(self, chunks: int) -> Iterator[tuple[int, bool]]:
        """From which chunk on they came, and from which on they did not; regions nothing came for are passed over."""
        if not chunks:
            return
        after = 0
        for number in sorted(self._regions):
            first = number * REGION
            if first >= chunks:
                break
            if first > after:
                yield after, False
            for chunk, state in enumerate(self._regions[number][: chunks - first], first):
                yield chunk, state != NEVER
            after = first + REGION
        if after < chunks:
            yield after, False

    def _states(self, chunks: range, touched: Sequence[int]) -> frozenset[int]:
        """The states that occur among `chunks`; `touched`: the regions that there are, ascending."""
        first, last = chunks.start // REGION, (chunks.stop - 1) // REGION
        concerned = touched[bisect_left(touched, first) : bisect_right(touched, last)]
        found: set[int] = set() if len(concerned) == last - first + 1 else {NEVER}
        for number in concerned:
            begin = number * REGION
            found.update(self._regions[number][max(0, chunks.start - begin) : chunks.stop - begin])
        return frozenset(found)


class ChunkMaps:
    """All devices of a stream, in the order in which they first came."""

    def __init__(self) -> None:
        self.devices: dict[str, ChunkMap] = {}
        self._regions = 0

    def mark(self, block: Block) -> None:
        """Note a record. Raises `StreamError` where the devices are larger than any real ones."""
        if block.device not in self.devices:
            self.devices[block.device] = ChunkMap()
            self._regions += 1
        found = self.devices[block.device]
        before = found.regions
        found.mark(block)
        self._regions += found.regions - before
        if self._regions > MOST_REGIONS:
            raise StreamError(_TOO_MANY, offset=block.offset)
