"""Sphinx's settings: `make docs` builds pages and man pages with it. Markdown is the source (myst-parser)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from manuals.parsers import programs
from qemu_blkmig import __version__

project = "qemu-blkmig"
copyright = "the authors of qemu-blkmig; GPL-2.0-or-later"
release = version = __version__
extensions = ["manuals.extension", "myst_parser"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
# Dashes in options stay dashes.
smartquotes = False
nitpicky = True
html_theme = "furo"
html_title = f"qemu-blkmig {version}"
html_show_sphinx = False
man_show_urls = True
man_pages = [
    ("man/qemu-blkmig.1", "qemu-blkmig", "move a running QEMU guest with its local disks", "", 1),
    ("man/virsh-blkmigrate.1", "virsh-blkmigrate", "move a domain of libvirt with its local disks", "", 1),
    ("man/qemu-blkmig-hooks.5", "qemu-blkmig-hooks", "what libvirt's hook refuses, and by which files", "", 5),
]
# The page of a command that setup.cfg does not install (yet) tells of nothing.
_lacking = [page for page, name, _, _, section in man_pages if section == 1 and name not in programs()]
man_pages = [entry for entry in man_pages if entry[0] not in _lacking]
exclude_patterns = [f"{page}.md" for page in _lacking]
