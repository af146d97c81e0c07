"""The dashboard and the alerts in monitoring/ ask for what is there, in words that Prometheus understands."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_blkmig.observe.metrics import Metrics

MONITORING = Path(__file__).parents[2] / "monitoring"
METRIC = re.compile(r"qemu_blkmig_\w+")

with_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)"
)


def promtool(*arguments: object) -> None:
    """Run it beside the rules; what it says when it finds fault fails the test."""
    done = subprocess.run(
        ["promtool", *map(str, arguments)], cwd=MONITORING, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def exposed() -> set[str]:
    families = Metrics("migrate", "qmp:/run/vm.qmp", "local:/new").collect()
    return {f"{family.name}_total" if family.type == "counter" else family.name for family in families}


def queries() -> Iterator[str]:
    """What the dashboard asks Prometheus."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (each["definition"] for each in dashboard["templating"]["list"] if each["type"] == "query")


def test_all_that_is_asked_for_is_there() -> None:
    asked = {name for query in queries() for name in METRIC.findall(query)}
    asked |= set(METRIC.findall((MONITORING / "alerts.yml").read_text()))
    asked |= set(METRIC.findall((MONITORING / "alerts.test.yml").read_text()))
    assert asked and asked <= exposed()


def test_the_dashboard_shows_all_that_is_there_but_for_what_is_in_what_it_shows() -> None:
    shown = {name for query in queries() for name in METRIC.findall(query)}
    prefix = "qemu_blkmig_"
    assert {name.removeprefix(prefix) for name in exposed() - shown} == {
        "phase_seconds_total",
        "start_timestamp_seconds",
        "update_timestamp_seconds",
        "last_failure_timestamp_seconds",
        "disk_rounds_total",
        "rounds_total",
        "predicted_convergence_seconds",
        "prediction_confidence_ratio",
    }


def test_panels_neither_overlap_nor_share_a_number() -> None:
    panels: list[dict[str, Any]] = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    places = [each["gridPos"] for each in panels]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    assert len({each["id"] for each in panels}) == len(panels)
    assert all(each["description"] for each in panels)


@with_promtool
def test_the_dashboard_s_queries_are_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"dashboard:{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries())
        if not query.startswith("label_values(")
    ]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", path)


@with_promtool
def test_the_alerts_are_raised_when_they_are_meant_to_be() -> None:
    promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts.test.yml")
