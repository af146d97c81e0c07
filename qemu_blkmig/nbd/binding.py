"""Finds libnbd's Python binding, the one module called `nbd` that is ours to use."""

from __future__ import annotations

import importlib
import socket
from typing import Any

from qemu_blkmig import errors

_ADVICE = (
    "install Debian's python3-libnbd, and make the virtual environment from /usr/bin/python3 with "
    "--system-site-packages; the package `nbd` on PyPI is another thing"
)


def libnbd() -> Any:
    """The binding's module.

    Raises `Refused` when it is missing, or when PyPI's unrelated `nbd` stands in its place (FACTS.md,
    "NBD and libnbd 1.14 from Python").
    """
    try:
        module = importlib.import_module("nbd")
    except ImportError as error:
        what = f"libnbd's Python binding cannot be loaded on {socket.gethostname()} ({error})"
        raise errors.Refused(what, advice=_ADVICE) from error
    if not (hasattr(module, "NBD") and hasattr(module, "CONTEXT_BASE_ALLOCATION")):
        raise errors.Refused(f"{module.__file__} is not libnbd's Python binding", advice=_ADVICE)
    return module
