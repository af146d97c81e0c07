"""Which disks a guest has, what lies under each of them, and what would stand in the way of migrating them.

Everything is found by QMP (QEMU's block-core.json: query-block, query-blockstats, query-named-block-nodes), for disks
made by -drive and by -blockdev alike.
"""

from __future__ import annotations

import asyncio
import enum
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qemu_blkmig.errors import Refused
from qemu_blkmig.qmp.features import probe
from qemu_blkmig.qmp.monitor import CommandFailed, Monitor

OUR_NAMES = "blkmig-"
"""What the names of all that this project makes in a QEMU begin with."""

CD_ROM = "it is a CD-ROM"

_FILTERS = {"blkdebug", "blklogwrites", "blkreplay", "blkverify", "compress", "copy-before-write", "copy-on-read"}
_FILTERS |= {"preallocate", "snapshot-access", "throttle", "backup-top", "commit_top", "mirror_top"}
_FORMATS = {"bochs", "cloop", "dmg", "luks", "parallels", "qcow", "qcow2", "qed", "raw", "vdi", "vhdx", "vmdk", "vpc"}
_PASSIVE_JOBS = {"create"}
PASSING_JOBS = {"backup", "mirror"}
"""Jobs that, as long as they have not ended in a pivot, only read the disk's nodes, below filters of their own."""


@dataclass(frozen=True, slots=True)
class Backing:
    """A backing file: `filename` as the image names it, `full` as QEMU resolved it, its `format`, if the image says."""

    filename: str
    full: str
    format: str | None


@dataclass(frozen=True, slots=True)
class Layer:
    """One node of a disk's chain. `filter`: it only passes requests on (throttle, ...), and has no image of its own.

    `backing`: what its image names; QEMU may use something else. `encrypted`: by LUKS or qcow2, in this very image.
    """

    node: str
    driver: str
    filename: str
    filter: bool
    backing: Backing | None = None
    encrypted: bool = False

    @property
    def format(self) -> str:
        """The image's: raw, too, where no driver lies between it and its file."""
        return "raw" if self.driver in ("file", "host_device") else self.driver


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk that can be migrated.

    `name`: what the user calls it, unique: the -drive id, else the device's id, else the node's name. `device`: the
    -drive id or "". `qdev`: the device's id or QOM path. `node`: the topmost node, which all the guest's writes pass.
    `format`: the image's ("raw" where there is none). `size`: virtual, bytes. `layers`: the whole chain, topmost
    first, filters too; they count in qemu:allocation-depth, so depth n is layers[n - 1]. `allocated`: what the image
    occupies, bytes, where QEMU knows. `encrypted`: by LUKS or qcow2, in any layer. `snapshots`: names of the internal
    ones of a qcow2 image. `data_file`: where a qcow2 image has its data, if that is the file that it names.
    """

    name: str
    device: str
    qdev: str
    node: str
    format: str
    size: int
    filename: str
    backing: Backing | None
    layers: tuple[Layer, ...]
    cluster_size: int | None
    encrypted: bool
    allocated: int | None
    snapshots: tuple[str, ...] = ()
    data_file: str | None = None

    @property
    def images(self) -> list[tuple[str, str]]:
        """Nodes and files of the chain, topmost first, without filters, which have no image of their own."""
        return [(layer.node, layer.filename) for layer in self.layers if not layer.filter]


class SkippedKind(enum.Enum):
    """Whether a drive that does not take part may come to be one that should."""

    NEVER = "a CD-ROM drive, or a further name of a disk that takes part"
    AS_IT_IS = "empty, unused, read-only or of size 0"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A drive that does not take part, and why, in words. `device` and `qdev` as in `Disk`."""

    name: str
    kind: SkippedKind
    reason: str
    device: str
    qdev: str


@dataclass(frozen=True, slots=True)
class Inventory:
    """All drives of a guest."""

    disks: tuple[Disk, ...]
    skipped: tuple[Skipped, ...]


