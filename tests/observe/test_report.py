"""The report's page, from journals that are made up: nothing that was named gets to be markup, no job is too odd."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from qemu_blkmig.cli.main import main
from qemu_blkmig.engine.extents import Extent
from qemu_blkmig.engine.migration import DiskFigures, Figures, Phase
from qemu_blkmig.job.chronicle import AgreedDisk
from qemu_blkmig.job.diskmap import DiskMap
from qemu_blkmig.job.history import FOLDER
from qemu_blkmig.job.journal import FILE, Journal
from qemu_blkmig.job.record import Record
from qemu_blkmig.job.result import DiskResult, Downtime, Result
from qemu_blkmig.observe.report.axis import TimeAxis, clock, durations, rates, sizes
from qemu_blkmig.observe.report.live import LiveReport
from qemu_blkmig.observe.report.material import gather
from qemu_blkmig.observe.report.page import render
from qemu_blkmig.places import STATE_VARIABLE

MIB = 1 << 20
SIZE = 512 * MIB
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }}"
BEGAN = 1_700_000_000.0


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag begins."""
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_data(self, data: str) -> None:
        """Text."""
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]


def figures(pending: int, rounds: int, copied: int, disk: str = "vda", dirty_rate: float | None = None) -> Figures:
    """Figures of a job with one disk."""
    done = SIZE if rounds else SIZE - pending
    one = DiskFigures(disk, SIZE, copied, 0, 0, rounds, done, pending if rounds else 0, 0)
    predicted = pending / (100 * MIB) if rounds else None
    return Figures(Phase.DIRTY, 50, SIZE, pending, (one,), rounds, 100.0 * MIB, dirty_rate, predicted)


def result(disk: str, job: str = "past") -> Result:
    """Of a guest that was moved."""
    moved = DiskResult(disk, "/old", "/new", "raw", SIZE, MIB, 2 * MIB, 0, 0, 3)
    steps = {"last round": 0.08, "read back": 0.02, "RAM and devices": 0.1}
    downtime = Downtime(0.212, 0.1, 0.02, 0.09, steps)
    return Result(job, "migrated", "there", [moved], 2 * MIB, {}, downtime, "written", ["a warning"],
                  read_back=3 * MIB, mended=512)  # fmt: skip


