"""Another host as the destination, reached by the system's own ssh: its keys, configuration, agents and jump hosts.

One `ssh` is the connection (ssh_config(5), ControlMaster); agents are sessions of it, and unix sockets are forwarded
through it on demand. It dies with us, and within `ALIVE` seconds of silence; a later call connects anew.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import subprocess
from collections import deque
from pathlib import Path

from qemu_blkmig import errors
from qemu_blkmig.destination import protocol
from qemu_blkmig.destination.launching import PATH_LIMIT
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.transport.client import AgentClient, OnProgress
from qemu_blkmig.transport.piped import Piped
from qemu_blkmig.transport.route import COMMAND_VARIABLE, CONTROL_LIMIT, END, STANDS, BegunConnection, Route
from qemu_blkmig.transport.ssh_words import NOT_FOUND, NOT_RUN, failure_of, refusal_of_forward
from qemu_blkmig.transport.starting import end, end_group

LOGIN = 60.0
"""Seconds in which a connection must stand, jump hosts and all."""
HELLO = 30.0
"""Seconds in which an agent must answer hello."""
FORWARD = 10.0
"""Seconds in which a socket must be forwarded."""
_LAST_LINES = 20
_LINE = 64 << 10


class SshHost:
    """See `transport.host.Host`."""

    def __init__(
        self, route: Route, runtime: Path, job: str | None = None, begun: BegunConnection | None = None
    ) -> None:
        """`runtime`: a private directory here, for sockets. `job`: whose agents are started.

        `begun`: the connection to use at first, which is being made.
        """
        self.name = route.host
        self._route = route
        self._runtime = runtime
        self._job = job
        self._begun = begun
        self._first: subprocess.Popen[bytes] | None = None
        # A process of the job that was killed may have left sockets in the same directory.
        self._names = (f"{token}-{number}" for token in [secrets.token_hex(3)] for number in itertools.count())
        self._connecting = asyncio.Lock()
        self._master: Piped | None = None
        self._control = ""
        self._said: deque[str] = deque(maxlen=_LAST_LINES)
        self._overhearing: asyncio.Task[None] | None = None
        self._reached: dict[str, str] = {}
        self._echo: str | None = None
        self._agent: AgentClient | None = None

    async def start_agent(self, on_progress: OnProgress | None = None) -> AgentClient:
        """See `Host`. What ssh says is in the errors, and what to do about it."""
        await self._connect()
        first, self._first = self._first, None
        try:
            begun = first or self._route.start_agent(self._control)
        except OSError as error:
            raise _no_process(error) from error
        process = await Piped.of(begun, protocol.LINE_LIMIT)
        client = AgentClient(process, on_progress, where=self.name, explain=self._explain)
        try:
            async with time_limit(HELLO):
                await client.hello(self._job)
        except BaseException as error:
            if isinstance(error, TimeoutError):
                client.kill()
            await client.abandon()
            status = process.returncode
            # By a signal it was ended by us, who have said why.
            if isinstance(error, errors.DestinationFailed) and status is not None and 0 <= status < 255:
                raise self._failure(client.last_words, status) from error
            if isinstance(error, TimeoutError):
                raise errors.DestinationFailed(
                    f"the agent on {self.name} did not answer within {HELLO:.0f} s",
                    advice=f"try by hand: ssh {self.name} {self._route.remote_command} --version",
                ) from error
            raise
        self._agent = client
        if client.there.runtime:
            try:
                # What sshd does not forward shows at once only in this direction; `_try_reaching` is for the other.
                self._echo = await self.expose(self._control)
            except BaseException:
                await client.abandon()
                raise
        return client

    async def expose(self, socket: str) -> str:
        """See `Host`. The path is in the latest agent's private directory."""
        if self._agent is None:
            raise errors.DestinationFailed(f"no agent was started on {self.name}")
        there = f"{self._agent.there.runtime}/{next(self._names)}"
        await self._forward("-R", f"{_escaped(there)}:{_escaped(socket)}")
        return there

    async def reach(self, socket: str) -> str:
        """See `Host`. That nobody listens there shows only when it is connected to."""
        await self._connect()
        if self._echo is not None:
            echo, self._echo = self._echo, None
            await self._try_reaching(echo)
        if socket not in self._reached:
            here = self._path(f"there-{next(self._names)}")
            await self._forward("-L", f"{_escaped(here)}:{_escaped(socket)}")
            self._reached[socket] = here
        return self._reached[socket]

    async def _try_reaching(self, echo: str) -> None:
        """Raise `Refused` where sshd lets no socket there be reached, which shows only when one is connected to.

        The one that is sure to be listened on, by who speaks first, is our own control socket, exposed as `echo`.
        """
        here = self._path(f"there-{next(self._names)}")
        await self._forward("-L", f"{_escaped(here)}:{_escaped(echo)}")
        try:
            async with time_limit(FORWARD):
                reader, writer = await asyncio.open_unix_connection(here)
                try:
                    answered = bool(await reader.read(1))
                finally:
                    writer.close()
        except TimeoutError:
            raise errors.DestinationFailed(f"the connection to {self.name} hangs") from None
        except OSError:
            answered = False
        if not answered:
            gone = await self._explain(255)
            raise gone or refusal_of_forward("connections to sockets there are closed", self.name)

    async def close(self) -> None:
        """See `Host`."""
        if self._master is not None:
            if self._connected:
                end_group(self._master.pid)
            await self._master.wait()
        if self._overhearing is not None:
            # What it says last.
            await asyncio.wait({self._overhearing}, timeout=END)
            self._overhearing.cancel()
        if self._master is not None:
            self._master.close()
        if self._first is not None:
            first, self._first = self._first, None
            await asyncio.to_thread(end, first)
        if self._begun is not None:
            begun, self._begun = self._begun, None
            await asyncio.to_thread(begun.end)

    @property
    def _connected(self) -> bool:
        return self._master is not None and self._master.returncode is None

    async def _connect(self) -> None:
        """See to it that the connection stands. Raises `DestinationFailed`, `Refused` with what ssh said."""
        async with self._connecting:
            if self._connected:
                return
            self._reached.clear()
            self._echo = None
            self._said = deque(maxlen=_LAST_LINES)
            begun, self._begun = self._begun, None
            try:
                async with time_limit(LOGIN):
                    stands = await (self._make() if begun is None else self._take_over(begun))
            except BaseException as error:
                await self.close()
                if isinstance(error, TimeoutError):
                    raise errors.DestinationFailed(f"{self.name} was not connected within {LOGIN:.0f} s") from error
                raise
            if not stands:
                await self.close()
                ended = self._master.returncode if self._master is not None else None
                if ended in (NOT_FOUND, NOT_RUN):
                    what = f"ssh cannot be started: {' '.join(self._said)}"
                    raise errors.Refused(what, advice=f"see what {COMMAND_VARIABLE} says, or install openssh-client")
                raise self._failure("\n".join(self._said), ended)

    async def _make(self) -> bool:
        """Connect; whether the connection came to stand."""
        self._control = self._path(f"ssh-{next(self._names)}", CONTROL_LIMIT)
        ciphers = await asyncio.to_thread(self._route.ciphers)
        try:
            connection = self._route.start_connection(self._control, ciphers)
        except OSError as error:
            raise errors.Refused(
                f"ssh cannot be started: {error}", advice="install Debian's packages openssh-client and util-linux"
            ) from error
        master = await self._adopt(connection)
        return await _says(master, STANDS)

    async def _take_over(self, begun: BegunConnection) -> bool:
        """Have the connection that was begun; whether it came to stand."""
        self._control = begun.control
        try:
            stands = await asyncio.shield(asyncio.wrap_future(begun.stands))
        except BaseException:
            await asyncio.to_thread(begun.end)
            raise
        self._first = begun.agent
        await self._adopt(begun.connection)
        return stands

    async def _adopt(self, connection: subprocess.Popen[bytes]) -> Piped:
        self._master = master = await Piped.of(connection, _LINE)
        self._overhearing = asyncio.create_task(_overhear(master, self._said))
        return master

    def _failure(self, said: str, status: int | None) -> errors.BlkmigError:
        return failure_of(said, self.name, self._route.remote_command, status)

    async def _forward(self, direction: str, paths: str) -> None:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._route.forward(self._control, direction, paths),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise _no_process(error) from error
        try:
            async with time_limit(FORWARD):
                _, said = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise errors.DestinationFailed(f"the connection to {self.name} hangs") from None
        if process.returncode:
            gone = await self._explain(255)
            raise gone or refusal_of_forward(said.decode(errors="replace").strip(), self.name)

    async def _explain(self, status: int) -> errors.DestinationFailed | None:
        """A session that ended with ssh's own status has lost its connection, if that has ended, too."""
        if status != 255 or self._master is None:
            return None
        try:
            async with time_limit(1):
                ended = await self._master.wait()
                if self._overhearing is not None:
                    await asyncio.wait({self._overhearing})
        except TimeoutError:
            return None
        words = "; ".join(self._said) or f"ssh ended with status {ended}"
        return errors.DestinationFailed(f"the connection to {self.name} is gone: {words}")

    def _path(self, name: str, limit: int = PATH_LIMIT) -> str:
        path = str(self._runtime / name)
        if len(os.fsencode(path)) > limit:
            raise errors.Refused(
                f"the path of a socket, {path}, is too long for a unix socket's address",
                advice="name a shorter directory for temporary files by TMPDIR",
            )
        return path


def _no_process(error: OSError) -> errors.DestinationFailed:
    """The error where this host has no room for another process: that may pass."""
    return errors.DestinationFailed(f"ssh cannot be started: {error.strerror}")


def _escaped(path: str) -> str:
    """A path in ssh's forwarding syntax, where colons separate and a backslash keeps them from it."""
    return path.replace("\\", "\\\\").replace(":", "\\:")


async def _says(process: Piped, word: str) -> bool:
    """Whether `process` says `word` before its stdout ends."""
    while line := await process.stdout.readline():
        if line.decode(errors="replace").strip() == word:
            return True
    return False


async def _overhear(process: Piped, said: deque[str]) -> None:
    while line := await process.stderr.readline():
        said.append(line.decode(errors="replace").strip())
