"""What lies below an image, read off headers that QEMU reads, too."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

from qemu_blkmig.destination.backing import backing_files


def test_the_backing_file_s_name_may_follow_a_header_without_extensions(tmp_path: Path) -> None:
    base, image = tmp_path / "base", tmp_path / "image"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10"]
    subprocess.run([*create, base, "1M"], check=True)
    subprocess.run([*create, "-b", base, "-F", "qcow2", image], check=True)
    name, header = str(base).encode(), 72
    with image.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack(">QI", header, len(name)))
        file.seek(header)
        file.write(name.ljust(400, b"\1"))
    told = subprocess.run(["qemu-img", "info", "--output=json", image], check=True, capture_output=True).stdout
    assert json.loads(told)["backing-filename"] == str(base)
    assert backing_files(str(image), lambda _: True) == ([str(base)], False), "its format is not told"
