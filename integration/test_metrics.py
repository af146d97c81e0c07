"""Metrics of real jobs: what Prometheus is told is what the result says."""

from __future__ import annotations

import contextlib
import re
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from integration.lab import Lab, wait_until
from integration.tool import arguments, finish, migrate, start

MIB = 1 << 20


def told(text: str, name: str, **labels: str) -> float:
    """All series of that name and those labels added up."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"qemu_blkmig_{name}" and labels.items() <= sample.labels.items()
    )


def test_prometheus_is_told_of_a_migration_what_its_result_says(lab: Lab) -> None:
    guest = lab.boot([lab.disk("vda", 64 * MIB, data=[(0, 8 * MIB)])])
    path = lab.directory / "vm.prom"
    outcome, _ = migrate(lab, guest, "--metrics-file", path)
    result, text = outcome.succeeded().result, path.read_text()
    for kind, key in (("data", "copied"), ("zero", "zeroed"), ("skipped", "skipped")):
        assert told(text, "disk_bytes_total", kind=kind) == result["disks"][0][key]
    assert told(text, "disk_bytes_total", kind="data", phase="bulk") >= 8 * MIB
    assert told(text, "downtime_seconds") == result["downtime"]["total"]
    assert told(text, "state", state="succeeded") == 1
    assert told(text, "job_info", job_id=result["job"], destination=f"local:{lab.target}") == 1
    assert told(text, "last_success_timestamp_seconds") > told(text, "start_timestamp_seconds")


def test_a_running_job_answers_how_far_it_is(lab: Lab) -> None:
    disk = lab.disk("vda", 8 * MIB, data=[(0, 8 * MIB)])
    words = arguments("copy", disk.path, lab.target, "--bandwidth", 2, "--metrics-listen", "127.0.0.1:0")
    stderr = lab.directory / "stderr"
    process = start(["sh", "-c", 'exec "$@" 2>"$0"', str(stderr), *words])
    wait_until(lambda: "/metrics" in stderr.read_text() if stderr.exists() else False, "the address")
    (address,) = re.findall(r"http://\S+", stderr.read_text())

    def under_way() -> bool:
        assert process.poll() is None, stderr.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(address) as answer:
            return told(answer.read().decode(), "disk_first_pass_bytes", disk="vda") > 0
        return False

    wait_until(under_way, "the first bytes")
    finish(process).succeeded()
