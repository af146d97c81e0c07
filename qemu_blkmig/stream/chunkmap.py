"""Which chunks of which device came in a stream: a byte a chunk, in regions that exist only where something came."""

from __future__ import annotations

from collections.abc import Iterator

from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.errors import StreamError
from qemu_blkmig.stream.events import CHUNK, Block

REGION = 1024
"""Chunks in a region: 1 GiB of the device."""
MOST_REGIONS = 1 << 16
"""Of all devices together: 64 TiB that are touched, in at most 70 MiB of memory, whatever a stream claims."""

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
        """Note a record; one that is not aligned to chunks completes none."""
        self.blocks += 1
        self.zero_blocks += block.zero
        self.end = max(self.end, block.position + CHUNK)
        if block.position % CHUNK:
            return
        chunk = block.position // CHUNK
        region = self._regions.setdefault(chunk // REGION, bytearray(REGION))
        self.received += region[chunk % REGION] == NEVER
        region[chunk % REGION] = ZERO if block.zero else DATA

    def missing(self, size: int) -> Iterator[Extent]:
        """What of the device's `size` bytes never came, joined."""
        begin: int | None = None
        for chunk in range(-(-size // CHUNK)):
            if self.state(chunk) != NEVER:
                if begin is not None:
                    yield Extent(begin, chunk * CHUNK - begin)
                begin = None
            elif begin is None:
                begin = chunk * CHUNK
        if begin is not None:
            yield Extent(begin, size - begin)

    def picture(self, width: int) -> str:
        """At most `width` characters: # data, 0 zero, . nothing came, + some of each."""
        chunks = -(-self.end // CHUNK)
        per = max(1, -(-chunks // width))
        signs = {frozenset({NEVER}): ".", frozenset({ZERO}): "0", frozenset({DATA}): "#"}
        cells = (range(begin, min(chunks, begin + per)) for begin in range(0, chunks, per))
        return "".join(signs.get(self._states(cell), "+") for cell in cells)

    def _states(self, chunks: range) -> frozenset[int]:
        """The states that occur; in a region that nothing came for, one look is enough."""
        found: set[int] = set()
        at = chunks.start
        while at < chunks.stop:
            region = self._regions.get(at // REGION)
            end = min(chunks.stop, (at // REGION + 1) * REGION)
            found.update(region[at % REGION : at % REGION + end - at] if region else (NEVER,))
            at = end
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
            raise StreamError(
                f"the blocks so far lie in more than {MOST_REGIONS >> 10} TiB of disks", offset=block.offset
            )
