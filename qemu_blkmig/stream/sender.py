"""The sending side's frame: parts of the section, records and percentages into a channel.

All of it blocks: it belongs in a thread, one call at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qemu_blkmig.nbd.control import Control
from qemu_blkmig.stream import encode
from qemu_blkmig.stream.channel import Bytes, Channel
from qemu_blkmig.stream.events import CHUNK, Kind

_ZEROES = memoryview(bytes(CHUNK))


class StreamSender:
    """Writes one stream. A part of the section is opened by its first record and closed by `end_part`.

    `total`: bytes of all disks, of which `advance` tells how many the bulk pass has settled. Everything raises what
    `Channel.write` raises.
    """

    def __init__(self, channel: Channel, *, machine: str | None, footers: bool, zero_blocks: bool, total: int) -> None:
        self.zero_blocks = zero_blocks
        self._channel = channel
        self._machine = machine
        self._footer = encode.footer() if footers else b""
        self._total = total
        self._settled = 0
        self._percent = 0
        self._in_part = False
        self._completing = False

    def begin(self, control: Control) -> None:
        """The header, and the section's START."""
        start = encode.header(self._machine) + encode.section(Kind.START) + encode.END_OF_PART + self._footer
        self._channel.write([start], control)

    def begin_completion(self) -> None:
        """All records from now on, and the end, are in the section's END. The part before must be closed."""
        self._completing = True

    def end_part(self, control: Control) -> None:
        """Close the part that is open, if one is; END is only closed by `finish`."""
        if self._in_part and not self._completing:
            self._channel.write([encode.END_OF_PART + self._footer], control)
            self._in_part = False

    def finish(self, control: Control) -> None:
        """100 %, the end of the section and of the stream. The channel is left open."""
        self._completing = True
        self._in_section([encode.percent(100), encode.END_OF_PART, self._footer, encode.END_OF_STREAM], control)

    def chunks(self, device: bytes, chunks: Iterable[tuple[int, memoryview | None]], control: Control) -> None:
        """Chunks of a device and their positions, in one go; None: a chunk of zeroes. A short one is padded."""
        self._in_section([each for position, data in chunks for each in self._record(device, position, data)], control)

    def advance(self, count: int, control: Control) -> None:
        """The bulk pass has settled `count` bytes more; told in whole percent, when that changes."""
        self._settled += count
        percent = min(99, self._settled * 100 // self._total)
        if percent != self._percent:
            self._percent = percent
            self._in_section([encode.percent(percent)], control)

    def _record(self, device: bytes, position: int, data: memoryview | None) -> Sequence[Bytes]:
        if data is None and self.zero_blocks:
            return [encode.record(device, position, zero=True)]
        payload = _ZEROES if data is None else data
        return [encode.record(device, position, zero=False), payload, _ZEROES[len(payload) :]]

    def _in_section(self, records: Sequence[Bytes], control: Control) -> None:
        """Write records, in a part that is opened for them unless one is."""
        opening = [] if self._in_part else [encode.section(Kind.END if self._completing else Kind.PART)]
        self._in_part = True
        self._channel.write([*opening, *records], control)
