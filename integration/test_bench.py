"""The benchmark itself runs, in small: nothing is told of speed here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.bench import __main__ as bench
from integration.bench.cases import CASES, Case
from integration.bench.images import spoil
from integration.bench.measuring import Usage
from integration.bench.peers import Files, Setting
from integration.bench.table import Measured, rows, table


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


class _Losing:
    """A tool that copies nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def applies(self, case: Case) -> bool:
        return True

    def copy(self, setting: Setting) -> dict[str, Usage]:
        for image in setting.images:
            spoil(setting.arrived(image), image.size)
        return {self.name: Usage(1.0, 1.0, 1.0, 1, 1, 1)}


def test_what_another_tool_loses_is_told_and_not_counted(tmp_path: Path) -> None:
    case = CASES[0]
    measured = list(bench.measure(case, [Files(), _Losing("nobody")], 1 << 20, 2, tmp_path))
    told = table(measured, {case.name: "dd"})
    assert "nobody: not what was there, 2 of 2 times" in told
    assert rows(measured, case.name) == ["dd"]


def test_a_comparison_with_a_tool_that_loses_data_is_none(tmp_path: Path) -> None:
    case = CASES[0]
    with pytest.raises(RuntimeError, match=f"what {case.baseline} copied is not what was there"):
        list(bench.measure(case, [_Losing(case.baseline)], 1 << 20, 1, tmp_path))


def test_what_was_measured_is_told_though_a_later_case_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "--cases", "full-tcp,full-cold-tcp", "--peers", "dd", "--size", "1M", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path / "out")])

    def failing(case: Case, *others: Any) -> Iterator[Measured]:
        if case.name == "full-cold-tcp":
            raise RuntimeError("no more room")
        yield Measured(case.name, case.baseline, 0, 1 << 20, Usage(1.0, 1.0, 1.0, 1, 1, 1))

    monkeypatch.setattr(bench, "measure", failing)
    with pytest.raises(RuntimeError, match="no more room"):
        bench.main()
    assert "full-tcp" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "bench.json").read_text())
