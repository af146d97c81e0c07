"""What a stream comes from or goes to: a file, an inherited descriptor, a command's pipe, a socket. Blocking.

Whatever blocks also watches a `Control`, so that another thread can cancel it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from fcntl import F_SETPIPE_SZ, fcntl
from pathlib import Path

from qemu_blkmig.errors import ConnectionLost, Refused, UsageError
from qemu_blkmig.nbd.control import Cancelled, Control

Bytes = bytes | memoryview

PIPE = 1 << 20
"""Bytes that a pipe is to hold, where the system lets it."""
FORMS = "file:PATH, fd:NUMBER, exec:COMMAND, unix:PATH or tcp:HOST:PORT"
SOCKETS = ("unix", "tcp")

_MOST_DESCRIPTOR = (1 << 31) - 1
_MOST_PORT = 65535
_END = 30.0
_MOST_PIECES = 1024
"""That Linux takes in one call (IOV_MAX)."""
_MULTIFD = (0x11223344).to_bytes(4, "big")
"""What a further connection of a source begins with, if it is to carry RAM (QEMU's migration/multifd.h)."""
_INTRODUCTION = 1.0
"""Seconds in which whoever makes a further connection must have said so."""


class Listener:
    """Where a source connects to. It goes on listening after the first connection, to tell what a further one means."""

    def __init__(self, kind: str, place: str) -> None:
        """Raises `OSError`."""
        self._path = Path(place) if kind == "unix" else None
        self._socket = _listening(kind, place)
        self._socket.setblocking(False)
        if kind == "tcp":
            place = f"{place.rpartition(':')[0]}:{self._socket.getsockname()[1]}"
        self.where = f"{kind}:{place}"

    @property
    def descriptor(self) -> int:
        """Readable when somebody connects; -1 when nobody can any more."""
        return self._socket.fileno()

    def accept(self) -> int:
        """A connection, for the caller to close."""
        return self._socket.accept()[0].detach()

    def explain_another(self) -> None:
        """Somebody has connected once more. Raises `Refused` if it is the source, whose RAM comes that way."""
        with contextlib.suppress(OSError), self._socket.accept()[0] as another:
            another.settimeout(_INTRODUCTION)
            if another.recv(len(_MULTIFD), socket.MSG_WAITALL) == _MULTIFD:
                raise Refused(
                    "the source's RAM comes over connections of its own (multifd), which a single stream cannot "
                    "carry: turn its capability multifd off",
                )
        self.close()

    def close(self) -> None:
        """Listen no more. Harmless when repeated."""
        if self._path is not None and self.descriptor >= 0:
            self._path.unlink(missing_ok=True)
        self._socket.close()


class Channel:
    """One open end of a stream; `where` is how the user named it. It owns its descriptor, and its listener."""

    def __init__(
        self,
        where: str,
        descriptor: int,
        process: subprocess.Popen[bytes] | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.where = where
        self.descriptor = descriptor
        self._listener = listener
        mode = os.fstat(descriptor).st_mode
        self.is_file = stat.S_ISREG(mode)
        self.is_socket = stat.S_ISSOCK(mode)
        self._can_block = self.is_file or stat.S_ISBLK(mode)
        self._process = process
        if stat.S_ISFIFO(mode):
            with contextlib.suppress(OSError):
                fcntl(descriptor, F_SETPIPE_SZ, PIPE)

    def read(self, into: memoryview, control: Control) -> int:
        """Wait for bytes and read them; 0 at the end. Raises `ConnectionLost`, `Cancelled`."""
        self._wait_input(control)
        try:
            return os.readv(self.descriptor, [into])
        except OSError as error:
            raise ConnectionLost(f"{self.where} cannot be read: {error.strerror}") from error

    def register(self, poller: select.poll) -> None:
        """Let `poller` wake up when there is something for `has_input` to judge."""
        poller.register(self.descriptor, select.POLLIN)
        if self._listener is not None and self._listener.descriptor >= 0:
            poller.register(self._listener.descriptor, select.POLLIN)

    def has_input(self, ready: Mapping[int, int]) -> bool:
        """Whether, by what the poller told, there is something to read. Raises `Refused` if there never will be."""
        if self._listener is not None and self._listener.descriptor in ready:
            self._listener.explain_another()
        return self.descriptor in ready

    def write(self, pieces: Sequence[Bytes], control: Control) -> None:
        """Write all of the pieces, one after the other, with as few system calls as the channel allows.

        Raises `ConnectionLost` when the reader is gone or the disk is full, `Cancelled`.
        """
        left = [memoryview(piece) for piece in pieces]
        while left:
            self._wait_output(control)
            try:
                left = _after(left, self._write_some(left[:_MOST_PIECES]))
            except BlockingIOError:
                continue
            except OSError as error:
                raise ConnectionLost(f"{self.where} cannot be written: {error.strerror}") from error

    def end_writing(self) -> None:
        """Tell the peer of a socket that nothing more is written to it; it may be gone already."""
        with _as_socket(self.descriptor) as peer, contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_WR)

    def sync(self) -> None:
        """Make what was written to a file stable; elsewhere nothing can be done. Raises `ConnectionLost`."""
        if self.is_file:
            try:
                os.fsync(self.descriptor)
            except OSError as error:
                raise ConnectionLost(f"{self.where} cannot be flushed: {error.strerror}") from error

    def finish(self) -> None:
        """Close, after all went well; waits for a command to end. Raises `ConnectionLost` if the command failed."""
        self._close()
        if self._process is None:
            return
        try:
            status = self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self.abandon()
            raise ConnectionLost(f"{self.where} did not end within {_END:.0f} s after the stream had") from None
        if status:
            raise ConnectionLost(f"{self.where} ended with status {status}")

    def abandon(self) -> None:
        """Close, after something went wrong; a command is ended. Safe to call after `finish`."""
        self._close()
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _write_some(self, views: Sequence[memoryview]) -> int:
        if self.is_socket:
            with _as_socket(self.descriptor) as peer:
                return peer.sendmsg(views, [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        return os.writev(self.descriptor, views)

    def _wait_input(self, control: Control) -> None:
        if self._goes_on_by_itself(control):
            return
        poller = select.poll()
        self.register(poller)
        while not self.has_input(_await(poller, control)):
            poller = select.poll()
            self.register(poller)

    def _wait_output(self, control: Control) -> None:
        if not self._goes_on_by_itself(control):
            _wait_for(self.descriptor, select.POLLOUT, control)

    def _goes_on_by_itself(self, control: Control) -> bool:
        """Whether reading and writing need no waiting for."""
        if self._can_block and control.cancelled:
            raise Cancelled
        return self._can_block


def check(text: str) -> tuple[str, str]:
    """(kind, place) of what the user wrote. Raises `UsageError`."""
    kind, colon, place = text.partition(":")
    if kind not in ("file", "fd", "exec", "unix", "tcp") or not colon or not place:
        raise UsageError(f"{text!r} names no stream", advice=f"write {FORMS}")
    if kind == "fd" and not _is_number(place, _MOST_DESCRIPTOR):
        raise UsageError(f"{text!r}: a descriptor is a number")
    if kind == "tcp" and not _is_number(place.rpartition(":")[2], _MOST_PORT):
        raise UsageError(f"{text!r}: a port, up to {_MOST_PORT}, is missing", advice="write tcp:HOST:PORT")
    return kind, place


def _is_number(text: str, most: int) -> bool:
    return text.isascii() and text.isdecimal() and int(text) <= most


def open_source(text: str, control: Control, tell: Callable[[str], None]) -> Channel:
    """Where a stream comes from; on unix: and tcp: one connection is waited for, and `tell` is told so.

    Raises `Refused`, `UsageError`, `Cancelled`.
    """
    kind, place = check(text)
    with _refusing(text):
        if kind == "file":
            return Channel(text, _readable(place))
        if kind == "fd":
            return Channel(text, os.dup(int(place)))
        if kind == "exec":
            process = _run(place, stdin=None, stdout=subprocess.PIPE)
            return Channel(text, _pipe_of(process), process)
        listener = Listener(kind, place)
        try:
            tell(f"waiting for a connection on {listener.where}")
            _wait_for(listener.descriptor, select.POLLIN, control)
            return Channel(text, listener.accept(), listener=listener)
        except BaseException:
            listener.close()
            raise


def open_target(text: str) -> Channel:
    """Where a stream goes to; a file must not be there yet. Raises `Refused`, `UsageError`."""
    kind, place = check(text)
    with _refusing(text):
        if kind == "file":
            return Channel(text, os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if kind == "fd":
            return Channel(text, _unblocking(os.dup(int(place))))
        if kind == "exec":
            process = _run(place, stdin=subprocess.PIPE, stdout=None)
            descriptor = _pipe_of(process)
            os.set_blocking(descriptor, False)
            return Channel(text, descriptor, process)
        return Channel(text, _connected(kind, place).detach())


def _readable(place: str) -> int:
    """A file, or a FIFO whose writer is still to come: for that a cancellable poll waits, not the opening."""
    descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(descriptor, True)
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return descriptor


@contextlib.contextmanager
def _refusing(text: str) -> Iterator[None]:
    """Turns an `OSError` of opening into a `Refused`."""
    try:
        yield
    except OSError as error:
        raise Refused(f"{text} cannot be opened: {error.strerror or error}") from error


def _run(command: str, *, stdin: int | None, stdout: int | None) -> subprocess.Popen[bytes]:
    """A session of its own: Ctrl-C is for us to pass on."""
    return subprocess.Popen(["/bin/sh", "-c", command], stdin=stdin, stdout=stdout, start_new_session=True)


def _pipe_of(process: subprocess.Popen[bytes]) -> int:
    """Our end of the command's pipe, for us to close."""
    pipe = process.stdin or process.stdout
    if pipe is None:
        raise RuntimeError("the command has no pipe")
    with pipe:
        return os.dup(pipe.fileno())


def _listening(kind: str, place: str) -> socket.socket:
    if kind == "tcp":
        host, _, port = place.rpartition(":")
        return socket.create_server((host.strip("[]"), int(port)), family=_family(host))
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(place)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _connected(kind: str, place: str) -> socket.socket:
    if kind == "tcp":
        host, _, port = place.rpartition(":")
        peer = socket.create_connection((host.strip("[]"), int(port)), timeout=_END)
        peer.settimeout(None)
        return peer
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.connect(place)
    except OSError:
        peer.close()
        raise
    return peer


def _after(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of the views after the first `count` bytes."""
    for number, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[number + 1 :]]
        count -= len(view)
    return []


def _unblocking(descriptor: int) -> int:
    """Our own open file of an inherited pipe, whose O_NONBLOCK is not shared with whoever gave it to us."""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return descriptor
    own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.close(descriptor)
    return own


@contextlib.contextmanager
def _as_socket(descriptor: int) -> Iterator[socket.socket]:
    peer = socket.socket(fileno=descriptor)
    try:
        yield peer
    finally:
        peer.detach()


def _wait_for(descriptor: int, events: int, control: Control) -> None:
    """Wait until the descriptor is ready or its peer is gone. Raises `Cancelled`."""
    poller = select.poll()
    poller.register(descriptor, events)
    while descriptor not in _await(poller, control):
        pass


def _await(poller: select.poll, control: Control) -> dict[int, int]:
    """What is ready. Raises `Cancelled`."""
    poller.register(control.wake, select.POLLIN)
    ready = dict(poller.poll())
    if control.cancelled:
        raise Cancelled
    return ready
