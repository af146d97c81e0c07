"""Serves a job's report on this host's loopback while the job runs; the page asks for itself anew."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from qemu_blkmig.errors import BlkmigError, Refused
from qemu_blkmig.job.status import BUSY, RUNNING
from qemu_blkmig.observe.report.material import gather
from qemu_blkmig.observe.report.page import render

HOST = "127.0.0.1"
FRESH = 0.5
"""Seconds that a page is good for: many readers cost no more than one."""
LOOK = 0.5
"""Seconds between two looks whether the job is over."""
FAREWELL = 5.0
"""Seconds that the page is served when the job is over: whoever has it open gets its last state."""
PATIENCE = 10.0
"""Seconds in which a client must say what it wants."""


class LiveReport:
    """The report of one job at `url`. Threads of its own answer; between `start` and `close`."""

    def __init__(self, job: str, port: int) -> None:
        """`port` 0: any that is free. Raises `Refused`."""
        self._job = job
        self._lock = threading.Lock()
        self._made = 0.0
        self._page = b""
        self.over = False
        try:
            self._server = _Server((HOST, port), self.page)
        except OSError as error:
            raise Refused(f"port {port} of {HOST} cannot be listened on: {error.strerror}") from error
        self.url = f"http://{HOST}:{self._server.server_address[1]}/"

    def start(self) -> None:
        """Serve from now on."""
        threading.Thread(target=self._server.serve_forever, name="report", daemon=True).start()

    def wait(self) -> None:
        """Return when the job is over, or rests, and whoever reads has had the time to see that."""
        while True:
            self.page()
            if self.over:
                time.sleep(FAREWELL)
                return
            time.sleep(LOOK)

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()

    def page(self) -> bytes:
        """The page as it is now. Raises what `gather` raises."""
        with self._lock:
            if time.monotonic() - self._made > FRESH:
                material = asyncio.run(gather(self._job))
                self._page = render(material, live=True).encode()
                self._made = time.monotonic()
                self.over = material.status.state not in (RUNNING, BUSY)
            return self._page


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], page: Callable[[], bytes]) -> None:
        super().__init__(address, _Handler)
        self.page = page


class _Handler(BaseHTTPRequestHandler):
    """Answers GET / to whoever asks by a name of the loopback: another one's page may lead a browser here."""

    server: _Server
    timeout = PATIENCE
    server_version = "qemu-blkmig"
    sys_version = ""

    def do_GET(self) -> None:
        """The page."""
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        if self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            page = self.server.page()
        except BlkmigError as error:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *values: object) -> None:
        """Nobody reads that."""