def hot(disk_size: int = SIZE) -> DiskMap:
    """A map with one hot spot."""
    drawn = DiskMap(disk_size, BEGAN + 1)
    drawn.bulk(Extent(0, disk_size), 1.0, BEGAN + 1, BEGAN + 4)
    for number in range(20):
        drawn.dirty([Extent(disk_size // 2 // 512 * 512, 512)], BEGAN + 4 + number / 5)
    return drawn


Tell = Callable[[Journal], None]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state directory."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path))
    return tmp_path


def past(state: Path, *tell: Tell) -> None:
    """The journal of a job `past` that is over."""
    (state / FOLDER).mkdir(exist_ok=True)
    journal = Journal(state / FOLDER / "past.sqlite", lambda _: None)
    for each in tell:
        each(journal)
    journal.close()
    with sqlite3.connect(state / FOLDER / "past.sqlite") as database:
        for table in ("phase", "sample", "round", "note", "outcome"):
            (first,) = database.execute(f"SELECT min(id) FROM {table}").fetchone()
            database.execute(f"UPDATE {table} SET time = ? + (id - ?) * 1.0", (BEGAN, first or 0))
    database.close()


def agreed(disk: str = "vda") -> Tell:
    """The disk, the plan and the environment."""

    def tell(journal: Journal) -> None:
        journal.agree([AgreedDisk(disk, SIZE, f"/old/{disk}", f"/new/{disk}", "raw")])
        journal.fact("source", f"qmp:/{disk}")
        journal.fact("destination", "ssh://hostb/srv")
        journal.fact("plan", msgspec.json.encode({"Disks": disk}).decode())
        journal.fact("environment", msgspec.json.encode({"Guest": disk, "Source QEMU": disk}).decode())

    return tell


def moved(disk: str = "vda") -> Tell:
    """All that a migration tells which goes well."""

    def tell(journal: Journal) -> None:
        for name in ("prepare", "bulk", "dirty", "ram", "switchover", "verify", "handover"):
            journal.phase(name)
        for number, pending in enumerate((SIZE, 100 * MIB, 0, 40 * MIB, 20 * MIB, 0)):
            journal.sample(figures(pending, max(0, number - 2), number * MIB, disk, 5e6), 0.3, 200 * MIB)
        journal.fact("disks' share", "0.5")
        journal.map(disk, hot().kept())
        journal.note(f"told of {disk}")
        journal.fact("result", msgspec.json.encode(result(disk)).decode())
        journal.outcome(0, "migrated", f"the guest {disk} runs at the destination")

    return tell


def phases(*names: str) -> Tell:
    """Phases that follow each other."""

    def tell(journal: Journal) -> None:
        for name in names:
            journal.phase(name)

    return tell


def sampled(count: int) -> Tell:
    """Figures, as fast as they come."""

    def tell(journal: Journal) -> None:
        for number in range(count):
            journal.sample(figures(number, 1, number), 0.3)

    return tell


def fact(name: str, value: str) -> Tell:
    """A fact."""
    return lambda journal: journal.fact(name, value)


def mapped(drawn: DiskMap, **changed: bytes) -> Tell:
    """A map."""
    return lambda journal: journal.map("vda", msgspec.structs.replace(drawn.kept(), **changed))


def page(live: bool = False, job: str = "past") -> str:
    """The page."""
    return render(asyncio.run(gather(job)), live=live)


def test_a_page_shows_the_whole_story_and_is_sound(state: Path) -> None:
    past(state, agreed(), moved())
    made = page()
    read = Page(made)
    for word in (
        "migrated", "212 ms", "within the limit", "ssh://hostb/srv", "a warning", "told of vda", "last round", "21",
        "The hottest places", "disks' part", "Read back: 3.0 MiB", "kept it: 512 B",
    ):  # fmt: skip
        assert word in read.text, word
    assert len(read.ids) == len(set(read.ids))
    described = [attributes.get("aria-describedby") for attributes in read.of("svg") if attributes.get("role") == "img"]
    assert len(described) == 7 and all(name in read.ids for name in described)
    for name in ("rate", "pending", "predicted", "pause", "cells-0", "times-0", "phases"):
        assert name in read.ids
    assert all(title in made for title in ("<title>Throughput and dirty rate</title>", "<title>bulk, 1.0 s</title>"))


def test_a_page_loads_nothing_and_runs_only_its_own_script(state: Path) -> None:
    past(state, agreed(), moved())
    made = page()
    read = Page(made)
    links = [value or "" for _, each in read.tags for name, value in each.items() if name.endswith(("src", "href"))]
    assert links and all(link.startswith(("#", "data:")) for link in links), "nothing is fetched"
    assert "@import" not in made and "url(" not in made
    policy = allowed(read)
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect" not in policy
    assert " style=" not in made and not re.search(r"<[^>]* on\w+=", made)
    assert "connect-src 'self'" in allowed(Page(page(live=True)))


def allowed(read: Page) -> str:
    """What the page lets a browser do."""
    (policy,) = (each["content"] for each in read.of("meta") if each.get("http-equiv") == "Content-Security-Policy")
    return policy or ""


def test_names_are_text_wherever_they_stand(state: Path) -> None:
    past(state, agreed(HOSTILE), moved(HOSTILE))
    made = page()
    read = Page(made)
    assert [attributes.get("type") for attributes in read.of("script")] == ["application/json", None]
    assert not read.of("img")
    assert read.text.count(HOSTILE) > 8, "as they are, and not evaluated"
    for _, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on")]


def test_a_phase_that_no_version_has_is_drawn_without_harm(state: Path) -> None:
    past(state, agreed(), phases("prepare", HOSTILE, "bulk"))
    read = Page(page())
    assert len(read.of("script")) == 1 and not read.of("img")
    assert {"class": "phase-other", "width": "14", "height": "14", "rx": "3"} in read.of("rect")


ODD: dict[str, Sequence[Tell]] = {
    "nothing but a phase": [phases("prepare")],
    "no figures": [lambda journal: journal.outcome(1, "failed", "the guest runs here")],
    "no outcome": [lambda journal: journal.sample(figures(0, 0, 0))],
    "one sample": [phases("bulk"), sampled(1)],
    "an unreadable fact": [moved(), fact("result", "{"), fact("plan", "3")],
    "a broken map": [moved(), mapped(hot(), sent=b"x")],
    "another disk's map": [moved(), mapped(hot(1 << 40))],
    "many samples": [phases("prepare", "bulk"), sampled(2000)],
}


@pytest.mark.parametrize("tell", ODD.values(), ids=ODD)
def test_a_job_of_which_little_is_known_has_a_page(state: Path, tell: Sequence[Tell]) -> None:
    past(state, agreed(), *tell)
    assert "/old/vda" in Page(page()).text


def test_the_end_of_a_long_job_is_shown_closer(state: Path) -> None:
    past(state, agreed(), phases("prepare", "bulk", "dirty", "dirty"), sampled(3))
    with sqlite3.connect(state / FOLDER / "past.sqlite") as database:
        database.execute("UPDATE phase SET time = time + 3600 WHERE name = 'dirty'")
        database.execute("UPDATE sample SET time = time + 3601 WHERE id > 1")
    database.close()
    read = Page(page())
    assert {"phases-end", "rate-end", "pending", "pending-end", "predicted-end"} <= set(read.ids)
    assert "predicted" not in read.ids


def test_a_job_that_was_cancelled_says_so(state: Path) -> None:
    past(state, agreed(), lambda journal: journal.outcome(130, "interrupted by SIGINT", "the guest runs at the source"))
    read = Page(page())
    assert "cancelled" in read.text and "Interrupted by SIGINT; the guest runs at the source." in read.text


async def test_a_job_that_rests_says_what_to_do_and_its_rest_takes_no_room_on_the_axis(state: Path) -> None:
    directory = state / "resting"
    directory.mkdir()
    record = Record("resting", str(state / "none"), "/qmp", recording=True, suspended=True)
    (directory / "record.json").write_bytes(msgspec.json.encode(record))
    journal = Journal.create(directory, lambda _: None)
    agreed()(journal)
    for name in ("prepare", "bulk", "prepare", "bulk", "dirty"):
        journal.phase(name)
    journal.note("the job rests: the network is gone")
    await asyncio.to_thread(journal.close)
    with sqlite3.connect(directory / FILE) as database:
        # A day's rest after the first bulk pass.
        database.execute("UPDATE phase SET time = ? + id * 10 + (id > 2) * 86400", (BEGAN,))
        database.execute("UPDATE note SET time = ?", (BEGAN + 86400 + 60,))
    database.close()
    material = await gather("resting")
    assert material.axis.length == pytest.approx(30 + 10)
    assert [stretch.seconds for stretch in material.stretches] == pytest.approx([10, 10, 10, 10])
    text = Page(render(material)).text
    assert "suspended" in text and "qemu-blkmig resume resting" in text and "the network is gone" in text


def test_a_job_whose_host_s_clock_was_set_back_while_it_rested_has_a_page(state: Path) -> None:
    past(state, agreed(), phases("prepare", "bulk", "prepare", "bulk", "dirty"), sampled(3))
    with sqlite3.connect(state / FOLDER / "past.sqlite") as database:
        database.execute("UPDATE phase SET time = ? + id * 10 - (id > 2) * 86400", (BEGAN,))
        database.execute("UPDATE sample SET time = ? - 86400 + 50 + id", (BEGAN,))
    database.close()
    assert "/old/vda" in Page(page()).text


def test_the_page_is_written_whole_or_not_at_all(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    past(state, agreed(), moved())
    out = state / "out.html"
    assert main(["report", "past", "--html", str(out)]) == 0
    assert out.read_text().endswith("</html>\n")
    assert sorted(path.name for path in state.iterdir()) == sorted([FOLDER, "out.html"])
    assert main(["report", "past", "--html", "-"]) == 0
    assert capsys.readouterr().out.startswith("<!DOCTYPE html>")
    assert main(["report", "past", "--html", str(state / "nowhere" / "out.html")]) == 3
    assert main(["report", "other", "--html", str(out)]) == 3
    assert main(["report", "past"]) == 2
    assert main(["report", "past", "--html", str(out), "--port", "80"]) == 2
    assert main(["report", "past", "--live", "--port", "70000"]) == 2


def test_a_live_page_is_served_to_this_host_only_by_its_names(state: Path) -> None:
    past(state, agreed(), moved())
    live = LiveReport("past", 0)
    live.start()
    try:
        with urllib.request.urlopen(live.url) as answer:
            assert answer.headers["Cache-Control"] == "no-store"
            assert "migrated" in answer.read().decode()
        for path, host, code in (("", "evil.example", 403), ("etc/passwd", None, 404)):
            request = urllib.request.Request(live.url + path, headers={"Host": host} if host else {})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            assert refused.value.code == code
            refused.value.close()
        assert live.over
        (state / FOLDER / "past.sqlite").unlink()
    finally:
        live.close()


def test_many_readers_at_once_get_one_page(state: Path) -> None:
    past(state, agreed(), moved())
    live = LiveReport("past", 0)
    pages: list[bytes] = []
    readers = [threading.Thread(target=lambda: pages.append(live.page())) for _ in range(4)]
    live.start()
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    live.close()
    assert len(pages) == 4 and b"</html>" in pages[0]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0"), (0.5, "0.5 s"), (59, "59 s"), (185, "3:05"), (7260, "2 h 1 min"), (90000, "1 d 1 h")],
)
def test_times_are_short(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


@pytest.mark.parametrize("length", [0.0, 0.05, 3, 59, 61, 5000, 86400, 40 * 86400])
def test_an_axis_has_a_handful_of_marks_within_it(length: float) -> None:
    marks = TimeAxis(BEGAN, BEGAN + length).marks()
    assert 1 <= len(marks) <= 8
    assert all(0 <= mark.part <= 1 for mark in marks)


@pytest.mark.parametrize("highest", [0.0, 1.0, 1e6, 1e9, 1e13])
def test_scales_hold_their_values(highest: float) -> None:
    for scale in (rates(highest), sizes(highest), durations(0.001, highest / 1e6)):
        assert 0 <= scale.part(highest) <= 1
        assert 2 <= len(scale.marks) <= 16
        assert [mark.part for mark in scale.marks] == sorted(mark.part for mark in scale.marks)
