"""What a processor is told to do by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_blkmig.processor import knows_aes


@pytest.mark.parametrize(
    ("cpuinfo", "knows"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse2 aes avx\n", True),
        ("Features\t: fp asimd aes pmull\n", True),
        ("flags\t: fpu vaesx\nmodel\t: aes\n", False),
    ],
    ids=["x86", "arm", "neither"],
)
def test_whether_it_computes_aes(tmp_path: Path, cpuinfo: str, knows: bool) -> None:
    (path := tmp_path / "cpuinfo").write_text(cpuinfo)
    assert knows_aes(path) is knows
    assert knows_aes(tmp_path / "missing") is False
