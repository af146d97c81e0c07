"""Dirty bitmaps of others, a backup tool's mostly, on the disks: which of them QEMU can take along, and how.

QEMU's own migration carries bitmaps (capability dirty-bitmaps); which, and to where, says its parameter
block-bitmap-mapping. With one in it that is in use, as ours are, the migration fails. Bitmaps on nodes whose name QEMU
made up itself (#block123) are refused by it (migration/block-dirty-bitmap.c). And a persistent bitmap that was once
carried is never stored in the source's image again, not even after a migration that was given up (seen on 7.2.22): so
what travels is a copy, not persistent, under the original's name, made persistent where it arrives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qemu_blkmig.qmp.disks import OUR_NAMES, Disk
from qemu_blkmig.qmp.features import schema_of
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.qmp.removal import remove_bitmaps

_TRANSFORM = ("migrate-set-parameters", "block-bitmap-mapping", "bitmaps", "transform", "persistent")


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One of somebody's bitmaps; `granularity` in bytes, `recording`: it is enabled."""

    name: str
    granularity: int
    recording: bool
    persistent: bool


@dataclass(frozen=True, slots=True)
class ForeignBitmaps:
    """Bitmaps on `node` of `disk`. `lost`: why they cannot be carried, in words; None: they can."""

    disk: str
    node: str
    bitmaps: tuple[Bitmap, ...]
    lost: str | None

    def tell(self) -> str:
        """In words, what becomes of them."""
        names = ", ".join(bitmap.name for bitmap in self.bitmaps)
        which = f"disk {self.disk}: somebody's dirty bitmaps ({names})"
        if self.lost is None:
            return f"{which} go with it"
        return f"{which} will not be at the destination: {self.lost}; what relies on them has to make a full backup"


@dataclass(frozen=True, slots=True)
class Carried:
    """Copies of bitmaps that QEMU's migration carries, from one node to another; originals by the copies' names."""

    node: str
    there: str
    copies: Mapping[str, Bitmap]

    def mapping(self, *, arriving: bool) -> dict[str, Any]:
        """One entry of block-bitmap-mapping, for the source or for where it is `arriving`."""
        bitmaps: list[dict[str, Any]] = []
        for copy, original in self.copies.items():
            if arriving:
                transform = {"persistent": original.persistent}
                bitmaps.append({"name": original.name, "alias": original.name, "transform": transform})
            else:
                bitmaps.append({"name": copy, "alias": original.name})
        return {"node-name": self.there if arriving else self.node, "alias": self.node, "bitmaps": bitmaps}


async def copy_bitmaps(
    monitor: Monitor, found: Sequence[ForeignBitmaps], nodes: Mapping[str, str], prefix: str
) -> list[Carried]:
    """Make the copies that are to travel, to the destination's `nodes` (by disk), recording where the originals do.

    Earlier copies are removed: their names begin with `prefix`, as these do. Raises what `Monitor.execute` raises.
    """
    await remove_bitmaps(monitor, f"{prefix}-carried")
    carried: list[Carried] = []
    actions: list[dict[str, Any]] = []
    for group in found:
        copies = {f"{prefix}-carried{len(actions) + number}": bitmap for number, bitmap in enumerate(group.bitmaps)}
        carried.append(Carried(group.node, nodes[group.disk], copies))
        for name, bitmap in copies.items():
            made = {"node": group.node, "name": name, "granularity": bitmap.granularity, "persistent": False}
            made["disabled"] = not bitmap.recording
            merged = {"node": group.node, "target": name, "bitmaps": [bitmap.name]}
            actions.append({"type": "block-dirty-bitmap-add", "data": made})
            actions.append({"type": "block-dirty-bitmap-merge", "data": merged})
    if actions:
        await monitor.execute("transaction", {"actions": actions})
    return carried


async def foreign_bitmaps(monitor: Monitor, disks: Sequence[Disk]) -> list[ForeignBitmaps]:
    """The bitmaps of others on the disks. Raises what `Monitor.execute` raises."""
    nodes = {node["node-name"]: node for node in await monitor.execute("query-named-block-nodes", {"flat": True})}
    can_map = (await schema_of(monitor)).has(*_TRANSFORM)
    found: list[ForeignBitmaps] = []
    for disk in disks:
        below = False
        for layer in disk.layers:
            there = [b for b in nodes[layer.node].get("dirty-bitmaps", []) if _is_foreign(b)]
            why = _why_lost(disk, layer.node, below=below, can_map=can_map)
            damaged = [bitmap for bitmap in there if bitmap.get("inconsistent")]
            in_use = [bitmap for bitmap in there if bitmap["busy"]]
            sound = [bitmap for bitmap in there if bitmap not in damaged and bitmap not in in_use]
            found += _of(disk, layer.node, sound, why)
            found += _of(disk, layer.node, damaged, "its QEMU calls it inconsistent")
            found += _of(disk, layer.node, in_use, "somebody uses it at the moment")
            below = below or not layer.filter
    return found


def image_node(disk: Disk | None) -> str | None:
    """The node of the disk's topmost image, where it has a name of its own."""
    images = [layer.node for layer in disk.layers if not layer.filter] if disk is not None else []
    return images[0] if images and not images[0].startswith("#") else None


def _is_foreign(bitmap: dict[str, Any]) -> bool:
    return bool(bitmap.get("name")) and not bitmap["name"].startswith(OUR_NAMES)


def _of(disk: Disk, node: str, bitmaps: Iterable[dict[str, Any]], lost: str | None) -> list[ForeignBitmaps]:
    told = tuple(
        Bitmap(bitmap["name"], bitmap["granularity"], bitmap["recording"], bitmap["persistent"]) for bitmap in bitmaps
    )
    return [ForeignBitmaps(disk.name, node, told, lost)] if told else []


def _why_lost(disk: Disk, node: str, *, below: bool, can_map: bool) -> str | None:
    if below:
        return "it belongs to a layer below the top one"
    if disk.format != "qcow2" or disk.encrypted:
        return f"an image of format {disk.format} cannot hold it" if disk.format != "qcow2" else "the disk is encrypted"
    if node.startswith("#"):
        return "its node has no name of its own (node-name=...)"
    return None if can_map else "its QEMU cannot be told which bitmaps to carry and how"
