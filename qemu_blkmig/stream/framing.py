"""The frame around sections: header, configuration, parts of sections with their footers, commands, end.

    u32 'QEVM'  u32 3  [configuration]
    { START | PART | END of a section, its payload, [footer] | command }
    { device state, which cannot be told apart } | EOF [vmdesc]

Written after what QEMU 7.2 was seen to send and take (FACTS.md) and its migration/savevm.c.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qemu_blkmig.errors import StreamError
from qemu_blkmig.stream import block, ram
from qemu_blkmig.stream.cursor import Cursor, Fate, Steps
from qemu_blkmig.stream.events import (
    Command,
    Configuration,
    DeviceState,
    EndOfStream,
    Event,
    Kind,
    Section,
    SectionOver,
)

MAGIC = 0x5145564D
STREAM_VERSION = 3

END_OF_FILE = 0x00
FULL = 0x04
SUBSECTION = 0x05
VMDESC = 0x06
CONFIGURATION = 0x07
COMMAND = 0x08
FOOTER = 0x7E

PAGE_SIZE = 4096
"""Of most machines, x86 among them."""

_OFF = {"dirty-bitmap": ": turn the source's capability dirty-bitmaps off"}
"""What can be done about a section, by its name."""
_POSTCOPY_ADVISE = 3
_POSTCOPY = range(4, 8)
"""Commands of a source that goes over to postcopy: listen, run, discard RAM, a stream within the stream."""
_MOST_CAPABILITIES = 256
_PAGE_BITS = range(10, 31)


@dataclass
class _Open:
    """A section that has begun; `over`: it has ended, too."""

    name: str
    version: int
    over: bool = False


class Decoder:
    """Tells what is in a stream: bytes in, events out. Its memory is bounded, whatever it is fed.

    `page_size`: of the RAM, where the stream does not tell. With `pass_on`, everything but the block section is also
    given back as it came, in `Passed` events. Not to be used any more once it has raised `StreamError`.
    """

    def __init__(self, *, page_size: int = PAGE_SIZE, pass_on: bool = False) -> None:
        if page_size < 1 << _PAGE_BITS.start or page_size & (page_size - 1):
            raise ValueError(f"a page of {page_size} bytes")
        self._cursor = Cursor(pass_on=pass_on)
        self._layout = ram.Layout(page_size)
        self._sections: dict[int, _Open] = {}
        self._footers: bool | None = None
        self._steps = self._stream()

    @property
    def offset(self) -> int:
        """How far in the stream the decoder is."""
        return self._cursor.offset

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Event]:
        """The events of the next bytes; iterate to the end before feeding again. Raises `StreamError`."""
        self._cursor.give(memoryview(data))
        yield from self._run()

    def close(self) -> Iterator[Event]:
        """The last events, the stream having ended. Raises `StreamError` where more is missing."""
        self._cursor.end()
        yield from self._run()

    def _run(self) -> Iterator[Event]:
        for event in self._steps:
            if event is None:
                return
            yield event

    def _stream(self) -> Steps[None]:
        cursor = self._cursor
        magic = yield from cursor.number(4, "the magic 'QEVM'")
        if magic != MAGIC:
            raise StreamError(f"the stream begins with {magic:#010x}, not with 'QEVM' ({MAGIC:#x})", offset=0)
        version = yield from cursor.number(4, "the stream's version")
        if version != STREAM_VERSION:
            raise StreamError(f"the stream has version {version}, not {STREAM_VERSION}", offset=4)
        element: int | None = yield from self._element()
        if element == CONFIGURATION:
            element = yield from self._configuration()
        while element is not None:
            element = yield from self._handler(element)()

    def _handler(self, element: int) -> Callable[[], Steps[int | None]]:
        """What parses an element whose first byte was just taken; it returns the next one's first byte."""
        handlers: dict[int, Callable[[], Steps[int | None]]] = {
            END_OF_FILE: self._end,
            Kind.START: self._start,
            Kind.PART: lambda: self._continue(Kind.PART),
            Kind.END: lambda: self._continue(Kind.END),
            FULL: self._device_state,
            COMMAND: self._command,
        }
        if element not in handlers:
            offset = self._cursor.offset - 1
            what = "a footer" if element == FOOTER else f"the byte {element:#04x}"
            raise StreamError(f"{what} where a section, a command or the end must begin", offset=offset)
        return handlers[element]

    def _element(self) -> Steps[int]:
        yield from self._cursor.hesitate()
        return (yield from self._cursor.number(1, "a section, a command or the end"))

    def _configuration(self) -> Steps[int]:
        cursor = self._cursor
        start = cursor.offset - 1
        yield from cursor.decide(Fate.PASS)
        machine = yield from cursor.string(4, "the machine type's name")
        page_bits: int | None = None
        capabilities: tuple[str, ...] = ()
        identity: str | None = None
        element = yield from self._element()
        while element == SUBSECTION:
            yield from cursor.decide(Fate.PASS)
            at = cursor.offset - 1
            name = yield from cursor.string(1, "a subsection's name")
            yield from cursor.skip(4, "a subsection's version")
            if name == "configuration/target-page-bits":
                page_bits = yield from self._page_bits()
            elif name == "configuration/capabilities":
                capabilities = yield from self._capabilities()
            elif name == "configuration/uuid":
                identity = str(uuid.UUID(bytes=(yield from cursor.take(16, "the machine's UUID"))))
            else:
                raise StreamError(f"the configuration's subsection {name!r} is not known", offset=at)
            element = yield from self._element()
        yield Configuration(start, machine, page_bits, capabilities, identity)
        return element

    def _page_bits(self) -> Steps[int]:
        start = self._cursor.offset
        bits = yield from self._cursor.number(4, "the bits of a page's size")
        if bits not in _PAGE_BITS:
            raise StreamError(f"a page of 2^{bits} bytes is none", offset=start)
        self._layout.page_size = 1 << bits
        return bits

    def _capabilities(self) -> Steps[tuple[str, ...]]:
        start = self._cursor.offset
        count = yield from self._cursor.number(4, "the number of capabilities")
        if count > _MOST_CAPABILITIES:
            raise StreamError(f"{count} capabilities are more than any QEMU's", offset=start)
        names = []
        for _ in range(count):
            names.append((yield from self._cursor.string(1, "a capability's name")))
        for name in ("multifd", "mapped-ram"):
            if name in names:
                raise StreamError(f"the capability {name} is on, which a plain stream cannot carry", offset=start)
        self._layout.ignore_shared = "x-ignore-shared" in names
        return tuple(names)

    def _start(self) -> Steps[int]:
        cursor = self._cursor
        begin = cursor.offset - 1
        number = yield from cursor.number(4, "a section's number")
        name = yield from cursor.string(1, "a section's name")
        instance = yield from cursor.number(4, "a section's instance")
        version = yield from cursor.number(4, "a section's version")
        known = {block.SECTION: (block.VERSION,), ram.SECTION: ram.VERSIONS}
        if name not in known or instance:
            raise StreamError(
                f"section {name!r} (instance {instance}) has no lengths and a form that is not known here, so it "
                f"cannot be skipped; only block and ram can{_OFF.get(name, '')}",
                offset=begin,
            )
        if version not in known[name]:
            raise StreamError(f"section {name!r} has version {version}, not {known[name]}", offset=begin)
        if number in self._sections or name in {each.name for each in self._sections.values()}:
            raise StreamError(f"section {number} ({name!r}) begins twice", offset=begin)
        self._sections[number] = _Open(name, version)
        return (yield from self._payload(begin, Kind.START, number))

    def _continue(self, kind: Kind) -> Steps[int]:
        begin = self._cursor.offset - 1
        number = yield from self._cursor.number(4, "a section's number")
        section = self._sections.get(number)
        if section is None or section.over:
            raise StreamError(f"section {number} goes on but {'has ended' if section else 'never began'}", offset=begin)
        section.over = kind is Kind.END
        return (yield from self._payload(begin, kind, number))

    def _payload(self, begin: int, kind: Kind, number: int) -> Steps[int]:
        section = self._sections[number]
        is_block = section.name == block.SECTION
        yield from self._cursor.decide(Fate.DROP if is_block else Fate.PASS)
        yield Section(begin, kind, number, section.name, section.version)
        if is_block:
            yield from block.records(self._cursor)
        else:
            self._layout.version = section.version
            yield from ram.skip_part(self._cursor, self._layout)
        return (yield from self._footer(section.name, number, is_block=is_block))

    def _footer(self, name: str, number: int, *, is_block: bool) -> Steps[int]:
        """A footer if there is one; all sections have it, or none (machine types older than 2.4)."""
        over = self._cursor.offset
        element = yield from self._element()
        footer = element == FOOTER
        if self._footers is None:
            self._footers = footer
        if footer is not self._footers:
            raise StreamError(
                f"section {number} ({name!r}) ends {'with' if footer else 'without'} a footer, unlike those before",
                offset=over,
            )
        if footer:
            told = yield from self._cursor.number(4, "a footer's section number")
            if told != number:
                raise StreamError(f"the footer names section {told}, not {number} ({name!r})", offset=over)
            yield from self._cursor.decide(Fate.DROP if is_block else Fate.PASS)
        yield SectionOver(over, name, footer)
        return (yield from self._element()) if footer else element

    def _command(self) -> Steps[int]:
        cursor = self._cursor
        begin = cursor.offset - 1
        yield from cursor.decide(Fate.PASS)
        number = yield from cursor.number(2, "a command")
        length = yield from cursor.number(2, "a command's length")
        data = yield from cursor.take(length, "a command's data")
        if number == _POSTCOPY_ADVISE and int.from_bytes(data[:8], "big") not in (0, PAGE_SIZE):
            raise StreamError("postcopy with huge pages: the RAM section cannot be skipped", offset=begin)
        if number in _POSTCOPY:
            raise StreamError(
                "the source has gone over to postcopy, which is not supported: let it end without", offset=begin
            )
        yield Command(begin, number, data)
        return (yield from self._element())

    def _device_state(self) -> Steps[None]:
        begin = self._cursor.offset - 1
        self._require_block_over(begin, "device state begins")
        yield DeviceState(begin)
        yield from self._cursor.decide(Fate.PASS)
        yield from self._cursor.skip_all()

    def _end(self) -> Steps[None]:
        cursor = self._cursor
        begin = cursor.offset - 1
        self._require_block_over(begin, "the stream ends")
        yield EndOfStream(begin)
        yield from cursor.decide(Fate.PASS)
        if (yield from cursor.at_end()):
            return
        at = cursor.offset
        if (yield from cursor.number(1, "the description of the devices")) == VMDESC:
            length = yield from cursor.number(4, "the length of the description of the devices")
            yield from cursor.skip(length, "the description of the devices")
            at = cursor.offset
            if (yield from cursor.at_end()):
                return
        raise StreamError("the stream goes on after its end", offset=at)

    def _require_block_over(self, offset: int, what: str) -> None:
        for section in self._sections.values():
            if section.name == block.SECTION and not section.over:
                raise StreamError(f"{what}, but the block section has not ended", offset=offset)
