"""A Sphinx extension: pages get what their comments ask for (`manuals.pages`) before they are read."""

from __future__ import annotations

from sphinx.application import Sphinx

from manuals.pages import MARK, filled


def setup(app: Sphinx) -> dict[str, object]:
    """What Sphinx calls first."""
    app.connect("source-read", _fill)
    app.connect("env-before-read-docs", _read_again)
    return {"version": "1", "parallel_read_safe": True}


def _fill(_app: Sphinx, _name: str, source: list[str]) -> None:
    source[0] = filled(source[0])


def _read_again(app: Sphinx, _environment: object, names: list[str]) -> None:
    """A page that is made from the code is never taken for unchanged."""
    for name in app.env.found_docs:
        if name not in names and MARK.search(app.env.doc2path(name).read_text()):
            names.append(name)
