"""What the images of a plan are to stand upon at the destination: a base that both sides share, or layers above it.

Chosen by what the user says and what the destination has; then looked at for all that would fail, and proven.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_blkmig.destination.protocol import Backing as SharedBase
from qemu_blkmig.destination.protocol import Files, FilesReply, Image, Inspect, InspectReply
from qemu_blkmig.errors import Refused
from qemu_blkmig.job.base_proof import Proof
from qemu_blkmig.job.bases import Base, bases_of, like, paths_there
from qemu_blkmig.job.options import Selection
from qemu_blkmig.qmp.disks import Disk
from qemu_blkmig.transport.client import AgentClient


@dataclass(frozen=True)
class LayerThere:
    """A layer of a disk's chain that is to be at the destination, as `path`; `there`: it is.

    `file`: the source's, by its plain name, of `format`. `owner`: uid and gid that it is to have there. `place`: where
    `path` leads there; two paths may lead to one.
    """

    disk: str
    file: str
    format: str
    path: str
    owner: tuple[int, int] | None
    there: bool
    place: str


@dataclass(frozen=True)
class _Chosen:
    """The `base` of a disk, at the destination as `path`, of `format`.

    `upon`: what the disk's own image is made, or found, upon; None: a layer that is to come there before it is made.
    `kept`: the layers of the source's chain from below the top one down to the base, where they stay what they are.
    """

    base: Base
    path: str
    format: str
    upon: SharedBase | None
    kept: Sequence[Base] = ()


def apart(layers: Sequence[LayerThere], images: Mapping[str, Image], places: Mapping[str, str]) -> list[str]:
    """What keeps these layers and images from being at one destination: each has a place of its own (`places`: the
    images', by disk).

    Whether a layer that is there is what each disk has, is proven by its content.
    """
    names = {places.get(name, posixpath.normpath(image.path)): name for name, image in images.items()}
    first: dict[str, LayerThere] = {}
    problems = []
    for layer in layers:
        if (image := names.get(layer.place)) is not None:
            problems.append(
                f"disk {layer.disk}: its layer {layer.file} would come to {layer.path}, where the image of disk "
                f"{image} goes"
            )
        other = first.setdefault(layer.place, layer)
        if not layer.there and os.path.realpath(other.file) != os.path.realpath(layer.file):
            problems.append(
                f"disk {layer.disk}: its layer {layer.file} would come to {layer.path}, and so would {other.file}, a "
                f"layer of disk {other.disk}"
            )
    return problems


class BaseChoice:
    """Chooses for one disk after another; `problems` and `warnings` are the plan's, and are added to.

    `layers_first`: the plan is only looked at, and `layers` brings what is missing between a base and the top layer.
    """

    def __init__(
        self,
        agent: AgentClient | None,
        selection: Selection,
        problems: list[str],
        warnings: list[str],
        *,
        layers_first: bool,
    ) -> None:
        self._agent = agent
        self._selection = selection
        self._problems = problems
        self._warnings = warnings
        self._layers_first = layers_first
        self._chosen: dict[str, _Chosen] = {}
        self._layers: dict[str, list[LayerThere]] = {}
        self.places: dict[str, str] = {}
        """Where the images' paths lead at the destination, by disk, where there may be layers (--flatten no)."""

    @property
    def private(self) -> Mapping[str, int]:
        """By disk, how many layers of its chain lie above its base."""
        return {disk: chosen.base.above for disk, chosen in self._chosen.items()}

    @property
    def layers(self) -> list[LayerThere]:
        """Those that are to be at the destination below the disks' own images, each once, the lowest first."""
        by_place = {layer.place: layer for layers in self._layers.values() for layer in reversed(layers)}
        return list(by_place.values())

    def upon(self, disk: Disk) -> SharedBase | None:
        """What the disk's image is made, or found, upon."""
        chosen = self._chosen.get(disk.name)
        return None if chosen is None else chosen.upon

    async def choose(self, disk: Disk, image: Path | None, owner: tuple[int, int] | None) -> None:
        """As the user says; else the topmost one that the destination has. `image`: the disk's own there."""
        wanted = self._wanted(disk)
        if not wanted:
            return
        if image is None or self._agent is None:
            shared = wanted[0].shared
            self._chosen[disk.name] = _Chosen(wanted[0], shared.path, shared.format, shared)
            return
        flatten, bases = self._selection.flatten, bases_of(disk)
        paths = paths_there(bases, image, flatten=flatten)
        there, places = await self._looked_at(self._agent, paths)
        found = [number for number, base in enumerate(bases) if base in wanted and there[number]]
        if not found:
            missing = ", ".join(path for base, path in zip(bases, paths, strict=True) if base in wanted)
            self._problems.append(f"disk {disk.name}: the destination has none of its bases: {missing}")
            return
        number = found[0]
        base = bases[number]
        upon: SharedBase | None = base.shared
        kept: Sequence[Base] = ()
        if not flatten:
            kept = bases[: number + 1]
            self._layers[disk.name] = [
                LayerThere(disk.name, each.file, each.layer.format, path, owner, is_there, place)
                for each, path, is_there, place in zip(kept, paths, there, places, strict=False)
            ]
            self._check_readable(disk, kept, there)
            await self._check_layers(self._agent, disk, self._layers[disk.name])
        if self._layers_first and not flatten:
            made = there[0] or (await self._look(self._agent, str(image)))[0]
            upon = bases[0].shared if made else None
        self._chosen[disk.name] = _Chosen(base, paths[number], base.shared.format, upon, kept)

    def take(self, other: Disk, disk: Disk) -> SharedBase | None:
        """The base that a waiting QEMU's disk stands upon; the source's layer that it stands for is the disk's base."""
        theirs = bases_of(other)
        if not (self._selection.shared_base and theirs and (bases := self._wanted(disk))):
            return None
        base, upon = like(bases, theirs[0]), theirs[0].shared
        if base is None:
            self._problems.append(
                f"disk {disk.name}: the destination's image stands upon {theirs[0].file}, which by its name is none of "
                f"the source's bases: {', '.join(each.file for each in bases)}; name the one that is meant by --base"
            )
            return None
        kept = () if self._selection.flatten else bases_of(disk)[: base.private]
        self._chosen[disk.name] = _Chosen(base, str(Path(other.filename).parent / upon.path), upon.format, upon, kept)
        return upon

    def check(self, disk: Disk) -> None:
        """An overlay may be used upon another file than its image names: QEMU's options and `backing: null` do that."""
        if not self._selection.shared_base:
            return
        if disk.backing is None:
            self._warnings.append(f"disk {disk.name} has no backing file: it is copied whole")
        elif not bases_of(disk):
            self._problems.append(
                f"disk {disk.name}: its image names {disk.backing.filename} as its backing file, but the source QEMU "
                "uses no backing file: that base cannot be shared"
            )
        elif (chosen := self._chosen.get(disk.name)) is not None:
            self._check_chosen(disk, chosen)

    async def check_apart(self, images: Mapping[str, Image]) -> None:
        """See `apart`."""
        layers = [layer for layers in self._layers.values() for layer in layers]
        if self._agent is not None and not self._selection.flatten:
            for name, image in images.items():
                _, self.places[name] = await self._look(self._agent, image.path)
        self._problems += apart(layers, images, self.places)

    async def prove(
        self, disks: Sequence[Disk], images: Mapping[str, Image], process: int | None, tell: Callable[[str], None]
    ) -> None:
        """Compare both sides' bases; only where all else is well: it may have to read all of them."""
        if self._agent is None or not self._chosen:
            return
        if self._problems:
            self._warnings.append("the shared bases were not compared, because of these problems")
            return
        proof = Proof(self._agent, self._selection.base_check, self._selection.base_hash, tell)
        for disk in disks:
            if (chosen := self._chosen.get(disk.name)) is None or disk.name not in images:
                continue
            try:
                warning = await proof.compare(disk, chosen.base, chosen.path, chosen.format, process)
                self._warnings += [] if warning is None else [warning]
            except Refused as error:
                self._problems.append(f"{error}{f': {error.advice}' if error.advice else ''}")

    def _check_chosen(self, disk: Disk, chosen: _Chosen) -> None:
        base = chosen.base
        for each in chosen.kept or (base,):
            if not each.is_as_named:
                self._problems.append(
                    f"disk {disk.name}: its image names {each.named.filename} as its backing file, but the source QEMU "
                    f"uses {each.layer.filename}: that base cannot be shared"
                )
        if len(chosen.kept) < 2:
            return
        missing = [layer for layer in self._layers.get(disk.name, ()) if not layer.there]
        if not self._layers_first:
            self._problems.append(
                f"disk {disk.name}: {base.private} layers lie above its base {base.file} (--flatten no): all but the "
                "top one are to be at the destination before it "
                "(qemu-blkmig copy image:LAYER --source-format FMT --shared-base brings one)"
            )
        elif missing:
            first = ", ".join(f"{layer.file} to {layer.path}" for layer in reversed(missing))
            self._warnings.append(
                f"disk {disk.name}: layers above its base {base.file} are copied first, each by a job of its own "
                f"(--flatten no): {first}"
            )

    async def _check_layers(self, agent: AgentClient, disk: Disk, layers: Sequence[LayerThere]) -> None:
        """Those that are missing can be made; one is not there as long as a job of its own has left it incomplete."""
        missing, there = (
            [
                Image(disk.name, each.path, each.format, disk.size, create=True)
                for each in layers
                if each.there is is_there
            ]
            for is_there in (False, True)
        )
        try:
            faults = (await agent.expect(Inspect(missing), InspectReply)).problems if missing else []
            incomplete = (await agent.expect(Inspect(there), InspectReply)).incomplete if there else []
        except Refused as error:
            self._problems.append(f"disk {disk.name}: a layer: {error}")
            return
        self._problems += [f"disk {disk.name}: a layer cannot come there: {each.what}" for each in faults if each.disk]
        if incomplete:
            self._problems.append(
                f"disk {disk.name}: a layer that is there is incomplete: {'; '.join(incomplete)}: qemu-blkmig resume "
                "JOB, of that job, goes on with it: then run the same command again (cleanup JOB removes it)"
            )

    def _check_readable(self, disk: Disk, kept: Sequence[Base], there: Sequence[bool]) -> None:
        """QEMU has the keys of what it has open; a layer's own job has none."""
        self._problems += [
            f"disk {disk.name}: its layer {each.file} is encrypted, and cannot be copied by itself (--flatten no): "
            "bring that file there, or let --flatten yes have what it holds in the disk's own image"
            for each, is_there in zip(kept, there, strict=False)
            if each.layer.encrypted and not is_there
        ]

    async def _looked_at(self, agent: AgentClient, paths: Sequence[str]) -> tuple[list[bool], list[str]]:
        """Which are there, and where they lead."""
        found = [await self._look(agent, path) for path in paths]
        # Whether a single one is there is told when the image that stands upon it is looked at.
        return [len(paths) == 1 or is_there for is_there, _ in found], [place for _, place in found]

    async def _look(self, agent: AgentClient, path: str) -> tuple[bool, str]:
        """What is out of a confined agent's bounds is not there."""
        with contextlib.suppress(Refused):
            found = await agent.expect(Files([path]), FilesReply)
            return found.ids[0] is not None, found.real[0]
        return False, posixpath.normpath(path)

    def _wanted(self, disk: Disk) -> list[Base]:
        bases = bases_of(disk)
        path = self._selection.base
        if path is None or not bases:
            return bases
        if wanted := [base for base in bases if base.answers_to(path)]:
            return wanted[:1]
        self._problems.append(
            f"disk {disk.name}: {path} is none of its bases, which are: {', '.join(base.file for base in bases)}"
        )
        return []
