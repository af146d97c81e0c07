"""What a QEMU can do: asked of its own description of QMP (query-qmp-schema), never derived from its version."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from qemu_blkmig.qmp.monitor import Monitor

_COMMANDS = {
    "block-dirty-bitmap-add": "dirty bitmaps",
    "block-dirty-bitmap-merge": "merging dirty bitmaps",
    "block-dirty-bitmap-remove": "removing dirty bitmaps",
    "block-export-add": "block exports",
    "block-export-del": "removing block exports",
    "query-block-exports": "listing block exports",
    "query-jobs": "listing jobs",
    "nbd-server-start": "an NBD server",
    "getfd": "passing file descriptors",
    "migrate-continue": "migrate-continue",
}
_MEMBERS = {
    ("block-dirty-bitmap-add", "persistent"): "bitmaps that are not persistent",
    ("block-export-add", "nbd", "bitmaps"): "showing bitmaps over NBD",
    ("block-export-add", "nbd", "allocation-depth"): "showing the allocation depth over NBD",
    ("nbd-server-start", "addr", "fd"): "an NBD server on a passed socket",
    ("query-named-block-nodes", "flat"): "the flat list of block nodes",
    ("transaction", "actions", "block-dirty-bitmap-add"): "adding bitmaps in a transaction",
    ("transaction", "actions", "block-dirty-bitmap-disable"): "disabling bitmaps in a transaction",
    ("transaction", "actions", "block-dirty-bitmap-merge"): "merging bitmaps in a transaction",
    ("transaction", "actions", "block-dirty-bitmap-remove"): "removing bitmaps in a transaction",
    ("migrate-set-capabilities", "capabilities", "capability", "pause-before-switchover"): "pause-before-switchover",
}


@dataclass(frozen=True, slots=True)
class Features:
    """`missing`: in words, what is needed and not there. The others are optional.

    `allow_inactive`: an export may be made without activating its node (QEMU 10.0). `iothread_exports`: a client may
    leave an NBD export of a disk on an iothread. QEMUs without block-job-change (8.2) abort then
    (`nbd_blockdev_client_closed: Assertion`), seen on 7.2.22; no schema tells, so that command stands for the mend,
    which was seen on 10.0.13 (50 clients that left, half of them in mid-read). `set_active`: nodes can be told to be
    active, because those of a paused destination are not until its `cont` (10.0). `watch`: an export may show a bitmap
    by the node that it lies on, also while it records (7.1).
    """

    missing: tuple[str, ...]
    allow_inactive: bool
    iothread_exports: bool
    set_active: bool
    watch: bool


async def probe(monitor: Monitor) -> Features:
    """Ask a QEMU what it can do. Raises what `Monitor.execute` raises."""
    schema = await schema_of(monitor)
    missing = [words for command, words in _COMMANDS.items() if not schema.has(command)]
    missing += [words for path, words in _MEMBERS.items() if not schema.has(*path)]
    return Features(
        missing=tuple(missing),
        allow_inactive=schema.has("block-export-add", "allow-inactive"),
        iothread_exports=schema.has("block-job-change"),
        set_active=schema.has("blockdev-set-active"),
        watch=schema.has("block-export-add", "nbd", "bitmaps", "node"),
    )


async def schema_of(monitor: Monitor) -> Schema:
    """What this QEMU tells of its QMP; asked for once, because the answer is long. Raises as `Monitor.execute` does."""
    return await asyncio.shield(ask(monitor))


def ask(monitor: Monitor) -> asyncio.Task[Schema]:
    """Have the QEMU tell what it can do, which takes it long, beside whatever else is done meanwhile.

    Nobody need wait for the task: whoever comes to need the answer gets it, or why there is none.
    """
    if (asked := _ASKED.get(monitor)) is None:
        asked = _ASKED[monitor] = asyncio.create_task(_schema(monitor))
        asked.add_done_callback(_forget_failure)
    return asked


async def _schema(monitor: Monitor) -> Schema:
    return Schema(await monitor.execute("query-qmp-schema"))


def _forget_failure(asked: asyncio.Task[Schema]) -> None:
    """Who asks next asks anew."""
    if asked.cancelled() or asked.exception() is not None:
        for monitor in [each for each, task in _ASKED.items() if task is asked]:
            del _ASKED[monitor]


class Schema:
    """The reply of query-qmp-schema, to be asked for members by path (QEMU's introspect.json)."""

    def __init__(self, entities: list[Mapping[str, Any]]) -> None:
        """Index the reply: type names are meaningless numbers, commands have their own."""
        self._entities = {entity["name"]: entity for entity in entities}

    def has(self, command: str, *path: str) -> bool:
        """Whether `command` exists and takes `path`: a member, then a member of that one's type, and so on.

        The name of a union's branch leads into that branch; an enumeration's value ends a path; arrays are entered.
        """
        entity = self._entities.get(command)
        if entity is None or entity["meta-type"] != "command":
            return False
        types = {str(entity["arg-type"])}
        for step in path:
            types = {found for name in types for found in self._step(name, step)}
        return bool(types)

    def _step(self, name: str, step: str) -> Iterator[str]:
        entity = self._entities[name]
        match entity["meta-type"]:
            case "array":
                yield from self._step(entity["element-type"], step)
            case "enum":
                if step in entity["values"]:
                    yield name
            case "alternate":
                for member in entity["members"]:
                    yield from self._step(member["type"], step)
            case "object":
                yield from (member["type"] for member in entity["members"] if member["name"] == step)
                yield from (branch["type"] for branch in entity.get("variants", []) if branch["case"] == step)


_ASKED: WeakKeyDictionary[Monitor, asyncio.Task[Schema]] = WeakKeyDictionary()
