"""The coordinator's end of the control protocol, over the pipes of whatever process leads to the agent."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

import qemu_blkmig
from qemu_blkmig import errors
from qemu_blkmig.destination import protocol
from qemu_blkmig.time_limit import time_limit
from qemu_blkmig.transport.piped import Piped

_Reply = TypeVar("_Reply", bound=protocol.Message)
_Text = TypeVar("_Text", str, str | None)
OnProgress = Callable[[protocol.Progress], None]
OnSpace = Callable[[protocol.Space], None]
Explain = Callable[[int], Awaitable[errors.DestinationFailed | None]]
"""Given the exit status of what leads to the agent."""

_EXIT_TIMEOUT = 30.0
_KILL_TIMEOUT = 5.0
"""Seconds in which a killed agent must be gone; one that hangs in its storage is left to the kernel."""
_SILENCE = protocol.SILENCE
"""Seconds in which an agent must answer a ping."""
_GRACE = 1.0
"""Seconds in which an answer is read that came while we were stopped."""
_LAST_LINES = 20
_LONGEST_LINE = 500
_LONGEST_TEXT = 4000
"""Most characters that are taken of what the other host says."""
_SAME_VERSION = "install the same version of qemu-blkmig on both hosts"


class CopyCancelled(errors.RequestError):
    """What was under way was ended by `Cancel`, and nothing of it is in flight any more."""


class AgentClient:
    """Speaks to the agent behind `process`.

    Stdout's limit has to be `protocol.LINE_LIMIT`. `where`: the agent's host, for messages. `explain`: called when the
    process has ended; what it was that broke, if that was not the agent.
    """

    def __init__(
        self,
        process: Piped,
        on_progress: OnProgress | None = None,
        *,
        where: str = "this host",
        explain: Explain | None = None,
    ) -> None:
        self.on_progress = on_progress
        self.on_space: OnSpace | None = None
        self.there = protocol.HelloReply("", 0)
        """What the agent has answered to hello."""
        self.slowest = 0.0
        """Seconds that the slowest answer to a ping took."""
        self.where = where
        self._explain = explain
        self._process = process
        self._waiting: dict[int, asyncio.Future[protocol.Outcome]] = {}
        self._next_id = 1
        self._said: deque[str] = deque(maxlen=_LAST_LINES)
        self._decoder: msgspec.json.Decoder[protocol.FromAgent] = msgspec.json.Decoder(protocol.FromAgent)
        self._gone: errors.DestinationFailed | None = None
        self._given_up: str | None = None
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._overhear())]
        self._heart = asyncio.create_task(self._beat())

    @property
    def pid(self) -> int:
        """The process id of what leads to the agent (the agent itself where it is local)."""
        return self._process.pid

    async def hello(self, job: str | None = None) -> protocol.HelloReply:
        """Check that both sides speak the same protocol; `job`: whose agent it is. Raises as `request` does."""
        ours = qemu_blkmig.__version__
        try:
            reply = await self.expect(protocol.Hello(ours, protocol.PROTOCOL, job), protocol.HelloReply)
        except errors.Refused as error:
            error.advice = error.advice or _SAME_VERSION
            raise
        if reply.protocol != protocol.PROTOCOL:
            raise errors.Refused(
                f"the agent on {self.where} ({reply.version}) speaks protocol {reply.protocol}, this qemu-blkmig "
                f"({ours}) speaks {protocol.PROTOCOL}",
                advice=_SAME_VERSION,
            )
        self.there = reply
        return reply

    @property
    def last_words(self) -> str:
        """What was said besides the protocol, its last lines."""
        return "\n".join(self._said)

    @property
    def gone(self) -> bool:
        """Whether the agent is known to be gone."""
        return self._gone is not None

    async def request(self, op: protocol.Operation) -> protocol.Outcome:
        """Have the agent carry out `op`; its outcome, never a `Failure`.

        Raises what a `Failure` stands for: `SourceReadError`, `ConnectionLost` (the source's export is gone),
        `DestinationWriteError`, `Refused`, `CopyCancelled`, `DestinationFailed` (a defect of the agent, or the agent
        is gone). When the caller is cancelled the agent goes on.
        """
        if self._gone is not None:
            raise self._gone
        number, self._next_id = self._next_id, self._next_id + 1
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            await self._write(protocol.Request(number, op))
            outcome: protocol.Outcome = await answer
        finally:
            self._waiting.pop(number, None)
        if isinstance(outcome, protocol.Failure):
            raise error_of(outcome)
        return outcome

    async def expect(self, op: protocol.Operation, reply: type[_Reply]) -> _Reply:
        """`request`, whose outcome has to be a `reply`."""
        outcome = await self.request(op)
        if not isinstance(outcome, reply):
            raise errors.DestinationFailed(f"the agent answered {type(op).__name__} with {type(outcome).__name__}")
        return outcome

    async def close(self) -> None:
        """Say bye, so that what is there stays, and wait for the agent to exit. Safe to call twice."""
        with contextlib.suppress(errors.BlkmigError, TimeoutError):
            async with time_limit(_EXIT_TIMEOUT):
                await self.request(protocol.Bye())
        await self.abandon()

    async def abandon(self) -> None:
        """Leave without bye: the agent removes the images that it created and that were not closed, and exits.

        One that does not exit is killed.
        """
        self._heart.cancel()
        self._process.stdin.close()
        try:
            async with time_limit(_EXIT_TIMEOUT):
                await self._process.wait()
        except TimeoutError:
            self.kill()
        await asyncio.wait(self._tasks, timeout=_KILL_TIMEOUT)
        # Asyncio complains of an error of the pipe that nobody has asked for.
        with contextlib.suppress(OSError, TimeoutError):
            async with time_limit(_KILL_TIMEOUT):
                await self._process.stdin.wait_closed()
        self._process.close()

    async def why_gone(self, seconds: float) -> errors.DestinationFailed | None:
        """Why the agent is gone, if it is, or comes to be within `seconds`."""
        await asyncio.wait(self._tasks[:1], timeout=seconds)
        return self._gone

    def kill(self, why: str | None = None) -> None:
        """End the agent at once; what it made is for `Discard` to remove. `why`: what is told of it."""
        self._given_up = self._given_up or why
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _beat(self) -> None:
        """The agent takes silence for our end, and we its silence for the agent's."""
        with contextlib.suppress(errors.BlkmigError):
            while True:
                await asyncio.sleep(protocol.PING)
                if not await self.answers(_SILENCE):
                    return self.kill(f"did not answer for {_SILENCE:.0f} s")

    async def answers(self, seconds: float) -> bool:
        """Whether the agent answers a ping within `seconds`. Raises as `request` does."""
        clock = asyncio.get_running_loop().time
        sent = clock()
        ping = asyncio.create_task(self.request(protocol.Ping()))
        try:
            await asyncio.wait({ping}, timeout=seconds)
            await asyncio.wait({ping}, timeout=_GRACE)
            if ping.done():
                await ping
                self.slowest = max(self.slowest, clock() - sent)
            return ping.done()
        finally:
            ping.cancel()

    async def _write(self, request: protocol.Request) -> None:
        stdin = self._process.stdin
        try:
            if stdin.is_closing():
                raise BrokenPipeError
            stdin.write(msgspec.json.encode(request) + b"\n")
            await stdin.drain()
        except OSError:
            await asyncio.shield(self._tasks[0])

    async def _listen(self) -> None:
        stdout = self._process.stdout
        try:
            while (line := await stdout.readline()).endswith(b"\n"):
                try:
                    message = self._decoder.decode(line)
                except msgspec.DecodeError:
                    # What a login shell there says before the agent runs.
                    if self.there.protocol or len(self._said) == _LAST_LINES:
                        raise
                    self._said.append(_plain(line.decode(errors="replace").rstrip())[:_LONGEST_LINE])
                    continue
                self._heard(message)
        except (ValueError, msgspec.DecodeError) as error:
            self._said.append(f"(the agent's answer makes no sense: {error})")
            self._process.kill()
        finally:
            await self._mourn()

    def _heard(self, message: protocol.FromAgent) -> None:
        if isinstance(message, protocol.Progress):
            if self.on_progress is not None:
                self.on_progress(message)
        elif isinstance(message, protocol.Space):
            if self.on_space is not None:
                self.on_space(message)
        elif (answer := self._waiting.get(message.id)) is not None and not answer.done():
            answer.set_result(message.outcome)

    async def _overhear(self) -> None:
        stderr = self._process.stderr
        while chunk := await stderr.read(4096):
            lines = _plain(chunk.decode(errors="replace")).splitlines()
            self._said.extend(line[:_LONGEST_LINE] for line in lines)

    async def _end(self) -> int:
        """The exit status, now that stdout has ended; who closes that and stays is killed."""
        for _ in range(2):
            with contextlib.suppress(TimeoutError):
                async with time_limit(_KILL_TIMEOUT):
                    return await self._process.wait()
            self.kill()
        return -signal.SIGKILL

    async def _mourn(self) -> None:
        """The agent's stdout has ended: fail all that waits for it."""
        status = await self._end()
        with contextlib.suppress(TimeoutError):
            async with time_limit(1):
                await asyncio.shield(self._tasks[1])
        said = "".join(f"\n  {line}" for line in self._said)
        self._heart.cancel()
        reason = await self._explain(status) if self._explain is not None else None
        self._gone = reason or errors.DestinationFailed(
            f"the agent at the destination {self._given_up or f'is gone ({_ending(status)})'}{said}"
        )
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._gone)
                # Whoever asked may have been cancelled since: nobody need be told.
                answer.exception()


def error_of(failure: protocol.Failure) -> errors.BlkmigError:
    """The exception that stands for `failure`."""
    what, disk = _plain(failure.what), _plain(failure.disk)
    match failure.kind:
        case "source-read":
            return errors.SourceReadError(what, disk=disk or "?", offset=failure.offset or 0)
        case "source-lost":
            return errors.ConnectionLost(what, disk=disk)
        case "destination-write":
            number = failure.errno or 0
            return errors.DestinationWriteError(what, disk=disk or "?", offset=failure.offset, errno=number)
        case "refused":
            return errors.Refused(what, disk=disk, advice=_plain(failure.advice))
        case "cancelled":
            return CopyCancelled(what, disk=disk)
        case "internal":
            return errors.DestinationFailed(f"defect of the agent: {what}", disk=disk)


def _plain(text: _Text) -> _Text:
    """What the other host says, so that it cannot steer the terminal on which it is shown, nor fill it."""
    if text is None:
        return text
    return "".join(each if each.isprintable() or each in "\n\t" else "?" for each in text[:_LONGEST_TEXT])


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"