async def inventory(monitor: Monitor) -> Inventory:
    """Find all drives of the guest. Raises what `Monitor.execute` raises."""
    drives, statistics, nodes = await asyncio.gather(
        monitor.execute("query-block"),
        monitor.execute("query-blockstats"),
        monitor.execute("query-named-block-nodes", {"flat": True}),
    )
    # query-blockstats walks the same list as query-block, and it alone tells the node names of a chain.
    chains = {identity(entry): _chain(entry) for entry in statistics}
    by_node = {node["node-name"]: node for node in nodes}
    disks: list[Disk] = []
    skipped: list[Skipped] = []
    taken: set[str] = set()
    for drive in drives:
        name = _unique_name(drive, taken)
        why = await _why_skipped(monitor, drive, disks)
        if why:
            skipped.append(Skipped(name, *why, drive["device"], drive.get("qdev", "")))
        else:
            disks.append(_disk(name, drive, chains[identity(drive)], by_node))
    return Inventory(tuple(disks), tuple(skipped))


async def files_of(monitor: Monitor) -> set[str]:
    """The names of all files and devices that the guest's QEMU has, whatever it has them for, and by what layers."""
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    return {plain_filename(node["file"]) for node in nodes}


def identity(drive: Mapping[str, Any]) -> tuple[str, str]:
    """What tells a drive from the others in query-block and query-blockstats."""
    return drive.get("device", ""), drive.get("qdev", "")


def select(inventory: Inventory, names: Sequence[str] | None) -> tuple[Disk, ...]:
    """Return the disks of these names, in the guest's order; None: all that can be migrated.

    A disk answers to its name and to whatever else QEMU knows it by: drive id, device id or path, topmost node.

    Raises `Refused`: a name is unknown, or the drive cannot be migrated, or there is nothing to migrate.
    """
    known = {disk.name for disk in inventory.disks}
    reasons = {drive.name: drive.reason for drive in inventory.skipped}
    for name in names or ():
        if name in reasons:
            raise Refused(f"cannot be migrated: {reasons[name]}", disk=name, advice="leave it out of the list")
        if not any(name in _aliases(disk) for disk in inventory.disks):
            raise Refused(f"the guest has no disk {name!r}; its disks are: {', '.join(sorted(known)) or 'none'}")
    chosen = tuple(disk for disk in inventory.disks if names is None or _aliases(disk) & set(names))
    if not chosen:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise Refused(f"there is no disk to migrate ({told or 'the guest has no drives, or none was named'})")
    return chosen


def _aliases(disk: Disk) -> set[str]:
    return {disk.name, disk.device, disk.qdev, disk.node} - {""}


async def obstacles(monitor: Monitor, disks: Sequence[Disk], *, ours: str) -> list[str]:
    """Tell in words what stands in the way of migrating `disks`; names that begin with `ours` are this migration's."""
    jobs, exports, nodes = await asyncio.gather(
        monitor.execute("query-jobs"),
        monitor.execute("query-block-exports"),
        monitor.execute("query-named-block-nodes", {"flat": True}),
    )
    found = [f"the block job {job['id']} ({job['type']}) is {job['status']}: let it end" for job in active_jobs(jobs)]
    found += await _unsafe_iothreads(monitor, disks)
    found += [
        f"disk {disk.name} is passed through (scsi-block): QEMU does not see what is written to it"
        for disk in disks
        if await _property(monitor, disk.qdev, "type") == "scsi-block"
    ]
    owner = {layer.node: disk.name for disk in disks for layer in disk.layers}
    named = [(export["node-name"], export["id"]) for export in exports if export["id"].startswith(OUR_NAMES)]
    named += [(node["node-name"], bitmap.get("name", "")) for node in nodes for bitmap in node.get("dirty-bitmaps", [])]
    for export in exports:
        disk = owner.get(export["node-name"])
        if disk and not export["id"].startswith((ours, OUR_NAMES)):
            found.append(f"disk {disk}: somebody exports it ({export['type']} export {export['id']})")
    return found + _of_other_jobs(
        (owner[node], name) for node, name in named if node in owner and not name.startswith(ours)
    )


