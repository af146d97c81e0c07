"""One NBD connection, driven by our own poll; hides libnbd's traps (FACTS.md, "NBD and libnbd").

Callbacks of libnbd only ever append to a list and retire the command; everything else happens in whoever polls.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import socket as socketlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qemu_blkmig import errors
from qemu_blkmig.nbd.address import X509, Address, Psk, UnixAddress, address_of
from qemu_blkmig.nbd.binding import libnbd

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
ANSWER = 30.0
"""Seconds in which a server must answer what is waited for; a flush may take any time."""
ASSUMED_REQUEST_LIMIT = 32 << 20
EXCHANGES = 4
"""Times there and back that a handshake takes, about: greeting, structured replies, meta contexts, the export."""
_AT_ONCE = 32
"""Times that what has arrived is read before others have their turn."""
STATUS_LIMIT = (4 << 30) - (4 << 20)
"""Most bytes in one block status query."""

Entries = list[tuple[int, int]]
"""Consecutive (length, flags) of one meta context."""


class Connection:
    """A handshaken connection; made by `connect`. Used by one thread at a time."""

    def __init__(self, module: Any, handle: Any, where: str, contexts: Sequence[str], round_trip: float) -> None:
        """`round_trip`: seconds there and back, about."""
        self._nbd = module
        self._handle = handle
        self.where = where
        self.round_trip = round_trip
        self.descriptor = int(handle.aio_get_fd())
        """The socket's, as long as the connection is not lost."""
        reading, writing = int(module.AIO_DIRECTION_READ), int(module.AIO_DIRECTION_WRITE)
        self._events = {
            reading: select.POLLIN,
            writing: select.POLLOUT,
            reading | writing: select.POLLIN | select.POLLOUT,
        }
        self.size: int = handle.get_size()
        self.contexts = frozenset(name for name in contexts if handle.can_meta_context(name))
        limit: int = handle.get_block_size(module.SIZE_MAXIMUM)
        self.request_limit = min(limit or ASSUMED_REQUEST_LIMIT, ASSUMED_REQUEST_LIMIT)
        self.flushes_for_all = bool(handle.can_flush() and handle.can_multi_conn())
        """Whether a flush holds for what was written on other connections, too."""
        self._whole_reads = bool(handle.can_df())
        self.minimum_block = max(1, int(handle.get_block_size(module.SIZE_MINIMUM)))

    @property
    def lost(self) -> bool:
        """Whether the peer is gone."""
        return bool(self._handle.aio_is_dead() or self._handle.aio_is_closed())

    def loss(self, why: str = "the connection broke") -> errors.ConnectionLost:
        """The error to raise when the peer is gone."""
        return errors.ConnectionLost(f"{self.where}: {why}")

    def read(self, into: memoryview, offset: int, completed: list[tuple[Any, int]], token: object) -> None:
        """Start reading `len(into)` bytes; later `(token, errno or 0)` is appended to `completed`.

        In one piece where the server can: QEMU 7.2 ends the connection when a read in pieces meets a bad sector.
        Raises `ConnectionLost`; then nothing was started.

        `into` goes to the binding as it is: 1.14 never lets go of what an `nbd.Buffer` holds.
        """
        retire = _retire(completed, token)
        if self._whole_reads:
            flags = self._nbd.CMD_FLAG_DF
            self._start(lambda: self._handle.aio_pread_structured(into, offset, _ignore_chunk, retire, flags))
        else:
            self._start(lambda: self._handle.aio_pread(into, offset, retire))

    def write(self, data: memoryview, offset: int, completed: list[tuple[Any, int]], token: object) -> None:
        """Start writing; see `read`."""
        self._start(lambda: self._handle.aio_pwrite(data, offset, _retire(completed, token)))

    def zero(self, offset: int, length: int, completed: list[tuple[Any, int]], token: object) -> None:
        """Start writing zeroes, by which the server may make holes; see `read`."""
        self._start(lambda: self._handle.aio_zero(length, offset, _retire(completed, token)))

    def status(self, offset: int, length: int, completed: list[tuple[Any, int]]) -> None:
        """Start a block status query (at most `STATUS_LIMIT` bytes); see `read`.

        The token is a mapping from meta context to the entries told of it; they may cover less than was asked for.
        """
        answer: dict[str, Entries] = {}

        def extents(context: str, _offset: int, entries: list[int], _error: Any) -> int:
            answer[context] = list(zip(entries[::2], entries[1::2], strict=True))
            return 0

        self._start(lambda: self._handle.aio_block_status(length, offset, extents, _retire(completed, answer)))

    def flush(self) -> int:
        """Make all completed writes stable; 0 or an errno. Raises `ConnectionLost`."""
        if self.lost:
            raise self.loss()
        if not self._handle.can_flush():
            return 0
        completed: list[tuple[Any, int]] = []
        self._start(lambda: self._handle.aio_flush(_retire(completed, None)))
        return self.wait(completed, limit=None)

    def read_now(self, into: memoryview, offset: int) -> int:
        """Read and wait; 0 or an errno. Raises `ConnectionLost`."""
        completed: list[tuple[Any, int]] = []
        self.read(into, offset, completed, None)
        return self.wait(completed)

    def wait(self, completed: list[tuple[Any, int]], count: int = 1, *, limit: float | None = ANSWER) -> int:
        """Drive the connection until `completed` has `count` entries; the first errno in it, or 0.

        Raises `ConnectionLost` after `limit` seconds, too: a guest may be paused for as long as this takes.
        """
        deadline = math.inf if limit is None else time.monotonic() + limit
        while len(completed) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                self.drop()
                raise self.loss(f"no answer within {limit:g} s")
            poller = select.poll()
            if self.register(poller):
                poller.poll(None if limit is None else left * 1000)
            self.drive()
        error = next((error for _token, error in completed if error), 0)
        if error and self.lost:
            raise self.loss()
        return error

    def register(self, poller: select.poll) -> bool:
        """Have `poller` watch for what the connection waits for; False if it is lost and waits for nothing."""
        direction: int = self._handle.aio_get_direction()
        if direction:
            poller.register(self.descriptor, self._events[direction])
        return bool(direction)

    def drive(self) -> None:
        """Do what the socket is ready for, without waiting. A loss shows in `lost` and in the completions.

        As long as more arrives meanwhile, within bounds: libnbd stops after each record of TLS, of 16 KiB.
        """
        try:
            for _ in range(_AT_ONCE):
                if not self._handle.poll(0):
                    return
        except self._nbd.Error as error:
            # After some, as POLLERR alone, libnbd leaves all as it is, and what is under way would never end.
            if not self.lost:
                log.warning("%s is given up: %s", self.where, error)
                self.drop()

    def close(self) -> None:
        """Disconnect; writes are only safe if they were flushed before. What is still under way is abandoned."""
        if not self.lost:
            try:
                self._handle.shutdown(self._nbd.SHUTDOWN_ABANDON_PENDING)
            except self._nbd.Error:
                return

    def drop(self) -> None:
        """Break the connection at once, as if the peer had gone: every request under way ends with ENOTCONN."""
        if not self.lost:
            with socketlib.socket(fileno=os.dup(self.descriptor)) as shared:
                shared.shutdown(socketlib.SHUT_RDWR)

    def _start(self, command: Callable[[], object]) -> None:
        try:
            command()
        except self._nbd.Error as error:
            raise self.loss(str(error)) from error


