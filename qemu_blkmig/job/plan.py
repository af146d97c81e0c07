"""The plan of a job: which disks, onto which images, and all that would fail, found before anything is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import msgspec

from qemu_blkmig.destination import devices
from qemu_blkmig.destination.files import FileId, boot_id, file_id, file_id_for, names_everywhere, opened_by
from qemu_blkmig.destination.protocol import Created, Files, FilesReply, Image, Inspect, InspectReply
from qemu_blkmig.destination.sharedfs import shared_file_system
from qemu_blkmig.errors import Refused
from qemu_blkmig.job.base_choice import BaseChoice, LayerThere
from qemu_blkmig.job.options import Selection
from qemu_blkmig.job.source_images import SourceImage, absolute, origin, troubles
from qemu_blkmig.job.target import TargetQemu, counterpart
from qemu_blkmig.qmp.disks import (
    Disk,
    Inventory,
    Skipped,
    SkippedKind,
    device_id,
    files_of,
    inventory,
    is_firmware,
    obstacles,
    select,
)
from qemu_blkmig.qmp.features import probe
from qemu_blkmig.qmp.foreign_bitmaps import foreign_bitmaps
from qemu_blkmig.qmp.guest import ASLEEP, ASLEEP_ADVICE, ASLEEP_TEXT, UNDER_WAY
from qemu_blkmig.qmp.monitor import Monitor
from qemu_blkmig.qmp.ram import unfit_capabilities
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.units import show_bytes

MIGRATABLE = ("running", "paused", "io-error", "watchdog", "prelaunch", "postmigrate")
"""Run states that a guest can be migrated in, and that its destination can be left in."""
NOTHING_TO_COPY = "none of the domain's disks is to be copied: virsh migrate moves such a one"
NO_NEED_OF_US = "run virsh migrate in place of this command: its options mean the same there"


@dataclass(frozen=True)
class Plan:
    """`images`: by disk name. `problems`: why it cannot be done; `warnings`: what the user should know.

    `process`: the source QEMU's process id, where it has one and it is known. `private`: by disk, how many layers of
    its chain lie above its shared base, filters included (see `Disk.layers`), where it has one. `layers`: those that
    are to be at the destination below the images, the lowest first; `places`: where the images' paths lead there, by
    disk, where there may be any.
    """

    disks: tuple[Disk, ...]
    skipped: tuple[Skipped, ...]
    images: dict[str, Image]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    process: int | None = None
    private: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[LayerThere, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)

    def source_images(self, host: str) -> list[SourceImage]:
        """The source's own image files and devices, with where they go to on `host`."""
        found = []
        for disk in self.disks:
            if path := absolute(disk.filename, self.process):
                data = absolute(disk.data_file, self.process) if disk.data_file else ""
                found.append(
                    SourceImage(disk.name, path, f"{host}:{self.images[disk.name].path}", data_file=data or None)
                )
        return found

    def require(self) -> None:
        """Raise `Refused` with all the problems, if there are any."""
        if self.problems:
            raise Refused("; ".join(self.problems), state="nothing was touched")


class Placed(NamedTuple):
    """A disk as libvirt's domain knows it: the name of its target, and the path of its image at the destination.

    `owner`: uid and gid that the image is to have there, None: the agent's own.
    """

    target: str
    path: str
    owner: tuple[int, int] | None = None


