"""Skips the "ram" section: it has no lengths, so every page's header must be understood.

What QEMU 0.12 to 9.0 put there (its migration/ram.c, once arch_init.c and vl.c): section version 3 has neither a list
of RAM blocks nor their names before pages; version 4 has both.
"""

from __future__ import annotations

from dataclasses import dataclass

from qemu_blkmig.errors import StreamError
from qemu_blkmig.stream.cursor import Cursor, Steps
from qemu_blkmig.stream.events import RamSkipped

SECTION = "ram"
VERSIONS = (3, 4)

FILLED = 0x02
MEM_SIZE = 0x04
PAGE = 0x08
EOS = 0x10
CONTINUE = 0x20
XBZRLE = 0x40
HOOK = 0x80
COMPRESSED = 0x100
MULTIFD_FLUSH = 0x200

_LIST = "the list of RAM blocks"


@dataclass
class Layout:
    """What must be known to skip RAM. `ignore_shared`: the list of RAM blocks tells addresses, too (capability)."""

    page_size: int
    version: int = 4
    ignore_shared: bool = False


@dataclass
class _Count:
    plain: int = 0
    filled: int = 0
    compressed: int = 0
    size: int | None = None


def skip_part(cursor: Cursor, layout: Layout) -> Steps[None]:
    """One part of the section, up to its EOS. Raises `StreamError`."""
    begin = cursor.offset
    count = _Count()
    mask = layout.page_size - 1
    while True:
        start = cursor.offset
        word = yield from cursor.number(8, "a record of the RAM section")
        flags = word & mask
        kind = flags & ~CONTINUE
        if kind in (PAGE, FILLED, XBZRLE, COMPRESSED):
            if layout.version >= 4 and not flags & CONTINUE:
                length = yield from cursor.number(1, "the length of a RAM block's name")
                yield from cursor.skip(length, "a RAM block's name")
            yield from _skip_page(cursor, kind, layout, count)
        elif flags == EOS:
            yield RamSkipped(begin, count.plain, count.filled, count.compressed, count.size)
            return
        elif flags == MEM_SIZE:
            count.size = word & ~mask
            if layout.version >= 4:
                yield from _skip_list(cursor, count.size, layout, start)
        elif flags == HOOK:
            continue  # a mark of RDMA, with nothing after it
        elif flags == MULTIFD_FLUSH:
            raise StreamError(
                "the RAM travels over other connections (multifd), which a single stream cannot carry: "
                "turn the capability multifd off at the source",
                offset=start,
            )
        else:
            raise StreamError(
                f"the word {word:#018x} (flags {flags:#x}) is no record of the RAM section with pages of "
                f"{layout.page_size} bytes",
                offset=start,
            )


def _skip_page(cursor: Cursor, kind: int, layout: Layout, count: _Count) -> Steps[None]:
    if kind == PAGE:
        count.plain += 1
        yield from cursor.skip(layout.page_size, "a page of RAM")
    elif kind == FILLED:
        count.filled += 1
        yield from cursor.skip(1, "the byte that a page of RAM is filled with")
    elif kind == XBZRLE:
        count.compressed += 1
        yield from _skip_xbzrle(cursor, layout.page_size)
    else:
        count.compressed += 1
        start = cursor.offset
        length = yield from cursor.number(4, "the length of a compressed page")
        if not 0 < length <= 2 * layout.page_size:
            raise StreamError(f"a compressed page of {length} bytes is none", offset=start)
        yield from cursor.skip(length, "a compressed page")


def _skip_xbzrle(cursor: Cursor, page_size: int) -> Steps[None]:
    start = cursor.offset
    encoding = yield from cursor.number(1, "the encoding of an xbzrle page")
    length = yield from cursor.number(2, "the length of an xbzrle page")
    if encoding != 1 or length > page_size:
        raise StreamError(f"an xbzrle page with encoding {encoding} and {length} bytes is none", offset=start)
    yield from cursor.skip(length, "an xbzrle page")


def _skip_list(cursor: Cursor, total: int, layout: Layout, start: int) -> Steps[None]:
    """The blocks follow without a count: their lengths add up to the total."""
    left = total
    while left > 0:
        yield from cursor.string(1, f"a name in {_LIST}")
        left -= yield from cursor.number(8, f"a length in {_LIST}")
        if layout.ignore_shared:
            yield from cursor.skip(8, f"an address in {_LIST}")
    if left < 0:
        raise StreamError(f"the RAM blocks add up to {total - left} bytes, not to the {total} told", offset=start)