def connect(
    server: str | Path | Address, export: str, *, contexts: Sequence[str] = (), timeout: float = CONNECT_TIMEOUT
) -> Connection:
    """Connect to `export` of `server` (a path: a unix socket) and negotiate the meta `contexts` that it has.

    Raises `ConnectionLost` when nobody answers within `timeout` seconds, or the export or our TLS is refused;
    `Refused` when libnbd cannot do TLS.
    """
    module = libnbd()
    address = address_of(server)
    where = f"NBD export {export!r} on {address}"
    handle = module.NBD()
    handle.set_export_name(export)
    handle.set_pread_initialize(False)
    for name in contexts:
        handle.add_meta_context(name)
    began = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            _begin(handle, module, address, stack)
            _handshake(handle, module, began + timeout, where)
        return Connection(module, handle, where, contexts, (time.monotonic() - began) / EXCHANGES)
    except module.Error as error:
        raise errors.ConnectionLost(f"{where}: {error}") from error


def _begin(handle: Any, module: Any, address: Address, stack: contextlib.ExitStack) -> None:
    """Start connecting; what `stack` ends must last until the handshake is over."""
    if isinstance(address, UnixAddress):
        handle.aio_connect_unix(address.path)
        return
    if address.tls is not None and not handle.supports_tls():
        raise errors.Refused(
            "libnbd was built without TLS on this host",
            advice="install one that has it (Debian's does), or leave out --data: the way through ssh needs none",
        )
    match address.tls:
        case Psk(user=user, key=key):
            # In memory only: nothing of the key is left when this process ends.
            descriptor = os.memfd_create("blkmig-psk", os.MFD_CLOEXEC)
            stack.callback(os.close, descriptor)
            os.write(descriptor, f"{user}:{key}\n".encode())
            handle.set_tls(module.TLS_REQUIRE)
            handle.set_tls_psk_file(f"/proc/self/fd/{descriptor}")
            handle.set_tls_username(user)
        case X509(directory=directory):
            handle.set_tls(module.TLS_REQUIRE)
            handle.set_tls_certificates(directory)
            handle.set_tls_verify_peer(True)
    handle.aio_connect_tcp(address.host, str(address.port))


def _handshake(handle: Any, module: Any, deadline: float, where: str) -> None:
    while not handle.aio_is_ready():
        if handle.aio_is_dead() or handle.aio_is_closed():
            raise errors.ConnectionLost(f"{where}: the server refused the connection")
        left = deadline - time.monotonic()
        if left <= 0:
            raise errors.ConnectionLost(f"{where}: no answer in time")
        reading = handle.aio_get_direction() & module.AIO_DIRECTION_READ
        poller = select.poll()
        poller.register(handle.aio_get_fd(), select.POLLIN if reading else select.POLLOUT)
        if poller.poll(left * 1000):
            if reading:
                handle.aio_notify_read()
            else:
                handle.aio_notify_write()


def _ignore_chunk(_data: object, _offset: int, _status: int, _error: object) -> int:
    """What a structured reply is made of does not matter: the data lies in the buffer, errors end the request."""
    return 0


def _retire(completed: list[tuple[Any, int]], token: object) -> Callable[[Any], int]:
    def callback(error: Any) -> int:
        completed.append((token, int(error.value)))
        return 1

    return callback
