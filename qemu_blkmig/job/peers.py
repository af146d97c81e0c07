"""The two QEMUs of a job and their hosts, as they are found when the job is settled: alive, hanging, gone, unreachable.

What is done to a process, or to a socket, is done on its host: here by ourselves, there by the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.destination.protocol import (
    Alive,
    AliveReply,
    EndProcess,
    Held,
    HeldReply,
    Identified,
    Identify,
    Message,
    Operation,
    Ping,
)
from qemu_blkmig.errors import BlkmigError, ConnectionLost, DestinationFailed, Refused, RequestError
from qemu_blkmig.job.host import host_of
from qemu_blkmig.job.place import Local
from qemu_blkmig.job.record import Job
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.qmp.socket import SocketMonitor
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.host import Host

log = logging.getLogger(__name__)

REACH = 20.0
"""Seconds in which a QEMU that is alive must become reachable; its QMP socket may be taken by another for a while."""
QUICK = 2.0
"""Seconds in which the caller's agent must answer, else another is started: a guest may be waiting."""
ANSWER = 15.0
"""Seconds in which an agent must answer; it takes up to ten to see a process end."""

_Reply = TypeVar("_Reply", bound=Message)


class Unreachable(BlkmigError):
    """A QEMU that is alive does not answer."""


class HostUnreachable(Unreachable):
    """The destination host, or the agent there, cannot be reached: nothing is known of what runs there."""


class Site(Protocol):
    """A host that a QEMU runs on. Methods raise `HostUnreachable`."""

    async def alive(self, process: ProcessId) -> bool:
        """Whether this very process still runs."""

    async def end(self, process: ProcessId, *, group: bool) -> bool:
        """End it by force, with its process group if `group`; True when it is gone."""

    async def nobody_listens(self, path: str) -> bool:
        """Whether no process listens on the unix socket at `path`."""

    async def reach(self, path: str) -> str:
        """Where the unix socket at `path` of that host is reached from here."""


