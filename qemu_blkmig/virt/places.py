"""Where elements lie in an XML document, so that one may be changed and all else stays byte for byte: namespaces,
comments and the prefixes that people chose in <metadata>.
"""

from __future__ import annotations

from xml.parsers import expat


def places(xml: bytes, path: str) -> list[tuple[int, int]]:
    """Begin and end, in bytes, of the elements at `path`, such as domain/devices/disk, in UTF-8 `xml` that is sound.

    The element that they lie in has another name.
    """
    parser = expat.ParserCreate("utf-8")
    within: list[str] = []
    found: list[tuple[int, int]] = []
    begun = 0

    def begin(tag: str, _: dict[str, str]) -> None:
        nonlocal begun
        within.append(tag)
        if "/".join(within) == path:
            begun = parser.CurrentByteIndex

    def end(tag: str) -> None:
        if "/".join(within) == path:
            at = parser.CurrentByteIndex
            # Of an empty element (<a/>) expat tells the end, of others the begin of the end tag.
            found.append((begun, xml.index(b">", at) + 1 if xml.startswith(f"</{tag}".encode(), at) else at))
        within.pop()

    parser.StartElementHandler, parser.EndElementHandler = begin, end
    parser.Parse(xml, True)
    return found