class Planner:
    """Collects the plan from the source QEMU, the destination's agent and, where there is one, its QEMU."""

    def __init__(
        self,
        agent: AgentClient | None,
        selection: Selection,
        directory: Path | None,
        tell: Callable[[str], None] = lambda _: None,
        begun: Sequence[Created] = (),
        placed: Mapping[str, Placed] | None = None,
        known: Collection[str] | None = None,
        *,
        layers_first: bool = False,
    ) -> None:
        """Without an agent and a directory there are no images: the disks go into a stream.

        `tell`: where it is told what takes long. `begun`: the images of a job that is resumed, and no others.
        `layers_first`: the plan is only looked at, and `layers` would bring what is between a base and the top layer.
        `placed`: by the device's id, the disks that take part, and no others; without it images go to `directory`.
        `known`: with `placed`, the ids of all that libvirt knows of; another disk is refused. None: it stays behind.
        """
        self._known = known
        self._placed = placed
        self._begun = {created.path: created for created in begun}
        self._agent = agent
        self._selection = selection
        self._directory = directory
        self._problems: list[str] = []
        self._warnings: list[str] = []
        self._process: int | None = None
        self._tell = tell
        self._bases = BaseChoice(agent, selection, self._problems, self._warnings, layers_first=layers_first)
        self._paths: dict[str, Path] = {}
        self._owners: dict[str, tuple[int, int] | None] = {}

    async def plan(self, source: Monitor, target: TargetQemu | None, prefix: str, *, with_ram: bool) -> Plan:
        """The plan for a guest. `target`: a QEMU that waits with images of its own. `prefix`: of what is ours.

        `with_ram`: its RAM is to move, too.
        """
        self._process = source.peer_pid
        await self._check_source(source, with_ram)
        all_there = await inventory(source)
        await self._check_known(source, all_there.disks)
        found = self._as_placed(all_there)
        try:
            disks = tuple(select(found, self._selection.disks))
        except Refused as error:
            disks = ()
            self._problems.append(NOTHING_TO_COPY if self._placed == {} else str(error))
        if disks:
            self._problems += await obstacles(source, disks, ours=prefix)
        await self._check_bitmaps(source, disks, with_ram)
        if with_ram and target is not None:
            self._problems += await unfit_capabilities(target.monitor)
        self._check_one_file_each(source.peer_pid, disks, found.disks)
        self._tell_left_out(found.disks, disks, found.skipped)
        images = await self._target_images(disks, target) if target else await self._directory_images(disks)
        own = {file_id_for(source.peer_pid, name) for name in await files_of(source)}
        await self._check_apart(images, own | opened_by(source.peer_pid))
        return await self._checked(disks, tuple(found.skipped), images)

    async def plan_image(self, disk: Disk, placed: Placed | None = None) -> Plan:
        """The plan for a disk without a guest. `placed`: where its image goes, if not into the directory."""
        if placed is not None:
            self._placed = {}
            self._place(disk.name, placed)
        images = await self._directory_images((disk,))
        await self._check_apart(images, {file_id(layer.filename) for layer in disk.layers})
        return await self._checked((disk,), (), images)

    async def _checked(self, disks: tuple[Disk, ...], skipped: tuple[Skipped, ...], images: dict[str, Image]) -> Plan:
        if self._begun:
            images = {name: self._as_begun(image) for name, image in images.items()}
        for disk in disks:
            self._check_disk(disk)
        if images:
            await self._check_destination(disks, images)
            await self._bases.check_apart(images)
            await self._bases.prove(disks, images, self._process, self._tell)
        return Plan(
            disks, skipped, images, tuple(self._problems), tuple(self._warnings), self._process, self._bases.private,
            tuple(self._bases.layers), self._bases.places,
        )  # fmt: skip

    def _as_placed(self, found: Inventory) -> Inventory:
        """The disks by the names that they have in libvirt's domain."""
        if self._placed is None:
            return found
        disks, left = [], list(found.skipped)
        for disk in found.disks:
            if (placed := self._placed.get(device_id(disk.qdev))) is None:
                left.append(Skipped(disk.name, SkippedKind.AS_IT_IS, "it was left out", disk.device, disk.qdev))
            else:
                disks.append(replace(disk, name=placed.target))
                self._place(placed.target, placed)
        why = {device_id(drive.qdev): f"it cannot be copied: {drive.reason}" for drive in found.skipped if drive.qdev}
        self._problems += [
            f"disk {placed.target}: {why.get(device, 'the source QEMU has no such disk that could be read')}"
            for device, placed in self._placed.items()
            if placed.target not in self._paths
        ]
        return Inventory(tuple(disks), tuple(left))

    async def _check_known(self, source: Monitor, found: Sequence[Disk]) -> None:
        """Who gives a domain's QEMU arguments of its own, gives it disks that libvirt knows nothing of."""
        for disk in found if self._known is not None else ():
            path = absolute(disk.filename, self._process)
            if device_id(disk.qdev) in (self._known or ()) or not path or shared_file_system(path):
                continue
            if not await is_firmware(source, disk):
                self._problems.append(
                    f"disk {disk.name} ({path}) is none that libvirt knows of, and would be left here: the guest would "
                    "go on with what is at the destination under that path; make it a <disk> of the domain "
                    "(--unsafe leaves it)"
                )

    def _place(self, disk: str, placed: Placed) -> None:
        self._paths[disk] = Path(placed.path)
        self._owners[disk] = placed.owner

    def _as_begun(self, image: Image) -> Image:
        identity = self._begun.get(image.path)
        if identity is None:
            self._problems.append(
                f"disk {image.disk}: {image.path} is not among the images that the job had begun; if the disk was "
                "plugged in since, unplug it, or begin anew"
            )
        return msgspec.structs.replace(image, identity=identity)

    async def _check_source(self, source: Monitor, with_ram: bool) -> None:
        features = await probe(source)
        self._problems += [f"the source QEMU is too old: it lacks {what}" for what in features.missing]
        status = (await source.execute("query-status"))["status"]
        if status == ASLEEP:
            self._problems.append(f"{ASLEEP_TEXT}: {ASLEEP_ADVICE}")
        elif status not in MIGRATABLE:
            self._problems.append(f"the guest is in run state {status}, which cannot be migrated")
        told = await source.execute("query-migrate")
        migration = told.get("status")
        if migration == "completed" and status == "postmigrate":
            self._problems.append("the guest was migrated away from this QEMU: it lives elsewhere now")
        elif with_ram and status == "postmigrate":
            self._problems.append(
                "a migration of this guest failed while it was paused (run state postmigrate): its QEMU migrates it "
                "only after it has run again (QMP commands cont, stop)"
            )
        if migration in UNDER_WAY:
            self._problems.append(f"another migration of this guest is under way (status {migration})")

        if with_ram:
            self._problems += await unfit_capabilities(source)
            self._problems += [f"QEMU cannot migrate this guest: {why}" for why in told.get("blocked-reasons", ())]

    async def _check_bitmaps(self, source: Monitor, disks: Sequence[Disk], with_ram: bool) -> None:
        for bitmaps in await foreign_bitmaps(source, disks):
            if not self._selection.keep_bitmaps:
                bitmaps = replace(bitmaps, lost="--bitmaps drop asked for that")
            elif not with_ram and bitmaps.lost is None:
                bitmaps = replace(bitmaps, lost="only a migration with RAM carries bitmaps")
            elif self._placed is not None and bitmaps.lost is None:
                bitmaps = replace(bitmaps, lost="libvirt migrates no bitmaps along with RAM")
            self._warnings.append(bitmaps.tell())

    def _check_one_file_each(self, process: int | None, disks: Sequence[Disk], known: Sequence[Disk]) -> None:
        """A bitmap sees what is written through its own node only."""
        seen: dict[FileId, Disk] = {}
        for disk in known:
            own = file_id_for(process, disk.filename)
            if own is not None and (other := seen.setdefault(own, disk)) is not disk and {disk, other} & set(disks):
                self._problems.append(
                    f"disk {disk.name} is the same file as disk {other.name} ({disk.filename}), opened a second time: "
                    "what is written to one is not seen at the other"
                )

    async def _check_apart(self, images: Mapping[str, Image], own: Collection[FileId | None]) -> None:
        """Locks do not tell of a source that was opened without them, or that shares its image with other writers.

        Two hosts may be one machine under two names, or containers of one; and no lock that is known to both of them
        is on a device that both are attached to, nor on a file of every file system that both have mounted.
        """
        if self._agent is None or not images:
            return
        one_machine = self._agent.there.boot_id == boot_id()
        used = [name for each in own for name in names_everywhere(each)]
        found = await self._agent.expect(Files([image.path for image in images.values()]), FilesReply)
        for (name, image), there, known in zip(images.items(), found.ids, found.names, strict=True):
            if one_machine and there is not None and there in own:
                self._problems.append(f"disk {name}: the destination {image.path} is a file of the source itself")
                continue
            same = devices.common(used, known)
            # What the job has begun was seen to be none of the source's then: most images were not there yet.
            if same is not None and (devices.is_certain(same) or image.path not in self._begun):
                self._problems.append(f"disk {name}: {_the_same(image.path, same)}")

    def _check_disk(self, disk: Disk) -> None:
        if disk.encrypted and not self._selection.allow_plaintext:
            self._problems.append(
                f"disk {disk.name} is encrypted and would be written to the destination in plain text; "
                "--allow-plaintext permits it"
            )
        if disk.snapshots and not self._selection.drop_snapshots:
            self._problems.append(
                f"disk {disk.name}: the internal snapshots of its image ({', '.join(disk.snapshots)}) would be lost: "
                "only what the guest sees now is sent; --drop-snapshots permits it (the source's image keeps them)"
            )
        if disk.data_file is not None:
            self._warnings.append(
                f"disk {disk.name} has its data in {disk.data_file}: at the destination it is in the image itself; "
                "here --source-images delete removes that file, too, rename leaves it"
            )
        if not self._selection.ignore_ownership:
            self._problems += troubles(disk, self._process)
        self._bases.check(disk)

    def _tell_left_out(self, known: Sequence[Disk], chosen: Sequence[Disk], skipped: Sequence[Skipped]) -> None:
        names = {disk.name for disk in chosen}
        for disk in known:
            if disk.name not in names:
                self._warnings.append(
                    f"disk {disk.name} is not migrated, as asked: the destination must have it already"
                )
        if self._placed is None:
            # Else whoever placed the disks tells of the others, by the names that they have there.
            self._warnings += [f"{other.name} is not migrated: {other.reason}" for other in skipped]

    async def _directory_images(self, disks: Sequence[Disk]) -> dict[str, Image]:
        self._name_images(disks)
        for disk in disks if self._selection.shared_base else ():
            await self._bases.choose(disk, self._paths.get(disk.name), self._owners.get(disk.name))
        return {disk.name: self._image(disk, self._paths[disk.name]) for disk in disks if disk.name in self._paths}

    def _name_images(self, disks: Sequence[Disk]) -> None:
        if self._directory is None or self._placed is not None:
            return
        names = Counter(Path(disk.filename).name for disk in disks)
        for disk in disks:
            name = Path(disk.filename).name
            if not name:
                name = f"{disk.name}.{disk.format}"
            elif names[name] > 1:
                name = f"{disk.name}-{name}"
            self._paths[disk.name] = self._directory / name

    def _image(self, disk: Disk, path: Path) -> Image:
        return Image(
            disk=disk.name,
            path=str(path),
            format="raw" if disk.encrypted and disk.format == "luks" else disk.format,
            size=disk.size,
            create=True,
            known_zero=self._selection.target_is_zero,
            backing=self._bases.upon(disk),
            cluster_size=disk.cluster_size,
            preallocation=self._selection.preallocation,
            origin=origin(disk, self._process),
            compared=self._selection.compare,
            owner=self._owners.get(disk.name),
        )

    async def _target_images(self, disks: Sequence[Disk], target: TargetQemu) -> dict[str, Image]:
        candidates = (await target.inventory()).disks
        images = {}
        for disk in disks:
            other = counterpart(disk, candidates)
            if other is None:
                self._problems.append(
                    f"disk {disk.name}: the destination QEMU has no such disk (it has: "
                    f"{', '.join(candidate.name for candidate in candidates) or 'none'})"
                )
            elif other.size != disk.size:
                self._problems.append(
                    f"disk {disk.name}: its size is {disk.size} bytes, the destination QEMU's disk has {other.size}"
                )
            elif other.encrypted:
                self._problems.append(f"disk {disk.name}: the destination's image is encrypted, we cannot write it")
            elif self._selection.shared_base and disk.backing is not None and other.backing is None:
                self._problems.append(f"disk {disk.name}: the destination's image has no backing file to be shared")
            else:
                images[disk.name] = Image(
                    disk=disk.name,
                    backing=self._bases.take(other, disk),
                    path=other.filename,
                    format=other.format,
                    size=other.size,
                    create=False,
                    known_zero=self._selection.target_is_zero,
                    origin=origin(disk, self._process),
                    compared=self._selection.compare,
                )
        return images

    async def _check_destination(self, disks: Sequence[Disk], images: dict[str, Image]) -> None:
        if self._agent is None:
            return
        reply = await self._agent.expect(Inspect(list(images.values())), InspectReply)
        self._problems += [f"disk {p.disk}: at the destination: {p.what}" if p.disk else p.what for p in reply.problems]
        fate = "only what differs is sent" if self._selection.compare else "it is overwritten"
        if not self._begun:
            self._warnings += [f"{path} is there already: {fate}" for path in reply.there]
            self._warnings += [f"{words}; that job cannot go on with it after this" for words in reply.incomplete]
        if self._selection.compare:
            self._warnings += [
                f"disk {name}: {image.path} is not there yet: nothing to compare with, it is copied whole"
                for name, image in images.items()
                if image.create and image.path not in reply.there
            ]
        occupied = {disk.name: disk.allocated or 0 for disk in disks}
        free = {room.device: room.free for room in reply.rooms}
        for device, bytes_free in free.items():
            here = [room.disk for room in reply.rooms if room.device == device]
            if (needed := sum(occupied[disk] for disk in here)) > bytes_free:
                where = ", ".join(sorted({str(Path(images[disk].path).parent) for disk in here}))
                what = f"{show_bytes(bytes_free)} free, the disks that go there occupy {show_bytes(needed)}"
                self._warnings.append(f"{where} has {what}")


