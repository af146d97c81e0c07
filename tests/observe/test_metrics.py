"""Metrics: what is counted holds, whoever keeps them cannot harm the job, and what cannot be kept is told before it."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import threading
import urllib.request
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from qemu_blkmig.cli.main import main
from qemu_blkmig.engine.migration import Figures
from qemu_blkmig.errors import BlkmigError, Refused, Stalled, Undecided, UsageError
from qemu_blkmig.job.result import Downtime
from qemu_blkmig.observe import export, watch
from qemu_blkmig.observe.asked import Asked, parse_listen
from qemu_blkmig.observe.export import Export, last_times
from qemu_blkmig.observe.metrics import Metrics
from qemu_blkmig.observe.progress import JsonLines
from qemu_blkmig.observe.watch import Counting, watching
from qemu_blkmig.outlet import Outlet
from tests.observe.sample import MIB, disk, figures

SOURCE = "qmp:/run/vm.qmp"
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics("migrate", SOURCE, "local:/new", now=clock)


def exposed(metrics: Metrics) -> str:
    registry = CollectorRegistry()
    registry.register(metrics)
    return generate_latest(registry).decode()


def series(text: str) -> Series:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    source = ("source", SOURCE)
    return {
        (each.name.removeprefix("qemu_blkmig_"), frozenset(each.labels.items() - {source})): each.value
        for each in samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return series(exposed(metrics)).get((name, frozenset(labels.items())))


def everything(metrics: Metrics) -> str:
    """All that a job can tell."""
    metrics.job("1a2b3c4d")
    metrics.limits(0.3, 100 * MIB)
    metrics.stage("bulk")
    metrics.figures(figures(disk(copied=10 * MIB, bulk_done=10 * MIB), disk("vdb")))
    metrics.stage("dirty")
    metrics.figures(
        figures(disk(rounds=2), round=2, speed=1e6, dirty_rate=1e5, predicted=0.5, converges_in=3.0, confidence=0.9)
    )
    metrics.failed(Stalled("too busy"))
    metrics.paused(Downtime(0.2, 0.1, 0.05, 0.05))
    return exposed(metrics)


def test_bytes_are_counted_in_the_phase_that_has_settled_them(metrics: Metrics) -> None:
    metrics.stage("bulk")
    metrics.figures(figures(disk(copied=30 * MIB, zeroed=10 * MIB, skipped=60 * MIB, bulk_done=100 * MIB)))
    metrics.stage("dirty")
    metrics.figures(figures(disk(copied=37 * MIB, zeroed=10 * MIB, skipped=60 * MIB, bulk_done=100 * MIB, rounds=1)))
    counted = {
        (phase, kind): value(metrics, "disk_bytes_total", disk="vda", phase=phase, kind=kind)
        for phase in ("bulk", "dirty")
        for kind in ("data", "zero", "skipped")
    }
    assert counted == {
        ("bulk", "data"): 30 * MIB,
        ("bulk", "zero"): 10 * MIB,
        ("bulk", "skipped"): 60 * MIB,
        ("dirty", "data"): 7 * MIB,
        ("dirty", "zero"): 0,
        ("dirty", "skipped"): 0,
    }
    assert value(metrics, "disk_rounds_total", disk="vda") == 1


def test_what_was_counted_stays_when_a_job_is_gone_on_with(metrics: Metrics) -> None:
    for _ in range(2):
        metrics.job("1a2b3c4d")
        metrics.stage("bulk")
        metrics.figures(figures(disk(copied=8 * MIB), round=2))
    assert value(metrics, "disk_bytes_total", disk="vda", phase="bulk", kind="data") == 16 * MIB
    assert value(metrics, "rounds_total") == 4


def test_the_first_pass_has_its_copy_under_way_included(metrics: Metrics) -> None:
    metrics.stage("bulk")
    metrics.figures(figures(disk(bulk_done=64 * MIB)))
    metrics.moving("vda", 5 * MIB)
    assert value(metrics, "disk_first_pass_bytes", disk="vda") == 69 * MIB


def test_phases_are_timed_the_one_under_way_too(metrics: Metrics, clock: Clock) -> None:
    metrics.stage("bulk")
    clock.now += 10
    metrics.stage("dirty")
    clock.now += 5
    assert value(metrics, "phase_seconds_total", phase="bulk") == 10
    assert value(metrics, "phase_seconds_total", phase="dirty") == 5
    assert value(metrics, "phase", phase="bulk") == 0
    assert value(metrics, "phase", phase="dirty") == 1


def suspended() -> BlkmigError:
    error = Stalled("too busy")
    error.suspended = "1a2b3c4d"
    return error


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "succeeded"),
        (Stalled("too busy"), "failed"),
        (suspended(), "suspended"),
        (Undecided("nobody knows"), "undecided"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_the_end_is_one_state_and_has_its_time(
    metrics: Metrics, clock: Clock, error: BlkmigError | None, state: str
) -> None:
    metrics.stage("dirty")
    metrics.figures(figures(predicted=0.5))
    assert value(metrics, "predicted_downtime_seconds") == 0.5
    metrics.ended(error)
    states = {each: value(metrics, "state", state=each) for each in ("running", "succeeded", "failed", "suspended")}
    states["undecided"] = value(metrics, "state", state="undecided")
    assert [each for each, told in states.items() if told] == [state]
    assert value(metrics, "last_success_timestamp_seconds") == (clock.now if error is None else None)
    assert value(metrics, "last_failure_timestamp_seconds") == (None if error is None else clock.now)
    assert value(metrics, "predicted_downtime_seconds") is None, "nothing is predicted of what is over"


def test_each_failed_attempt_is_counted_once(metrics: Metrics) -> None:
    first, last = Stalled("too busy"), Stalled("still too busy")
    metrics.failed(first)
    metrics.failed(last)
    metrics.ended(last)
    assert value(metrics, "errors_total", kind="stalled") == 2


def test_promtool_finds_nothing_to_say_of_it(metrics: Metrics) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=everything(metrics), capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_the_file_is_whole_and_anybody_may_read_it(metrics: Metrics, tmp_path: Path) -> None:
    path = tmp_path / "vm.prom"
    with Export(metrics, path, None):
        assert path.read_text().startswith("# HELP qemu_blkmig_"), "it is there before the job begins"
        metrics.ended(None)
    assert series(path.read_text())["state", frozenset({("state", "succeeded")})] == 1, "and tells how it ended"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_when_it_last_went_well_outlives_a_failure(metrics: Metrics, clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "vm.prom"
    with Export(metrics, path, None):
        metrics.ended(None)
    success, failure = last_times(path, SOURCE)
    assert (success, failure) == (clock.now, None)
    assert last_times(path, "qmp:/run/other.qmp") == (None, None)
    following = Metrics("migrate", SOURCE, "local:/new", last_success=success, last_failure=failure)
    assert value(following, "last_success_timestamp_seconds") == clock.now


def test_a_damaged_file_of_ours_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "vm.prom"
    path.write_text("# HELP qemu_blkmig_job_info x\nqemu_blkmig_job_info{sour")
    assert last_times(path, SOURCE) == (None, None)


def test_a_file_that_cannot_be_renewed_is_told_once_and_when_it_can_be_again(metrics: Metrics, tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    path = folder / "vm.prom"
    with Export(metrics, path, None) as exporting:
        shutil.rmtree(folder)
        exporting.renew(path)
        exporting.renew(path)
        assert len(exporting.complaints) == 1
        assert "No such file or directory" in exporting.complaints[0]
        folder.mkdir()
        exporting.renew(path)
        assert list(exporting.complaints)[1:] == ["the metrics can be written again"]


def test_a_defect_in_the_counting_is_told_once_and_the_display_goes_on() -> None:
    class Broken(Metrics):
        def figures(self, figures: Figures) -> None:
            raise ZeroDivisionError

    stream = io.StringIO()
    outlet = Outlet(stream)
    counting = Counting(JsonLines(outlet), Broken("migrate", SOURCE, "local:/new"), deque())
    counting.stage("bulk")
    for _ in range(2):
        counting.figures(figures())
    counting.stage("dirty")
    outlet.close()
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [each["stage"] for each in told if each["event"] == "stage"] == ["bulk", "dirty"]
    assert [each["text"] for each in told if each["event"] == "note"] == [
        "the metrics are not kept any more, by a defect: ZeroDivisionError()"
    ]


def test_prometheus_is_answered_as_long_as_the_job_lasts(metrics: Metrics) -> None:
    with Export(metrics, None, ("127.0.0.1", 0)) as exporting:
        assert exporting.address is not None
        host, port = exporting.address
        with urllib.request.urlopen(f"http://{host}:{port}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            assert b"qemu_blkmig_state{" in answer.read()
    with socket.socket() as caller:
        assert caller.connect_ex((host, port)) != 0


def test_who_speaks_no_http_or_goes_away_disturbs_nobody(metrics: Metrics, capfd: pytest.CaptureFixture[str]) -> None:
    with Export(metrics, None, ("127.0.0.1", 0)) as exporting:
        assert exporting.address is not None
        for nonsense in (b"\0\1\2\r\n\r\n", b""):
            with socket.create_connection(exporting.address) as caller:
                caller.sendall(nonsense)
        with urllib.request.urlopen("http://{}:{}/metrics".format(*exporting.address)) as answer:
            assert b"qemu_blkmig_state{" in answer.read()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "address"),
    [("9123", ("127.0.0.1", 9123)), ("0.0.0.0:9123", ("0.0.0.0", 9123)), ("[::1]:0", ("::1", 0))],
)
def test_only_this_host_is_answered_unless_another_address_is_named(text: str, address: tuple[str, int]) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize("text", ["", ":9123", "host", "host:", "1:65536", "http://host:1x"])
def test_what_is_no_address_is_told_so(text: str) -> None:
    with pytest.raises(UsageError, match="not an address"):
        parse_listen(text)


@pytest.fixture
def busy() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_what_cannot_be_kept_is_refused_before_anything_is_done(
    tmp_path: Path, busy: int, capsys: pytest.CaptureFixture[str]
) -> None:
    disk_image = tmp_path / "vm.qcow2"
    disk_image.write_bytes(b"QFI\xfb" + bytes(512))
    for option, why in (
        (f"--metrics-file={tmp_path}/missing/vm.prom", "cannot be written: No such file"),
        (f"--metrics-file={tmp_path}", "is no regular file"),
        ("--metrics-file=/dev/null", "is no regular file"),
        (f"--metrics-file={disk_image}", "is there, and holds something else"),
        (f"--metrics-listen={busy}", "is not possible: Address already in use"),
        ("--metrics-listen=host.invalid:1", "is not possible"),
    ):
        assert main(["copy", "qmp:/nothing", f"local:{tmp_path}", "--progress=none", option]) == 3
        told = capsys.readouterr().err
        assert why in told and "QMP socket" not in told, told
    assert disk_image.read_bytes().startswith(b"QFI")


def test_a_job_that_is_refused_leaves_its_failure_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vm.prom"
    assert main(["copy", "qmp:/nothing", f"local:{tmp_path}", "--progress=none", "--metrics-file", str(path)]) == 3
    assert "there is no QMP socket" in capsys.readouterr().err
    told = {
        (sample.name, sample.labels["source"]): sample.labels
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
        if sample.value == 1
    }
    assert told["qemu_blkmig_state", "qmp:/nothing"]["state"] == "failed"
    assert told["qemu_blkmig_errors_total", "qmp:/nothing"]["kind"] == "refused"
    info = told["qemu_blkmig_job_info", "qmp:/nothing"]
    assert (info["command"], info["destination"], len(info["job_id"])) == ("copy", f"local:{tmp_path}", 8)


def test_names_that_are_not_utf_8_are_labels_all_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vm.prom"
    words = ["copy", "qmp:/no\udcff", f"local:{tmp_path}/\udcff", "--progress=none", "--metrics-file", str(path)]
    for _ in range(2):
        assert main(words) == 3
        assert "a defect" not in capfd.readouterr().err
    assert last_times(path, r"qmp:/no\udcff")[1] is not None


def test_a_complaint_of_a_file_whose_name_is_not_utf_8_does_the_job_no_harm() -> None:
    stream = io.StringIO()
    outlet = Outlet(stream)
    counting = Counting(JsonLines(outlet), Metrics("copy", SOURCE, "/new"), deque(["cannot be written to /m\udcff"]))
    counting.figures(figures())
    outlet.close()
    assert r"cannot be written to /m\\udcff" in stream.getvalue()


def test_what_the_file_s_thread_complains_of_is_told_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    with watching(Asked("auto", "copy", SOURCE, "local:/new", folder / "vm.prom")) as watched:
        watched.reporter.stage("bulk")
        shutil.rmtree(folder)
    assert capsys.readouterr().err.count("the metrics cannot be written to") == 1


def test_refusals_come_before_the_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def display(_kind: str) -> None:
        raise AssertionError("nothing is to be shown")

    monkeypatch.setattr(watch, "progress", display)
    with pytest.raises(Refused), watching(Asked("bar", "copy", SOURCE, "local:/new", tmp_path)):
        raise AssertionError("nothing is to be run")


def test_a_last_version_that_hangs_does_not_keep_the_job_from_its_end(
    metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "END", 0.0)
    exporting = Export(metrics, tmp_path / "vm.prom", None)
    answered = threading.Event()
    monkeypatch.setattr(exporting, "renew", lambda _file: answered.wait())
    exporting.close()
    answered.set()