class Here:
    """This host. See `Site`."""

    async def alive(self, process: ProcessId) -> bool:
        """See `Site`."""
        return process.alive

    async def end(self, process: ProcessId, *, group: bool) -> bool:
        """See `Site`."""
        return await asyncio.to_thread(process.kill, 10, group=group)

    async def nobody_listens(self, path: str) -> bool:
        """See `Site`."""
        try:
            _, writer = await asyncio.open_unix_connection(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except OSError:
            return False
        writer.close()
        return False

    async def reach(self, path: str) -> str:
        """See `Site`."""
        return path


class There:
    """The destination host, by the caller's connection and agent while they answer, else by its own. See `Site`."""

    def __init__(self, job: Job, host: Host | None, agent: AgentClient | None) -> None:
        self._host = host or host_of(job.record.target_place or Local("/"), job.runtime, job.record.job)
        self._close_host = host is None
        self._agent = agent
        self._own: AgentClient | None = None
        self._killed = False
        self._starting: asyncio.Task[AgentClient] | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return self._host.name

    async def agent(self) -> AgentClient:
        """An agent there that answers. Raises `HostUnreachable`, at once when that was so before."""
        if self._own is not None and not self._own.gone:
            return self._own
        if self._agent is not None and await _answers(self._agent):
            return self._agent
        self._killed = self._killed or self._agent is not None
        self._agent = None
        if self._own is not None:
            self._own, self._starting = None, None
        if self._starting is None:
            self._starting = asyncio.create_task(self._host.start_agent())
        try:
            self._own = await asyncio.shield(self._starting)
        except (DestinationFailed, Refused) as error:
            raise HostUnreachable(f"{self._host.name} cannot be reached: {error}") from error
        return self._own

    async def answers(self, seconds: float) -> bool:
        """Whether an agent there answers within `seconds`; a caller's that is silent was tried for long enough.

        The attempt to start another one goes on, and `agent` has its outcome.
        """
        if self._agent is not None and not self._agent.gone:
            return await _answers(self._agent)
        try:
            async with time_limit(seconds):
                await self.agent()
        except (HostUnreachable, TimeoutError):
            return False
        return True

    def leave_agent(self) -> None:
        """The caller's agent is not to be used any more."""
        self._killed = self._killed or (self._agent is not None and self._agent.gone)
        self._agent = None

    async def tidy(self, *, needed: bool) -> None:
        """See to it that an agent's end, with `close`, removes the sockets of QEMUs and of agents that were killed.

        Raises `HostUnreachable` if `needed`.
        """
        if needed or self._killed:
            try:
                await self.agent()
            except HostUnreachable:
                if needed:
                    raise

    async def ask(self, op: Operation, reply: type[_Reply]) -> _Reply:
        """Have the agent do `op`. Raises `HostUnreachable`, `Refused`."""
        agent = await self.agent()
        try:
            async with time_limit(ANSWER):
                return await agent.expect(op, reply)
        except (DestinationFailed, TimeoutError) as error:
            raise HostUnreachable(f"the agent on {self._host.name} did not answer: {error}") from error

    async def alive(self, process: ProcessId) -> bool:
        """See `Site`."""
        return (await self.ask(Alive(process), AliveReply)).alive

    async def end(self, process: ProcessId, *, group: bool) -> bool:
        """See `Site`."""
        try:
            return not (await self.ask(EndProcess(process, group), AliveReply)).alive
        except Refused as error:
            log.warning("%s", error)
            return False

    async def nobody_listens(self, path: str) -> bool:
        """See `Site`."""
        try:
            await self.ask(Identify(path), Identified)
        except Refused:
            return True
        return False

    async def reach(self, path: str) -> str:
        """See `Site`."""
        await self.agent()
        try:
            return await self._host.reach(path)
        except DestinationFailed as error:
            raise HostUnreachable(str(error)) from error

    async def idle(self, images: Sequence[str]) -> Sequence[str]:
        """Which of `images` no QEMU has open as an active writer. Raises `HostUnreachable`."""
        return (await self.ask(Held(list(images)), HeldReply)).idle

    async def close(self, *, done: bool) -> None:
        """Let go of what was started here; `done`: the job needs the sockets there no more."""
        if self._starting is not None:
            self._starting.cancel()
            with contextlib.suppress(DestinationFailed, Refused, asyncio.CancelledError):
                self._own = self._own or await self._starting
        if self._own is not None:
            await (self._own.close() if done else self._own.abandon())
        if self._close_host:
            await self._host.close()


class Peer:
    """One of the two QEMUs, connected to when first asked."""

    def __init__(
        self, who: str, site: Site, path: str | None, process: ProcessId | None, monitor: Monitor | None
    ) -> None:
        self.who = who
        self.process = process
        self._site = site
        self._path = path
        self._monitor = monitor

    async def gone(self) -> bool:
        """Whether it is known to run no more. Raises `HostUnreachable`."""
        return self._path is None or (self.process is not None and not await self._site.alive(self.process))

    async def monitor(self) -> Monitor | None:
        """Its monitor; None when the QEMU is gone. Raises `Unreachable` when it lives and doesn't answer."""
        if self._monitor is not None and not self._monitor.lost:
            return self._monitor
        deadline = asyncio.get_running_loop().time() + REACH
        while True:
            if self._path is None or await self.gone():
                return None
            try:
                self._monitor = await SocketMonitor.connect(
                    await self._site.reach(self._path), who=self.who, timeout=2.0
                )
                return self._monitor
            except (Refused, ConnectionLost, RequestError) as error:
                if self.process is None and await self._site.nobody_listens(self._path):
                    return None
                if asyncio.get_running_loop().time() > deadline:
                    raise Unreachable(f"the {self.who} lives but does not answer on {self._path}: {error}") from error
            await asyncio.sleep(0.1)

    async def fence(self) -> bool:
        """End this QEMU for certain; True when it is gone. Raises `HostUnreachable`."""
        if await self.gone():
            return True
        try:
            if (monitor := await self.monitor()) is not None:
                with contextlib.suppress(RequestError, ConnectionLost):
                    await monitor.execute("quit", timeout=5)
        except HostUnreachable:
            raise
        except Unreachable as error:
            log.warning("%s", error)
        if await until(self._is_gone, 10):
            return True
        return self.process is not None and await self._site.end(self.process, group=False)

    async def kill(self) -> bool:
        """End what we launched ourselves, and what never had the guest, without asking; True when it is gone.

        Raises `HostUnreachable`.
        """
        return self.process is None or await self._site.end(self.process, group=True)

    async def _is_gone(self) -> bool:
        if self.process is not None:
            return not await self._site.alive(self.process)
        return self._path is None or await self._site.nobody_listens(self._path)

    async def close(self) -> None:
        """Let go of the monitor."""
        if self._monitor is not None:
            await self._monitor.close()


async def until(condition: Callable[[], Awaitable[bool]], seconds: float) -> bool:
    """Poll until the condition holds; False when it does not within `seconds`."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not await condition():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


async def _answers(agent: AgentClient) -> bool:
    if agent.gone:
        return False
    try:
        async with time_limit(QUICK):
            await agent.request(Ping())
    except (BlkmigError, TimeoutError):
        return False
    return True