def _the_same(path: str, known: str) -> str:
    what = "file" if known.startswith("inode ") else "device"
    other = "" if devices.is_certain(known) else f"; if these are two {what}s, change that of one of them"
    return (
        f"{path} is the same {what} at both hosts ({known}): it is shared storage, and must not be copied onto itself; "
        f"leave the disk out (--migrate-disks), or name another {what} there{other}"
    )


def together(plans: Sequence[Plan]) -> Plan:
    """One plan of several without a guest, for disks of different names."""
    return Plan(
        disks=tuple(disk for plan in plans for disk in plan.disks),
        skipped=(),
        images={name: image for plan in plans for name, image in plan.images.items()},
        problems=tuple(problem for plan in plans for problem in plan.problems),
        warnings=tuple(warning for plan in plans for warning in plan.warnings),
        private={name: layers for plan in plans for name, layers in plan.private.items()},
        layers=tuple(layer for plan in plans for layer in plan.layers),
        places={name: place for plan in plans for name, place in plan.places.items()},
    )


async def verify_launched(plan: Plan, target: TargetQemu) -> None:
    """Raise `Refused` unless the QEMU that we launched uses just the images that we fill, each for the right disk."""
    found = (await target.inventory()).disks
    for disk in plan.disks:
        other = counterpart(disk, found)
        image = plan.images[disk.name]
        if other is None:
            raise Refused(
                "the --launch command gives the guest no such disk "
                f"(it has: {', '.join(candidate.name for candidate in found) or 'none'})",
                disk=disk.name,
                advice="its devices must be the same as the source's",
            )
        uses, filled = await target.files([other.filename, image.path])
        if filled is None or uses != filled:
            raise Refused(
                f"the --launch command uses {other.filename} for it, but the image is {image.path}", disk=disk.name
            )
        if other.size != disk.size:
            raise Refused(f"the --launch command's disk has {other.size} bytes, not {disk.size}", disk=disk.name)
