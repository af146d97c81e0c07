"""What leads to the destination is begun as soon as that is known, while the rest of the program is loaded.

An agent of which nothing was asked yet has made nothing, and ends with its stdin. A connection by ssh needs the job's
run-time directory, so the job's record comes before it; the watchdog, which comes after, is not there yet: a job that
is killed in that third of a second is left for `cleanup`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from qemu_blkmig.errors import SIGNALS, BlkmigError, Interrupted
from qemu_blkmig.job.place import Local, Place, Ssh
from qemu_blkmig.transport.route import CONTROL_LIMIT, BegunConnection, Route
from qemu_blkmig.transport.starting import AGENT, start

if TYPE_CHECKING:
    import asyncio

    from qemu_blkmig.job.record import Job
    from qemu_blkmig.qmp.socket import SocketMonitor
    from qemu_blkmig.virt.connection import Connection

END = 5.0
"""Seconds in which an agent that nobody has taken must end."""


class Beginning:
    """Begins what leads to `place` with its block; what nobody has taken by the block's end is ended, and removed.

    What cannot be begun is told when it is started in earnest.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._agent: subprocess.Popen[bytes] | None = None
        self._job: Job | None = None
        self._connection: BegunConnection | None = None
        self._source: asyncio.Task[SocketMonitor] | None = None
        self._libvirt: asyncio.Task[Connection] | None = None
        self._signals = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Raises `Refused` where the job cannot be recorded."""
        for number in SIGNALS:
            self._signals.callback(signal.signal, number, signal.getsignal(number) or signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupted)
        try:
            match self._place:
                case Local():
                    with contextlib.suppress(OSError):
                        self._agent = start(AGENT)
                case Ssh() as place:
                    self._connect(place)
        except BaseException:
            self._end()
            raise
        return self

    def _connect(self, place: Ssh) -> None:
        from qemu_blkmig.job.record import Job

        self._job = Job.create()
        control = str(self._job.runtime / f"ssh-{secrets.token_hex(3)}")
        if len(os.fsencode(control)) <= CONTROL_LIMIT:
            with contextlib.suppress(OSError):
                route = Route(place.host, place.user, place.port, place.remote_command)
                self._connection = BegunConnection(route, control)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        """It takes moments; what an interrupt would leave of it is nobody's."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        with contextlib.ExitStack() as last:
            last.push(self._signals)
            if (job := self.take_job()) is not None:
                last.callback(job.remove)
            if (connection := self.take_connection()) is not None:
                last.callback(connection.end)
            if (agent := self.take_agent()) is not None:
                last.callback(_end, agent)

    @contextlib.asynccontextmanager
    async def reaching(self, source: str | None, libvirt: str | None = None) -> AsyncIterator[None]:
        """Connect to the source QEMU's QMP socket, and to the destination's libvirt, by its URI, if there are such,
        beside what is done inside.

        A connection that nobody has taken by then is closed.
        """
        import asyncio

        if source is not None:
            self._source = asyncio.create_task(_reach(source))
        if libvirt is not None:
            self._libvirt = asyncio.create_task(_reach_libvirt(libvirt))
        try:
            yield
        finally:
            for reached in (self.take_source(), self.take_libvirt()):
                if reached is not None:
                    reached.cancel()
                    with contextlib.suppress(BlkmigError, asyncio.CancelledError):
                        await (await reached).close()

    def take_source(self) -> asyncio.Task[SocketMonitor] | None:
        """The connection to the source QEMU, as `take_agent`. The task raises `Refused`."""
        source, self._source = self._source, None
        return source

    def take_libvirt(self) -> asyncio.Task[Connection] | None:
        """The connection to the destination's libvirt, as `take_source`."""
        reached, self._libvirt = self._libvirt, None
        return reached

    def take_agent(self) -> subprocess.Popen[bytes] | None:
        """The agent on this host, if it was begun and was not taken before; it is the caller's from now on."""
        agent, self._agent = self._agent, None
        return agent

    def take_connection(self) -> BegunConnection | None:
        """The connection to another host, as `take_agent`."""
        connection, self._connection = self._connection, None
        return connection

    def take_job(self) -> Job | None:
        """The job whose connection was begun, as `take_agent`."""
        job, self._job = self._job, None
        return job


def _interrupted(number: int, _frame: object) -> None:
    """Until there is an event loop, and `job.interrupts` watches: what was begun is ended, and not left behind."""
    raise Interrupted(number, state="nothing was touched")


async def _reach(path: str) -> SocketMonitor:
    from qemu_blkmig.qmp.features import ask
    from qemu_blkmig.qmp.socket import SocketMonitor

    monitor = await SocketMonitor.connect(path, who="source QEMU")
    ask(monitor)
    return monitor


async def _reach_libvirt(uri: str) -> Connection:
    from qemu_blkmig.virt.connection import TARGET, Connection

    return await Connection.open(uri, TARGET)


def _end(agent: subprocess.Popen[bytes]) -> None:
    try:
        # It closes the pipes, and waits.
        agent.communicate(timeout=END)
    except subprocess.TimeoutExpired:
        agent.kill()
        agent.communicate()
