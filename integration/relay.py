"""A line that is long: forwards TCP connections, every piece of data so many seconds late, and no slower than it can.

python -m integration.relay PORT HOST PORT SECONDS     # says "ready" once it listens
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections import deque

PIECE = 256 << 10
MOST = 64 << 20
"""Bytes that may be on the line in one direction; a line of 20 ms carries 3 GiB/s with it."""


class Direction:
    """Forwards what comes from `source` to `destination`, by a thread for each end of the line."""

    def __init__(self, source: socket.socket, destination: socket.socket, delay: float) -> None:
        self._source = source
        self._destination = destination
        self._delay = delay
        self._late: deque[tuple[float, bytes]] = deque()
        self._held = 0
        self._changed = threading.Condition()
        self.threads = [threading.Thread(target=each, daemon=True) for each in (self._take, self._give)]

    def _take(self) -> None:
        data = b"begun"
        while data:
            try:
                data = self._source.recv(PIECE)
            except OSError:
                data = b""
            with self._changed:
                self._changed.wait_for(lambda: self._held < MOST)
                self._late.append((time.monotonic() + self._delay, data))
                self._held += len(data)
                self._changed.notify_all()

    def _give(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._late)
                    when = self._late[0][0]
                # Not for nothing: even that gives the CPU to whoever waits for it.
                if (early := when - time.monotonic()) > 0:
                    time.sleep(early)
                data, over = self._due()
                self._destination.sendall(data)
                with self._changed:
                    self._held -= len(data)
                    self._changed.notify_all()
                if over:
                    break
        with contextlib.suppress(OSError):
            self._destination.shutdown(socket.SHUT_WR)
        with self._changed:
            # Nobody takes what comes now: whoever sends is told.
            self._held = 0
            self._changed.notify_all()

    def _due(self) -> tuple[bytes, bool]:
        """All that has been on the line for long enough, and whether nothing comes after it."""
        pieces: list[bytes] = []
        now = time.monotonic()
        with self._changed:
            while self._late and self._late[0][0] <= now and sum(map(len, pieces)) < PIECE:
                pieces.append(self._late.popleft()[1])
        return b"".join(pieces), b"" in pieces


def serve(end: socket.socket, host: str, port: int, delay: float) -> None:
    """Connect to the other end, and forward until both directions are over."""
    with end, contextlib.suppress(OSError), socket.create_connection((host, port)) as there:
        for each in (end, there):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threads = [*Direction(end, there, delay).threads, *Direction(there, end, delay).threads]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main() -> None:
    """The command."""
    port, host, leads_to, delay = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    with socket.create_server(("", port)) as listener:
        print("ready", flush=True)
        while True:
            end, _ = listener.accept()
            threading.Thread(target=serve, args=(end, host, leads_to, delay), daemon=True).start()


if __name__ == "__main__":
    main()
