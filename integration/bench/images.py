"""The images that are copied, and whether what arrived is what was there."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qemu_blkmig.nbd.binding import libnbd

MIB = 1 << 20
CLUSTER = 64 << 10
HUGE = 16 << 40
PIECE = 16 * MIB
SHARE = 0.1
"""Of the clusters of a scattered image, those that hold data."""

Format = Literal["raw", "qcow2"]
Contents = Literal["full", "sparse", "scattered", "zeroes", "overlay", "huge"]
Extents = Iterator[tuple[int, int]]


@dataclass(frozen=True)
class Image:
    """`size`: virtual; `data`: bytes that a copy has to write. `base`: what it is an overlay of."""

    path: Path
    format: Format
    size: int
    data: int
    base: Path | None = None

    def create(self, path: Path) -> None:
        """Make an empty image like this one, upon the same base."""
        backing = ["-b", str(self.base), "-F", "raw"] if self.base else []
        command = ["qemu-img", "create", "-q", "-f", self.format, *backing, str(path), str(self.size)]
        subprocess.run(command, check=True)

    def same_as(self, path: Path) -> bool:
        """Whether another image of this format holds the same."""
        command = ["qemu-img", "compare", "-U", "-f", self.format, "-F", self.format, str(self.path), str(path)]
        return subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


def make(contents: Contents, path: Path, image_format: Format, amount: int) -> Image:
    """An image with about `amount` bytes of random data (zeroes: of zeroes); how large it is depends on `contents`."""
    size = {"sparse": 16 * amount, "scattered": int(amount / SHARE), "huge": HUGE}.get(contents, amount)
    base = path.with_suffix(".base") if contents == "overlay" else None
    if base is not None:
        _fill(Image(base, "raw", size, size), _pieces(0, size), os.urandom)
        size_of_data = amount // 16
    else:
        size_of_data = amount
    image = Image(path, image_format, size, size_of_data, base)
    _fill(image, _extents(contents, image), bytes if contents == "zeroes" else os.urandom)
    return image


def spoil(path: Path, size: int) -> None:
    """Make a raw file of `size` bytes that holds none of what is to be copied; its pages stay in memory."""
    wrong = b"\xaa" * (4 * MIB)
    with path.open("r+b" if path.exists() else "w+b") as file:
        for offset in range(0, size, len(wrong)):
            file.write(wrong[: size - offset])
        file.truncate(size)


def _extents(contents: Contents, image: Image) -> Extents:
    if contents in ("sparse", "huge"):
        distance = image.size // (image.data // PIECE)
        return ((number * distance, PIECE) for number in range(image.data // PIECE))
    if contents == "scattered":
        clusters = random.Random(1).sample(range(image.size // CLUSTER), image.data // CLUSTER)
        return ((cluster * CLUSTER, CLUSTER) for cluster in sorted(clusters))
    return _pieces(image.size // 3 // CLUSTER * CLUSTER if contents == "overlay" else 0, image.data)


def _pieces(start: int, length: int) -> Extents:
    return ((offset, min(PIECE, start + length - offset)) for offset in range(start, start + length, PIECE))


def _fill(image: Image, extents: Extents, content: Callable[[int], bytes]) -> None:
    """Make the image and write at these places, zeroes as data."""
    image.create(image.path)
    if image.format == "raw":
        with image.path.open("r+b") as file:
            for offset, length in extents:
                os.pwrite(file.fileno(), content(length), offset)
        return
    handle = libnbd().NBD()
    handle.connect_systemd_socket_activation(["qemu-nbd", "-f", image.format, str(image.path)])
    for offset, length in extents:
        handle.pwrite(content(length), offset)
    handle.flush()
    handle.shutdown()
