"""The guests' kernel, unpacked once: each boot would do it anew, under TCG for a good part of a second."""

from __future__ import annotations

import struct
import subprocess
from dataclasses import replace
from pathlib import Path

from qemu_blkmig.demo.guest import Kernel

_SECTOR = 512
_SETUP_SECTORS, _PAYLOAD = 0x1F1, 0x248
"""Offsets in the header: how many sectors of set-up follow the first one; where the payload is after those, and its
length (Linux, Documentation/arch/x86/boot.rst, setup_sects, payload_offset and payload_length)."""
_UNPACKERS = {b"\x02\x21\x4c\x18": "lz4", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zX": "xz", b"\x1f\x8b": "gzip"}
"""Programs by what a payload begins with. At its end is the length of what it unpacks to, in 4 bytes."""


def unpacked(kernel: Kernel, path: Path) -> Kernel:
    """The kernel with an ELF image at `path`, which QEMU starts by PVH; `kernel` itself where it cannot be unpacked."""
    image = kernel.image.read_bytes()
    begin, length = struct.unpack_from("<II", image, _PAYLOAD)
    begin += (image[_SETUP_SECTORS] + 1) * _SECTOR
    payload = image[begin : begin + length - 4]
    program = next((name for start, name in _UNPACKERS.items() if payload.startswith(start)), None)
    if program is None:
        return kernel
    try:
        with path.open("wb") as file:
            subprocess.run([program, "-d", "-c"], input=payload, stdout=file, stderr=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.CalledProcessError):
        return kernel
    return replace(kernel, image=path)