def _of_other_jobs(named: Iterable[tuple[str, str]]) -> list[str]:
    """What other jobs of ours have, or left, on disks: `named` has the disks and the names."""
    left: dict[tuple[str, str], list[str]] = {}
    for disk, name in named:
        if name.startswith(OUR_NAMES):
            left.setdefault((disk, name.removeprefix(OUR_NAMES).partition("-")[0]), []).append(name)
    return [
        f"disk {disk}: job {job} of qemu-blkmig works on it, or was left behind ({', '.join(names)}); "
        f"if it runs no more: qemu-blkmig cleanup {job}"
        for (disk, job), names in left.items()
    ]


async def _unsafe_iothreads(monitor: Monitor, disks: Sequence[Disk]) -> list[str]:
    """Disks on an iothread of a QEMU that would abort when an NBD client leaves (see `Features`)."""
    if not await monitor.execute("query-iothreads") or (await probe(monitor)).iothread_exports:
        return []
    return [
        f"disk {disk.name} is on an iothread, and this QEMU aborts, and the guest with it, when an NBD client leaves "
        "the export of such a disk (seen on 7.2.22; QEMUs from 8.2 on have that mended): restart the guest without "
        "iothread=, or with a newer QEMU"
        for disk in disks
        if await _on_iothread(monitor, disk.qdev)
    ]


async def _on_iothread(monitor: Monitor, qdev: str) -> bool:
    """Whether the device, or a controller above it (virtio-scsi), has its `iothread` set."""
    path = qdev
    while path:
        if await _property(monitor, path, "iothread"):
            return True
        bus = await _property(monitor, path, "parent_bus")
        path = bus.rpartition("/")[0]
    return False


async def is_firmware(monitor: Monitor, disk: Disk) -> bool:
    """Whether it is flash memory, whose content QEMU migrates along with RAM, and writes at the destination."""
    return (await _property(monitor, disk.qdev, "type")).startswith("cfi.pflash")


async def _property(monitor: Monitor, path: str, name: str) -> str:
    try:
        return str(await monitor.execute("qom-get", {"path": path, "property": name}))
    except CommandFailed:
        return ""


def active_jobs(jobs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return those of query-jobs that may still change what a disk's chain looks like."""
    return [job for job in jobs if job["status"] != "concluded" and job["type"] not in _PASSIVE_JOBS]


def _chain(entry: Mapping[str, Any]) -> list[str]:
    """The node names of a query-blockstats entry, topmost first; filters count their child as backing."""
    chain: list[str] = []
    layer: Mapping[str, Any] | None = entry
    while layer and "node-name" in layer:
        chain.append(layer["node-name"])
        layer = layer.get("backing")
    return chain


def _unique_name(drive: Mapping[str, Any], taken: set[str]) -> str:
    wanted = drive["device"] or _device_name(drive) or "drive"
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted}-{number}", number + 1
    taken.add(name)
    return name


def device_id(qdev: str) -> str:
    """The id of the device at a QOM path, or of that which it is part of; the path's last part where there is none.

    A disk on USB is such a part: /machine/peripheral/ID/ID.0/legacy[0].
    """
    named = qdev.removeprefix("/machine/peripheral/")
    return named.partition("/")[0] if named != qdev else qdev.removesuffix("/virtio-backend").rpartition("/")[2]


def _device_name(drive: Mapping[str, Any]) -> str:
    path = drive.get("qdev", "").removesuffix("/virtio-backend")
    if "-anon/" not in path and "/unattached/" not in path:
        return device_id(path)
    return str(drive.get("inserted", {}).get("node-name", "") or path.rpartition("/")[2])


