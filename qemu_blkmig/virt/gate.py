"""The switchover gate: a relay in libvirt's migration stream that withholds the stream's end until the disks are equal.

The source QEMU connects to us, we connect to the destination QEMU. What the source sends is passed on, but for its
last `WITHHELD` bytes: without them the destination cannot finish, so the guest, paused at the source by then, runs
nowhere until `open` lets them through; `drop` breaks the stream off instead, and libvirt resumes the guest at the
source (FACTS.md, "The switchover gate works"). What the destination answers is passed on at once.

Once the stream's end has come, and is recognised as that, only the end mark and what is behind it are withheld: the
destination loads what is before while the last round is copied, not when the gate opens.

The first `PREAMBLE` bytes of a connection are passed on at once as well: a TLS handshake waits for its answers.
Threads do it, two a connection, so that gigabytes of RAM do not stand in the way of the event loop.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
from collections.abc import Callable

from qemu_blkmig.virt.stream_end import DESCRIPTION_LIMIT, ending

log = logging.getLogger(__name__)

WITHHELD = 4 << 20
"""Bytes: more than the device state's description, the last thing in a stream, behind which its end is told."""
PREAMBLE = 32 << 10
"""Bytes: a TLS handshake, and less than the device state of the smallest guest and its description take."""
BLOCK = 1 << 20
"""Bytes moved at once."""

Connect = Callable[[], socket.socket]


