"""Which layer of a disk's chain is the base that both sides share; what lies above it is private and is sent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from qemu_blkmig.destination.protocol import Backing as SharedBase
from qemu_blkmig.qmp.disks import Backing, Disk, Layer, plain_filename


@dataclass(frozen=True)
class Base:
    """A layer that may be shared.

    `above`: how many layers of the chain lie above it, filters included (see `Disk.layers`), `private`: how many of
    these are images. `layer`: as QEMU has it open. `named`: as the image above it names it.
    """

    above: int
    private: int
    layer: Layer
    named: Backing

    @property
    def shared(self) -> SharedBase:
        """What the destination's overlay is to stand upon. Where the image does not say the format, QEMU knows it."""
        return SharedBase(self.named.filename, self.named.format or self.layer.format)

    @property
    def file(self) -> str:
        """Its own file's name."""
        return plain_filename(self.layer.filename)

    @property
    def is_as_named(self) -> bool:
        """Whether QEMU uses the file that the image names; its options and `backing: null` may say otherwise."""
        return _same(self.file, plain_filename(self.named.full))

    def answers_to(self, path: str) -> bool:
        """Whether a user who writes `path` means it."""
        return path in (self.named.filename, self.named.full) or _same(path, self.file)


def bases_of(disk: Disk) -> list[Base]:
    """All layers of the disk that may be shared, topmost first."""
    images = [(number, layer) for number, layer in enumerate(disk.layers) if not layer.filter]
    return [
        Base(number, count, layer, above.backing)
        for count, ((_, above), (number, layer)) in enumerate(pairwise(images), start=1)
        if above.backing is not None
    ]


def paths_there(bases: Sequence[Base], image: Path, *, flatten: bool) -> list[str]:
    """Where the destination has all the `bases` of the disk whose own image is `image` there, if it has them.

    `flatten`: that image names whichever of them it stands upon. Else each is named by the layer above it.
    """
    paths, above = [], image
    for base in bases:
        path = above.parent / base.named.filename
        paths.append(str(path))
        above = image if flatten else path
    return paths


def like(bases: Sequence[Base], other: Base) -> Base | None:
    """The one of the bases that the destination's own `other` stands for: by its name; if there is just one, that."""
    if len(bases) == 1:
        return bases[0]
    for key in (lambda base: base.named.filename, lambda base: Path(base.named.filename).name):
        if found := [base for base in bases if key(base) == key(other)]:
            return found[0]
    return None


def _same(one: str, other: str) -> bool:
    return one == other or os.path.realpath(one) == os.path.realpath(other)