async def _why_skipped(
    monitor: Monitor, drive: Mapping[str, Any], disks: Sequence[Disk]
) -> tuple[SkippedKind, str] | None:
    inserted = drive.get("inserted")
    if drive["removable"] and await _is_cd_rom(monitor, drive):
        return SkippedKind.NEVER, CD_ROM if inserted else "it is an empty CD-ROM drive"
    if not inserted:
        return SkippedKind.AS_IT_IS, "the drive is empty"
    if "qdev" not in drive:
        return SkippedKind.AS_IT_IS, "no device of the guest uses it"
    if inserted["ro"]:
        return SkippedKind.AS_IT_IS, "it is read-only"
    if inserted["image"]["virtual-size"] == 0:
        return SkippedKind.AS_IT_IS, "its size is 0"
    for disk in disks:
        if disk.node == inserted["node-name"]:
            return SkippedKind.NEVER, f"it is the same image as disk {disk.name}"
    return None


async def _is_cd_rom(monitor: Monitor, drive: Mapping[str, Any]) -> bool:
    if "qdev" not in drive:
        return False
    return (await _property(monitor, drive["qdev"], "type")).endswith("-cd")


def _disk(name: str, drive: Mapping[str, Any], chain: Sequence[str], nodes: Mapping[str, Any]) -> Disk:
    top = drive["inserted"]
    # A node that query-block shows and the list of named nodes does not is an implicit filter of a block job.
    layers = tuple(_layer(nodes[node]) for node in chain if node in nodes)
    image_layer = next((layer for layer in layers if not layer.filter), layers[-1])
    image = nodes[image_layer.node]["image"]
    data_file = data_file_of(image)
    return Disk(
        name=name,
        device=drive["device"],
        qdev=drive["qdev"],
        node=top["node-name"],
        format=image_layer.driver if image_layer.driver in _FORMATS else "raw",
        size=top["image"]["virtual-size"],
        filename=plain_filename(image_layer.filename),
        backing=named_backing(image),
        layers=layers,
        cluster_size=image.get("cluster-size"),
        encrypted=any(layer.encrypted or nodes[layer.node]["encrypted"] for layer in layers),
        allocated=image.get("actual-size"),
        snapshots=snapshots_in(image),
        # Options may name another than the image does.
        data_file=data_file if data_file in {node["file"] for node in nodes.values()} else None,
    )


def snapshots_in(image: Mapping[str, Any]) -> tuple[str, ...]:
    """The internal snapshots that QEMU or qemu-img tells of an image (ImageInfo)."""
    return tuple(snapshot["name"] or snapshot["id"] for snapshot in image.get("snapshots", ()))


def data_file_of(image: Mapping[str, Any]) -> str | None:
    """The external data file that QEMU or qemu-img tells of an image (ImageInfo)."""
    name: str | None = image.get("format-specific", {}).get("data", {}).get("data-file")
    return name


def _layer(node: Mapping[str, Any]) -> Layer:
    driver = node["drv"]
    backing = named_backing(node["image"])
    return Layer(
        node["node-name"], driver, node["file"], driver in _FILTERS, backing, encrypted=is_encrypted(node["image"])
    )


def plain_filename(told: str) -> str:
    """The file's own name where QEMU tells a json: pseudo-file name, as it does for LUKS and filters; else `told`.

    A part of a file (raw with offset and size) is not that file.
    """
    if not told.startswith("json:"):
        return told
    description: Any = json.loads(told.removeprefix("json:"))
    while isinstance(description, dict) and not {"offset", "size"} & description.keys():
        if "filename" in description:
            return plain_filename(str(description["filename"]))
        description = description.get("file") or description.get("image")
    return told


def named_backing(image: Mapping[str, Any]) -> Backing | None:
    """The backing file that an image names, by QEMU's ImageInfo, which qemu-img tells as well."""
    if "backing-filename" not in image:
        return None
    filename = image["backing-filename"]
    return Backing(filename, image.get("full-backing-filename", filename), image.get("backing-filename-format"))


def is_encrypted(image: Mapping[str, Any]) -> bool:
    """By what QEMU or qemu-img tells of an image (ImageInfo)."""
    return bool(image.get("encrypted")) or image["format"] == "luks"
