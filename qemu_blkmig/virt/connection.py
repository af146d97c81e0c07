"""Connections to libvirt: the binding, its event loop, and its calls off our own loop.

The binding is Debian's python3-libvirt. libvirt has one event loop a process; ours runs in a thread that is started
with the first connection and ends with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import shlex
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from qemu_blkmig.engine.outlast import only_wait
from qemu_blkmig.errors import BlkmigError, ConnectionLost, Refused, RequestError

SOURCE = "the source's libvirt"
TARGET = "the destination's libvirt"
KEEPALIVE = (5, 3)
"""Seconds between two signs of life, and how many may be missed, before a connection is taken for broken."""


AT_ONCE = 5
"""Calls of one client that a daemon takes on at once (libvirtd.conf, max_client_requests)."""

_T = TypeVar("_T")


class LibvirtGone(ConnectionLost):
    """A libvirt daemon hung up; the QEMUs that it started go on."""


class LibvirtError(RequestError):
    """libvirt refused a call, in its own `words`; `code` is its virErrorNumber."""

    def __init__(self, who: str, words: str, code: int) -> None:
        super().__init__(f"{who}: {words}")
        self.words = words
        self.code = code


def virsh(uri: str | None, *words: str) -> str:
    """A command for people to type: of virsh, at the libvirt of `uri` (None: its default)."""
    return shlex.join(["virsh", *(["-c", uri] if uri else []), *words])


@functools.cache
def libvirt(name: str = "libvirt") -> Any:
    """The module `libvirt` or `libvirt_qemu`. Raises `Refused` when it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(
            f"Python's module {name} is missing: {error}",
            advice="install the Debian package python3-libvirt; a venv sees it when it was made from /usr/bin/python3 "
            "with --system-site-packages",
        ) from error


@functools.cache
def _start_events() -> None:
    """Start libvirt's event loop, once a process, and keep libvirt from printing its errors itself."""
    module = libvirt()
    module.registerErrorHandler(lambda _context, _error: None, None)
    module.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            module.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt events", daemon=True).start()


async def _apart(function: Callable[..., _T], *arguments: object) -> _T:
    """Call it in a thread that nobody waits for when the process ends: a host that is down answers after minutes, a
    migration that a hook at the destination keeps from beginning comes back when that does.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[_T] = loop.create_future()

    def settle(give: Callable[[], None]) -> None:
        if not answer.done():
            give()

    def run() -> None:
        try:
            result = function(*arguments)
            give = functools.partial(answer.set_result, result)
        except BaseException as error:
            give = functools.partial(answer.set_exception, error)
        # The loop has ended when nobody waits any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, give)

    threading.Thread(target=run, name="libvirt call", daemon=True).start()
    return await answer


class Connection:
    """One libvirt daemon; `who` names it in messages ("the source's libvirt")."""

    def __init__(self, handle: Any, uri: str, who: str) -> None:
        self.handle = handle
        self.uri = uri
        self.who = who
        self._order = asyncio.Lock()
        self._capabilities: str | None = None

    @classmethod
    async def open(cls, uri: str | None, who: str) -> Connection:
        """Connect to `uri` (None: libvirt's own default). Raises `Refused` with libvirt's words."""
        module = libvirt()
        _start_events()
        try:
            handle = await _apart(module.open, uri)
        except module.libvirtError as error:
            raise Refused(
                f"{who}: cannot connect to {uri or 'libvirt'}: {error}",
                advice=f"try: {virsh(uri, 'list')}",
            ) from error
        connection = cls(handle, await asyncio.to_thread(handle.getURI), who)
        await connection.call(handle.setKeepAlive, *KEEPALIVE)
        return connection

    async def call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Call libvirt in a thread, one call after another: what takes long gets a connection of its own.

        libvirt's client lets the thread of one call read the answers to others', which then came as late as the next
        sign of life now and then: monitor commands beside a migration took five seconds, the guest standing still
        (libvirt 9.0). Raises `LibvirtError`, and `LibvirtGone` when the daemon is gone. A call goes on when it is
        cancelled, and those that follow wait for it.
        """
        return await only_wait(asyncio.ensure_future(self._call(function, *arguments)))

    async def _call(self, function: Callable[..., Any], *arguments: object) -> Any:
        module = libvirt()
        async with self._order:
            try:
                return await _apart(function, *arguments)
            except module.libvirtError as error:
                raise self.explained(error) from error

    async def call_all(self, functions: Sequence[Callable[[], _T]]) -> list[_T | LibvirtError]:
        """Make these short calls, `AT_ONCE` of them under way and no others: what each returns, or how it was refused.

        Beside long calls answers come late (see `call`), beside short ones they do not: of 8000 none took half a second
        (libvirt 9.0). Raises `LibvirtGone`.
        """
        return await only_wait(asyncio.ensure_future(self._call_all(functions)))

    async def _call_all(self, functions: Sequence[Callable[[], _T]]) -> list[_T | LibvirtError]:
        async with self._order:
            return await asyncio.to_thread(self._call_in_threads, functions)

    def _call_in_threads(self, functions: Sequence[Callable[[], _T]]) -> list[_T | LibvirtError]:
        error_of = libvirt().libvirtError

        def call(function: Callable[[], _T]) -> _T | LibvirtError:
            try:
                return function()
            except error_of as error:
                explained = self.explained(error)
                if isinstance(explained, LibvirtError):
                    return explained
                raise explained from error

        with ThreadPoolExecutor(AT_ONCE) as threads:
            return [*threads.map(call, functions)]

    def explained(self, error: Any) -> BlkmigError:
        """Our error for a libvirtError."""
        text = error.get_error_message() or str(error)
        if not self._alive():
            return LibvirtGone(f"{self.who} is gone: {text}")
        return LibvirtError(self.who, text, error.get_error_code())

    async def domain(self, name: str) -> Any:
        """The domain of this id, name or UUID. Raises `Refused` when there is none."""
        module = libvirt()
        lookups: list[tuple[Callable[..., Any], object]] = [
            (self.handle.lookupByName, name),
            (self.handle.lookupByUUIDString, name),
        ]
        if name.isdecimal():
            lookups.insert(0, (self.handle.lookupByID, int(name)))
        for lookup, key in lookups:
            try:
                return await self.call(lookup, key)
            except LibvirtError as error:
                if error.code not in (module.VIR_ERR_NO_DOMAIN, module.VIR_ERR_INVALID_ARG):
                    raise
        raise Refused(f"{self.who} has no domain {name!r}", advice=virsh(self.uri, "list", "--all"))

    async def capabilities(self) -> str:
        """The XML of virConnectGetCapabilities, which is asked for once. Raises as `call` does."""
        if self._capabilities is None:
            self._capabilities = str(await self.call(self.handle.getCapabilities))
        return self._capabilities

    async def close(self) -> None:
        """Let go of the daemon."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        try:
            self.handle.close()
        except libvirt().libvirtError:
            return

    def _alive(self) -> bool:
        try:
            return bool(self.handle.isAlive())
        except libvirt().libvirtError:
            return False
