"""Who watches a job: the display, and the metrics where they are asked for."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qemu_blkmig.errors import BlkmigError, Interrupted
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.observe.asked import Asked
from qemu_blkmig.observe.progress import progress

if TYPE_CHECKING:
    from collections import deque

    from qemu_blkmig.engine.migration import Figures
    from qemu_blkmig.job.result import Result
    from qemu_blkmig.observe.metrics import Metrics

log = logging.getLogger(__name__)


class Watch:
    """A display, and nothing else. `reporter` is for the job; the rest is told by who runs it."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter: Reporter = reporter

    def failed(self, error: BlkmigError) -> None:
        """An attempt has failed, and another one follows."""

    def done(self, result: Result) -> None:
        """What was done."""


class MeasuredWatch(Watch):
    """A display and metrics."""

    def __init__(self, display: Reporter, metrics: Metrics, complaints: deque[str]) -> None:
        self.reporter: Counting = Counting(display, metrics, complaints)
        self._metrics = metrics

    def failed(self, error: BlkmigError) -> None:
        """Counted."""
        self.reporter.count(lambda: self._metrics.failed(error))

    def done(self, result: Result) -> None:
        """How long the guest stood still is known now."""
        self.reporter.count(lambda: self._metrics.paused(result.downtime))

    def ended(self, error: BlkmigError | None) -> None:
        """It is over."""
        self.reporter.count(lambda: self._metrics.ended(error))


class Counting:
    """Implements `Reporter`: passes everything on, and has it counted. What goes wrong with that is told, once."""

    def __init__(self, display: Reporter, metrics: Metrics, complaints: deque[str]) -> None:
        self._display = display
        self._metrics = metrics
        self._complaints = complaints
        self._broken = False

    def job(self, name: str) -> None:
        """The job's name."""
        self._display.job(name)
        self.count(lambda: self._metrics.job(name))

    def limits(self, downtime: float, rate: int | None) -> None:
        """The limits in force."""
        self._display.limits(downtime, rate)
        self.count(lambda: self._metrics.limits(downtime, rate))

    def stage(self, name: str) -> None:
        """A phase begins."""
        self._display.stage(name)
        self.count(lambda: self._metrics.stage(name))

    def figures(self, figures: Figures) -> None:
        """The engine's figures changed."""
        self._display.figures(figures)
        self.count(lambda: self._metrics.figures(figures))

    def moving(self, disk: str, settled: int) -> None:
        """Bytes settled in the copy under way."""
        self._display.moving(disk, settled)
        self.count(lambda: self._metrics.moving(disk, settled))

    def note(self, text: str) -> None:
        """Something the user should know."""
        self._display.note(text)

    def count(self, counted: Callable[[], None]) -> None:
        """Have it counted, and tell what other threads complained of meanwhile."""
        if not self._broken:
            try:
                counted()
            except Exception as error:
                log.debug("metrics", exc_info=True)
                self._broken = True
                self._complaints.append(f"the metrics are not kept any more, by a defect: {error!r}")
        self.complain()

    def complain(self) -> None:
        """Tell what there is to be told of the metrics."""
        while self._complaints:
            self._display.note(self._complaints.popleft())


@contextlib.contextmanager
def watching(asked: Asked) -> Iterator[Watch]:
    """Watch a job that is run inside. Raises `Refused`, before that, if its metrics cannot be kept as it was asked."""
    if asked.file is None and asked.listen is None:
        with progress(asked.progress) as display:
            yield Watch(display)
        return
    # To load the library takes time, which only those spend who want it.
    from qemu_blkmig.observe.export import Export, last_times
    from qemu_blkmig.observe.metrics import Metrics

    success, failure = last_times(asked.file, asked.source) if asked.file is not None else (None, None)
    metrics = Metrics(asked.command, asked.source, asked.destination, last_success=success, last_failure=failure)
    with Export(metrics, asked.file, asked.listen) as export, progress(asked.progress) as display:
        watch = MeasuredWatch(display, metrics, export.complaints)
        if export.address is not None:
            host, port = export.address
            display.note(f"metrics at http://{f'[{host}]' if ':' in host else host}:{port}/metrics")
        try:
            yield watch
        except BaseException as error:
            watch.ended(_as_ours(error))
            raise
        else:
            watch.ended(None)
        finally:
            export.close()
            watch.reporter.complain()


def _as_ours(error: BaseException) -> BlkmigError:
    if isinstance(error, BlkmigError):
        return error
    return Interrupted(signal.SIGINT) if isinstance(error, KeyboardInterrupt) else BlkmigError(str(error))
