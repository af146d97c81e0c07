"""Whether the guest's disks still are those that recording started on.

A bitmap stays on its node when a snapshot, a pivot or an unplug puts that node aside; every later round would then be
empty and wrong without an error (FACTS.md, "QMP: dirty tracking"). So the picture is compared at every harvest.

Who backs a disk up, mirrors or exports it, changes nothing of that: what the guest writes passes the job's filter, and
then our node, whose bitmap sees it (QEMU's block/copy-before-write.c, block/mirror.c). It is told by itself
(`DisksInUse`), for one can go on after it, unless a pivot at its end has put our node aside. Commit, stream and
snapshot jobs count as changes from the start: at their end the chain is another, and a commit writes below our node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qemu_blkmig.errors import DisksInUse, TopologyChanged
from qemu_blkmig.qmp.disks import (
    OUR_NAMES,
    PASSING_JOBS,
    Disk,
    SkippedKind,
    active_jobs,
    identity,
    inventory,
)
from qemu_blkmig.qmp.monitor import Monitor


@dataclass(frozen=True, slots=True)
class _View:
    """What QEMU tells of all drives, with their bitmaps, jobs and exports at about one moment."""

    drives: Mapping[tuple[str, str], Mapping[str, Any]]
    jobs: Sequence[Mapping[str, Any]]
    exports: Sequence[Mapping[str, Any]]


class Topology:
    """The disks as they were when the snapshot was taken, to be compared with what they are now."""

    def __init__(
        self, monitor: Monitor, disks: Sequence[Disk], ours: str, view: _View, ignored: frozenset[tuple[str, str]]
    ) -> None:
        """Use `snapshot`."""
        self._monitor = monitor
        self._disks = tuple(disks)
        self._ours = ours
        self._ignored = ignored
        self._chains = {disk.name: _filenames(view.drives.get((disk.device, disk.qdev), {})) for disk in disks}

    @classmethod
    async def snapshot(cls, monitor: Monitor, disks: Sequence[Disk], *, ours: str = OUR_NAMES) -> Topology:
        """Remember `disks`; exports whose id begins with `ours` are no change.

        Raises `TopologyChanged` when they already differ from what QEMU tells now.
        """
        view, now = await asyncio.gather(_view(monitor), inventory(monitor))
        chosen = {(disk.device, disk.qdev) for disk in disks}
        left_out = {(disk.device, disk.qdev) for disk in now.disks}
        never = {(drive.device, drive.qdev) for drive in now.skipped if drive.kind is SkippedKind.NEVER}
        topology = cls(monitor, disks, ours, view, frozenset((left_out | never) - chosen))
        await topology.check()
        return topology

    async def check(self, recording: Sequence[str] = ()) -> dict[str, dict[str, int]]:
        """Compare; `recording` names the bitmaps that must be there and recording on every disk.

        Returns by bitmap and disk how many bytes these hold. Raises `TopologyChanged`, which names the disk and what
        happened to it, and what `Monitor.execute` raises.
        """
        view = await _view(self._monitor)
        # A job may have put a filter above the disk: that the job is there tells more.
        if (others := self._others(view)) is not None:
            raise others if await self._same_images() else TopologyChanged(others.what, disk=others.disk)
        for disk in self._disks:
            self._check_disk(disk, view)
        self._check_new(view)
        return {name: {disk.name: _recorded(disk, name, view) for disk in self._disks} for name in recording}

    def _check_disk(self, disk: Disk, view: _View) -> None:
        drive = view.drives.get((disk.device, disk.qdev))
        if drive is None:
            raise TopologyChanged("it was unplugged", disk=disk.name)
        inserted = drive.get("inserted")
        if inserted is None:
            raise TopologyChanged("its medium was removed", disk=disk.name)
        if inserted["node-name"] != disk.node or _filenames(drive) != self._chains[disk.name]:
            raise TopologyChanged(
                f"a snapshot was taken, or its image or chain was changed: the guest now writes to {inserted['file']} "
                f"({inserted['drv']}, node {inserted['node-name']}), not to node {disk.node} with the chain "
                f"{' <- '.join(self._chains[disk.name])}",
                disk=disk.name,
            )
        if inserted["ro"]:
            raise TopologyChanged("it became read-only", disk=disk.name)
        size = inserted["image"]["virtual-size"]
        if size != disk.size:
            raise TopologyChanged(f"it was resized from {disk.size} to {size} bytes", disk=disk.name)

    def _check_new(self, view: _View) -> None:
        known = {(disk.device, disk.qdev) for disk in self._disks} | self._ignored
        for key, drive in view.drives.items():
            inserted = drive.get("inserted")
            if key in known or inserted is None or "qdev" not in drive:
                continue
            if not inserted["ro"] and inserted["image"]["virtual-size"]:
                name = drive["device"] or inserted["node-name"]
                raise TopologyChanged(f"it was hot-plugged, or became writable ({inserted['file']})", disk=name)

    def _others(self, view: _View) -> TopologyChanged | None:
        """Who else is at work on the disks, if anybody is: first of all those after whom nothing can go on."""
        jobs = sorted(active_jobs(view.jobs), key=lambda job: job["type"] in PASSING_JOBS)
        for job in jobs:
            what = f"the block job {job['id']} ({job['type']}) was started by somebody else"
            return DisksInUse(what, advice="let it end") if job["type"] in PASSING_JOBS else TopologyChanged(what)
        owner = {layer.node: disk.name for disk in self._disks for layer in disk.layers}
        for export in view.exports:
            disk = owner.get(export["node-name"])
            if disk and not export["id"].startswith(self._ours):
                what = f"somebody exports it ({export['type']} export {export['id']})"
                return DisksInUse(what, disk=disk, advice="let that end")
        return None

    async def _same_images(self) -> bool:
        """Whether, whatever filters a job has put above them, the disks' nodes and files are what they were."""
        found = (await inventory(self._monitor)).disks
        now = {(disk.device, disk.qdev): (disk.images, disk.size) for disk in found}
        return all(now.get((disk.device, disk.qdev)) == (disk.images, disk.size) for disk in self._disks)


def _recorded(disk: Disk, name: str, view: _View) -> int:
    bitmaps = view.drives[disk.device, disk.qdev]["inserted"].get("dirty-bitmaps", [])
    bitmap = next((bitmap for bitmap in bitmaps if bitmap.get("name") == name), None)
    if bitmap is None:
        raise TopologyChanged(f"the bitmap {name} that records its writes is gone", disk=disk.name)
    if not bitmap["recording"]:
        raise TopologyChanged(f"the bitmap {name} does not record its writes any more", disk=disk.name)
    return min(int(bitmap["count"]), disk.size)


async def _view(monitor: Monitor) -> _View:
    drives, jobs, exports = await asyncio.gather(
        monitor.execute("query-block"),
        monitor.execute("query-jobs"),
        monitor.execute("query-block-exports"),
    )
    return _View({identity(drive): drive for drive in drives}, jobs, exports)


def bitmaps_by_node(nodes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Arrange the named dirty bitmaps of query-named-block-nodes by node, then by name."""
    return {
        node["node-name"]: {bitmap["name"]: bitmap for bitmap in node.get("dirty-bitmaps", []) if "name" in bitmap}
        for node in nodes
    }


def _filenames(drive: Mapping[str, Any]) -> tuple[str, ...]:
    """The file names of a query-block entry's chain, topmost first."""
    names: list[str] = []
    image = drive.get("inserted", {}).get("image")
    while image:
        names.append(image["filename"])
        image = image.get("backing-image")
    return tuple(names)
