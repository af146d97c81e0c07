"""A real libvirt that needs no daemon: its own test driver."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator

import pytest

from qemu_blkmig.virt.connection import Connection, libvirt

URI = "test:///default"


@pytest.fixture
async def daemonless() -> AsyncIterator[Connection]:
    """A libvirt with a running domain `test`, a network `default` and a pool `default-pool`; each is its own."""
    # It knows no keep-alive, which `Connection.open` asks for.
    libvirt().registerErrorHandler(lambda _context, _error: None, None)
    connection = Connection(libvirt().open(URI), URI, "libvirt")
    yield connection
    await connection.close()
    # What a call that failed leaves in cycles refers to it, and whoever connects next would get the same one.
    gc.collect()