class Gate:
    """Relays every connection that `listener` gets to one that `connect` makes; closed until `open`.

    Until `admit` just the first bytes pass: what the two ends need to agree upon, but hardly any RAM. No more is taken
    in, either: a source that has sent all of a small guest's RAM pauses it.

    `connect` is called in a thread, may block, and raises `OSError` when the destination cannot be reached.
    """

    def __init__(self, listener: socket.socket, connect: Connect) -> None:
        self._listener = listener
        self._connect = connect
        self._lock = threading.Lock()
        self._lines: list[_Line] = []
        self._threads: list[threading.Thread] = []
        self._admitted = self._opened = self._dropped = False
        self._wake, self._waker = socket.socketpair()
        # Who came may be gone before it is accepted, and then there is nobody to wait for.
        listener.setblocking(False)
        self._start(self._accept, "gate")

    @property
    def withheld(self) -> int:
        """Bytes that have arrived and wait for the gate to open."""
        with self._lock:
            return sum(line.held for line in self._lines)

    @property
    def passed(self) -> int:
        """Bytes that have gone to the destination."""
        with self._lock:
            return sum(line.passed for line in self._lines)

    @property
    def failure(self) -> OSError | None:
        """Why the destination could not be reached or a connection broke, if so."""
        with self._lock:
            return next((line.failure for line in self._lines if line.failure is not None), None)

    def admit(self) -> None:
        """Let all through, now and from now on, but for what is withheld until the gate is open."""
        with self._lock:
            self._admitted = True
            lines = list(self._lines)
        for line in lines:
            line.admit()

    def open(self) -> None:
        """Let everything through, now and from now on. Does nothing once dropped."""
        with self._lock:
            self._opened = not self._dropped
            lines = list(self._lines) if self._opened else []
        for line in lines:
            line.open()

    def drop(self) -> None:
        """Break every connection off, and take no more; nothing that is withheld reaches the destination."""
        with self._lock:
            self._dropped = True
            lines = list(self._lines)
        self._waker.send(b"x")
        for line in lines:
            line.drop()

    def close(self) -> None:
        """`drop`, and wait until nothing is moved any more."""
        self.drop()
        for thread in self._threads:
            thread.join()
        self._wake.close()
        self._waker.close()

    def _start(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            ready, _, _ = select.select([self._listener, self._wake], [], [])
            if self._wake in ready:
                # Whoever comes too late, or is not accepted yet, must not wait for ever.
                self._listener.close()
                return
            try:
                incoming, _ = self._listener.accept()
            except OSError as error:
                log.debug("a connection that came to nothing: %s", error)
                continue
            self._relay(incoming)

    def _relay(self, incoming: socket.socket) -> None:
        with self._lock:
            line = _Line(incoming)
            self._lines.append(line)
            if self._admitted:
                line.admit()
            if self._opened:
                line.open()
            if self._dropped:
                line.drop()
        self._start(lambda: line.run(self._connect), "gate line")


class _Line:
    """One connection through the gate."""

    def __init__(self, incoming: socket.socket) -> None:
        self.failure: OSError | None = None
        self.passed = 0
        self._incoming = incoming
        self._outgoing: socket.socket | None = None
        self._ring = memoryview(bytearray(WITHHELD + BLOCK))
        self._start = self._length = 0
        self._withheld = WITHHELD
        self._admitted = self._open = self._dropped = False
        self._lock = threading.Lock()
        self._wake, self._waker = socket.socketpair()

    @property
    def held(self) -> int:
        """Bytes that wait."""
        return self._length

    def admit(self) -> None:
        """See `Gate.admit`."""
        self._admitted = True
        self._nudge()

    def open(self) -> None:
        """See `Gate.open`."""
        self._open = True
        self._nudge()

    def drop(self) -> None:
        """See `Gate.drop`; also wakes whoever is blocked in a socket."""
        with self._lock:
            self._dropped = True
            for end in (self._incoming, self._outgoing):
                if end is not None:
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)
        self._nudge()

    def run(self, connect: Connect) -> None:
        """Carry both directions until both have ended."""
        back = None
        try:
            if self._dropped:
                return
            outgoing = connect()
            with self._lock:
                self._outgoing = outgoing
            if self._dropped:
                return
            back = threading.Thread(target=self._carry_back, args=(outgoing,), name="gate back", daemon=True)
            back.start()
            self._carry(outgoing)
        except OSError as error:
            self.failure = None if self._dropped else error
            self.drop()
        finally:
            if back is not None:
                back.join()
            for end in (self._incoming, self._outgoing, self._wake):
                if end is not None:
                    end.close()

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):
            self._waker.send(b"x")

    def _carry(self, outgoing: socket.socket) -> None:
        """To the destination: all but what is withheld; once open, all, and the end of the stream."""
        ended = False
        while not (self._dropped or (ended and self._open and not self._length)):
            full = not self._room()
            watched = [self._wake] if ended or full else [self._incoming, self._wake]
            ready, _, _ = select.select(watched, [], [])
            if self._wake in ready:
                self._wake.recv(64)
            if self._incoming in ready:
                ended = not self._take_in()
            self._pass_on(outgoing)
        if ended and not self._dropped:
            outgoing.shutdown(socket.SHUT_WR)

    def _take_in(self) -> bool:
        """Read what there is into the ring; False at the end of the stream."""
        size = len(self._ring)
        at = (self._start + self._length) % size
        room = min(size - at, self._room())
        count = self._incoming.recv_into(self._ring[at : at + room])
        self._length += count
        if count:
            self._withheld = (ending(self._tail()) if self._ring[at + count - 1] == ord("}") else None) or WITHHELD
        return count > 0

    def _room(self) -> int:
        """Bytes that may be taken in now; until there is any the source has to wait."""
        if self._admitted or self._open:
            return len(self._ring) - self._length
        return max(0, PREAMBLE - self.passed - self._length)

    def _tail(self) -> bytes:
        """The last of what is held, as much as may be a stream's end."""
        end = self._start + self._length
        start, size = max(self._start, end - DESCRIPTION_LIMIT), len(self._ring)
        if start < size < end:
            return bytes(self._ring[start:]) + bytes(self._ring[: end - size])
        return bytes(self._ring[start % size : (end - 1) % size + 1])

    def _pass_on(self, outgoing: socket.socket) -> None:
        while (due := self._due()) and not self._dropped:
            part = self._ring[self._start : self._start + min(due, len(self._ring) - self._start)]
            count = outgoing.send(part)
            self._start = (self._start + count) % len(self._ring)
            self._length -= count
            self.passed += count

    def _due(self) -> int:
        """Bytes that may go on now."""
        if self._open:
            return self._length
        beyond = self._length - self._withheld if self._admitted else 0
        return max(beyond, min(self._length, PREAMBLE - self.passed), 0)

    def _carry_back(self, outgoing: socket.socket) -> None:
        """What the destination answers. When it hangs up, so do we: the source learns of it at once."""
        buffer = bytearray(BLOCK)
        view = memoryview(buffer)
        try:
            while count := outgoing.recv_into(buffer):
                self._incoming.sendall(view[:count])
            if not (self._admitted or self._open):
                # The source may be waiting for us to take more, and would not look.
                self.drop()
            self._incoming.shutdown(socket.SHUT_WR)
        except OSError as error:
            if not self._dropped:
                self.failure = error
            self.drop()
