"""The destination's QEMU: started by us or already waiting, with a disk for each that is migrated.

What concerns its process is asked of the agent beside it; its QMP socket is reached through the host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from qemu_blkmig.destination.files import FileId
from qemu_blkmig.destination.process import ProcessId
from qemu_blkmig.destination.protocol import (
    Alive,
    AliveReply,
    Files,
    FilesReply,
    Go,
    Held,
    HeldReply,
    Identified,
    Identify,
    Launch,
    Launched,
    Output,
    OutputReply,
)
from qemu_blkmig.errors import BlkmigError, ConnectionLost, DestinationFailed, Refused
from qemu_blkmig.job.record import Job
from qemu_blkmig.qmp.disks import Disk, Inventory, inventory
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.qmp.socket import SocketMonitor
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.host import Host

WHO = "destination QEMU"
CONNECT = 10.0
"""Seconds in which a launched QEMU, which listens, must answer on its QMP socket."""
ANSWER = 5.0
"""Seconds in which the agent must say what became of a QEMU."""


class TargetQemu:
    """A QEMU that waits for a migration; once claimed, it never starts the guest by itself (see `settle`)."""

    def __init__(self, monitor: Monitor, process: ProcessId | None, agent: AgentClient) -> None:
        self.monitor = monitor
        self.process = process
        self._agent = agent

    @classmethod
    async def attach(cls, host: Host, agent: AgentClient, path: str) -> TargetQemu:
        """The QEMU that already waits at the QMP socket `path` there. Raises `Refused` if it doesn't wait."""
        try:
            found = await agent.expect(Identify(path), Identified)
        except Refused as error:
            raise Refused(f"{WHO}: {error}", advice=error.advice) from error
        return await cls._waiting(await SocketMonitor.connect(await host.reach(path), who=WHO), found.process, agent)

    @classmethod
    async def launch(cls, job: Job, host: Host, agent: AgentClient, command: str, directory: str) -> TargetQemu:
        """Run the shell command there, with what makes QEMU wait for us appended. Raises `Refused` with what it said.

        A process id is in the job's record before the program runs: the shell waits for our word. Once QEMU answers,
        the record names QEMU itself, whatever the command did in between.
        """
        launched = await agent.expect(Launch(command, directory), Launched)
        job.record.target_launched = True
        job.record.target_qmp = launched.qmp
        job.record.target_process = launched.process
        await job.save()
        process = (await agent.expect(Go(), Identified)).process or launched.process
        job.record.target_process = process
        await job.save()
        try:
            monitor = await cls._connect(await host.reach(launched.qmp), process, agent)
        except (Refused, ConnectionLost) as error:
            if (await agent.expect(Alive(process), AliveReply)).alive:
                raise
            said = (await agent.expect(Output(), OutputReply)).text
            raise Refused(
                f"the QEMU of --launch does not answer any more: {said}",
                advice="try the command by hand in the destination directory",
            ) from error
        return await cls._waiting(monitor, process, agent)

    @classmethod
    async def _connect(cls, path: str, process: ProcessId, agent: AgentClient) -> Monitor:
        """To a QEMU that was just seen listening, and may have its hands full, or end over its other arguments."""
        deadline = asyncio.get_running_loop().time() + CONNECT
        while True:
            try:
                return await SocketMonitor.connect(path, who=WHO)
            except (Refused, ConnectionLost):
                late = asyncio.get_running_loop().time() > deadline
                if late or not (await agent.expect(Alive(process), AliveReply)).alive:
                    raise
            await asyncio.sleep(0.02)

    @classmethod
    async def _waiting(cls, monitor: Monitor, process: ProcessId | None, agent: AgentClient) -> TargetQemu:
        try:
            status = await monitor.execute("query-status")
            if status["status"] != "inmigrate":
                raise Refused(
                    f"the {WHO} does not wait for a migration (run state {status['status']})",
                    advice="start it with -incoming defer",
                )
        except BaseException:
            await monitor.close()
            raise
        return cls(monitor, process, agent)

    async def inventory(self) -> Inventory:
        """The disks that it waits with."""
        return await inventory(self.monitor)

    async def files(self, names: Sequence[str]) -> Sequence[FileId | None]:
        """Which files it means by these names. Raises `DestinationFailed`."""
        return (await self._agent.expect(Files(list(names), self.process), FilesReply)).ids

    async def idle(self, images: Sequence[str]) -> Sequence[str]:
        """Which of these images no QEMU has open as an active writer. Raises `DestinationFailed`."""
        return (await self._agent.expect(Held(list(images)), HeldReply)).idle

    async def claim(self) -> None:
        """From now on the guest starts here only when we say so: `stop` clears a waiting QEMU's autostart."""
        await self.monitor.execute("stop")

    async def start_guest(self) -> None:
        """Let the guest run here. Its return is the proof that the disks could be activated (FACTS.md)."""
        await self.monitor.execute("cont")

    async def describe(self, error: BlkmigError) -> DestinationFailed:
        """`error` with what the QEMU last said, where the agent has heard it; without the agent, what became of it."""
        try:
            async with time_limit(ANSWER):
                said = (await self._agent.expect(Output(), OutputReply)).text
        except DestinationFailed as gone:
            return gone
        except (BlkmigError, TimeoutError):
            said = "the agent beside it does not answer"
        return DestinationFailed(f"{error}; {said}")

    async def close(self) -> None:
        """Let go of it; it runs on."""
        await self.monitor.close()


def counterpart(disk: Disk, candidates: Sequence[Disk]) -> Disk | None:
    """The destination's disk for `disk`: the same device of the guest, told by its qdev path, else by its drive id."""
    for key in ("qdev", "device", "name"):
        own = getattr(disk, key)
        found = [other for other in candidates if own and getattr(other, key) == own]
        if len(found) == 1:
            return found[0]
    return None
