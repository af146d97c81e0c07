"""The benchmark itself runs, in small: nothing is told of speed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from integration.bench import __main__ as bench
from integration.bench.cases import CASES
from integration.bench.images import make, spoil
from integration.bench.peers import Setting


def test_the_benchmark_compares_us_with_a_mirror_and_leaves_figures_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "--cases", "scattered-tcp", "--peers", "blkmig", "--size", "4M", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path / "out")])
    bench.main()
    figures = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {each["row"] for each in figures} == {"blkmig", "blkmig (pass)", "blkmig (first byte)", "blockdev-mirror"}
    assert all(each["usage"]["seconds"] > 0 and each["usage"]["source_memory"] > 1 << 20 for each in figures)
    assert (tmp_path / "out" / "bench.svg").read_text().startswith("<svg")
    assert "scattered-tcp" in capsys.readouterr().out


def test_a_copy_that_differs_from_its_source_ends_the_benchmark(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    image = make("full", tmp_path / "source" / "disk.raw", "raw", 1 << 20)
    setting = Setting(CASES[0], [image], tmp_path / "target", tmp_path)
    spoil(tmp_path / "target" / "disk.raw", image.size)
    with pytest.raises(RuntimeError, match="differs"):
        setting.check()
