"""Where a job's metrics are read: a file for node_exporter's textfile collector, an address that Prometheus asks.

Either is tried before the job begins; what fails later is told, and never does the job harm or holds it up.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import socketserver
import stat
import tempfile
import threading
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from qemu_blkmig.errors import Refused
from qemu_blkmig.observe.metrics import LAST_FAILURE, LAST_SUCCESS, PREFIX, Metrics

log = logging.getLogger(__name__)

INTERVAL = 5.0
"""Seconds between two versions of the file."""
END = 5.0
"""Seconds that the last one is waited for: its disk may hang."""
POLL = 0.1
"""Seconds after which the end is seen by what answers at the address."""
MOST = 1 << 20
"""Bytes that a file of ours does not reach."""
READABLE = 0o644
"""The file's mode: another user's node_exporter reads it."""


def last_times(path: Path, source: str) -> tuple[float | None, float | None]:
    """When a job of `source` last went well, and when one failed, by the file that an earlier one left at `path`.

    Raises `Refused` if what is there is not ours to be replaced.
    """
    try:
        if not path.exists():
            return None, None
        if not stat.S_ISREG(path.stat().st_mode):
            raise Refused(f"--metrics-file {path} is no regular file")
        with path.open("rb") as file:
            text = file.read(MOST).decode(errors="replace")
    except OSError as error:
        raise Refused(f"--metrics-file {path} cannot be read: {error.strerror}") from error
    if text.strip() and not text.startswith(f"# HELP {PREFIX}"):
        raise Refused(f"--metrics-file {path} is there, and holds something else", advice="name another file")
    found: dict[str, float] = {}
    # A damaged one tells nothing, and is replaced.
    with contextlib.suppress(ValueError):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("source") == source:
                    found[sample.name] = sample.value
    return found.get(f"{PREFIX}{LAST_SUCCESS}"), found.get(f"{PREFIX}{LAST_FAILURE}")


class Export:
    """Keeps the file and answers at the address, each in a thread of its own. `complaints` are to be told."""

    def __init__(self, metrics: Metrics, file: Path | None, listen: tuple[str, int] | None) -> None:
        """Raises `Refused` if the file cannot be written, or nobody may listen there."""
        self.complaints: deque[str] = deque()
        self.address: tuple[str, int] | None = None
        self._registry = CollectorRegistry()
        self._registry.register(metrics)
        self._file = file
        self._ailing = False
        self._ending = threading.Event()
        self._server: _Server | None = None
        self._writer: threading.Thread | None = None
        if file is not None:
            try:
                self._replace(file)
            except OSError as error:
                raise Refused(f"--metrics-file {file} cannot be written: {error.strerror}") from error
        if listen is not None:
            self._listen(*listen)
        if file is not None:
            self._writer = threading.Thread(target=self._keep, args=(file,), name="metrics file", daemon=True)
            self._writer.start()

    def __enter__(self) -> Export:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write the file for the last time, and answer no more; blocks for some seconds at most. Safe to call twice."""
        self._ending.set()
        if self._writer is not None:
            self._writer.join(END)
            self._writer = None
        if self._server is not None:
            # It waits for a request under way, and whoever asks may take their time.
            ending = threading.Thread(target=self._server.shutdown, name="end of metrics", daemon=True)
            ending.start()
            ending.join(1.0)
            self._server.server_close()
            self._server = None

    def _listen(self, host: str, port: int) -> None:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._server = _Server(family, address, MetricsHandler.factory(self._registry))
        except OSError as error:
            raise Refused(f"--metrics-listen {host}:{port} is not possible: {error.strerror}") from error
        self.address = self._server.socket.getsockname()[:2]
        threading.Thread(target=self._server.serve_forever, args=(POLL,), name="metrics", daemon=True).start()

    def _keep(self, file: Path) -> None:
        ended = False
        while not ended:
            ended = self._ending.wait(INTERVAL)
            self.renew(file)

    def renew(self, file: Path) -> None:
        """Write the file; that it cannot be written is told once, until it can be again."""
        try:
            self._replace(file)
            if self._ailing:
                self.complaints.append("the metrics can be written again")
            self._ailing = False
        except Exception as error:
            if not self._ailing:
                self.complaints.append(f"the metrics cannot be written to {file} ({error}): what it holds is old")
            self._ailing = True

    def _replace(self, file: Path) -> None:
        """Put a new file in the place of the old one: whoever reads has the whole of either. Raises `OSError`."""
        file = file.resolve()
        text = generate_latest(self._registry)
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        new = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(text)
            new.chmod(READABLE)
            new.replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink()
            raise


class _Server(socketserver.TCPServer):
    """One request at a time, and none for long: whoever asks us costs the job next to nothing."""

    allow_reuse_address = True

    def __init__(self, family: socket.AddressFamily, address: Any, handler: type[MetricsHandler]) -> None:
        self.address_family = family
        super().__init__(address, type("_Handler", (handler,), {"timeout": 2.0}))

    def handle_error(self, request: object, client_address: object) -> None:
        """Somebody went away, or spoke no HTTP; nobody else has to know."""
        log.debug("asked for metrics by %s", client_address, exc_info=True)
