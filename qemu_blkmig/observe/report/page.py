"""The page: figures, tables and facts in one file of HTML, which loads nothing and lets nothing be loaded."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources

import jinja2
from markupsafe import Markup

from qemu_blkmig import __version__
from qemu_blkmig.job.status import BUSY, FINISHED, LEFT, RUNNING, SUSPENDED, DiskStatus
from qemu_blkmig.observe.report import figures, timelines
from qemu_blkmig.observe.report.axis import clock
from qemu_blkmig.observe.report.figures import Mapped
from qemu_blkmig.observe.report.material import Material
from qemu_blkmig.observe.report.timelines import View
from qemu_blkmig.units import show_bytes, show_rate, show_seconds

PROVEN = {
    "full": "Both sides were hashed completely while the guest was paused, and are equal: nothing was missed.",
    "written": "What was read at the source is what lies at the destination: all of it was read back and compared.",
    "none": "Nothing was verified, as asked for (--verify none).",
}
SIGNS = {RUNNING: "running", BUSY: "running", SUSPENDED: "rests", LEFT: "failed"}
"""How a state is shown that is not the end."""


@dataclass(frozen=True)
class Tile:
    """A number that is seen first: what it is, its value, and what is to be said of it."""

    name: str
    value: str
    remark: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """How it stands, in a word and a sentence; `sign`: good, failed, rests or running."""

    sign: str
    word: str
    sentence: str


@dataclass(frozen=True)
class DiskPart:
    """A disk, its facts and, where there is one, its map."""

    name: str
    facts: dict[str, str]
    drawn: Mapped | None


def render(material: Material, *, live: bool = False) -> str:
    """The page; `live`: it asks for itself anew until the job is over, where it came from."""
    style, script = _asset("page.css"), _asset("page.js")
    over = material.status.state != RUNNING
    policy = [
        "default-src 'none'",
        f"style-src {_hash(style)}",
        f"script-src {_hash(script)}",
        *(["connect-src 'self'"] if live else []),
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    whole, end = View.whole(material), View.end(material)
    timed = [timelines.rate(whole), timelines.pending(whole), *([] if end else [timelines.predicted(whole)])]
    kinds = (timelines.phases, timelines.rate, timelines.pending, timelines.predicted)
    closer = [kind(end) for kind in kinds] if end else []
    return _template().render(
        job=material.status.job,
        guest=material.environment.get("Guest"),
        policy="; ".join(policy),
        style=Markup(style),
        script=Markup(script),
        live=live,
        over=over,
        verdict=verdict(material),
        source=material.story.facts.get("source") or material.status.source,
        destination=material.story.facts.get("destination") or material.status.destination,
        next=material.status.next,
        tiles=list(tiles(material)),
        began=_moment(material.axis.began),
        made=_moment(material.now),
        phases=timelines.phases(whole) if material.stretches else None,
        timed=[figure for figure in timed if figure is not None],
        closer=[figure for figure in closer if figure is not None],
        numbers=timelines.figures_table(material) if material.story.samples else None,
        moments=timelines.moments(material),
        pause=figures.pause(material),
        disks=list(_disks(material)),
        proven=_proven(material),
        warnings=material.result.warnings if material.result else [],
        plan=material.plan,
        environment=material.environment,
        notes=[(_moment(note.time), note.text) for note in material.story.notes],
        version=__version__,
    )


def verdict(material: Material) -> Verdict:
    """How the job stands."""
    status, outcome = material.status, material.story.last.outcome
    if status.state == FINISHED:
        if outcome is None:
            return Verdict("failed", "over", "How it ended was not noted.")
        if outcome.exit_code == 0:
            return Verdict("good", outcome.text, _sentence(outcome.guest or outcome.text))
        word = "cancelled" if outcome.exit_code >= 128 else f"failed (exit code {outcome.exit_code})"
        return Verdict("failed", word, _sentence(f"{outcome.text}; {outcome.guest}" if outcome.guest else outcome.text))
    word = f"{status.state}: {status.phase}" if status.state == RUNNING and status.phase else status.state
    told = f" {_sentence(status.note)}" if status.note and status.state != RUNNING else ""
    return Verdict(SIGNS.get(status.state, "failed"), word, f"{_sentence(status.guest or '')}{told}")


def tiles(material: Material) -> Iterator[Tile]:
    """The numbers that are seen first."""
    result, latest = material.result, material.latest
    if result is not None and result.downtime is not None:
        total, limit = result.downtime.total, latest.downtime if latest else None
        good = None if limit is None else total <= limit
        remark = "" if limit is None else f"{'within' if good else 'beyond'} the limit of {show_seconds(limit)}"
        yield Tile("the guest stood still", show_seconds(total), remark, good)
    elif latest is not None and latest.predicted is not None and latest.downtime is not None:
        good = latest.predicted <= latest.downtime
        yield Tile("predicted downtime of the disks", show_seconds(latest.predicted),
                   f"limit {show_seconds(latest.downtime)}", good)  # fmt: skip
    if material.status.state == RUNNING and material.status.percent is not None:
        speed = material.status.speed
        yield Tile(
            "of the first pass", f"{material.status.percent:.0f} %", show_rate(speed) if speed is not None else ""
        )
    yield Tile("in all", clock(material.axis.length), f"begun {_moment(material.axis.began)}")
    if disks := material.status.disks:
        sent, size = sum(disk.copied for disk in disks), sum(disk.size for disk in disks)
        count = "1 disk" if len(disks) == 1 else f"{len(disks)} disks"
        yield Tile("sent", show_bytes(sent), f"for {count} of {show_bytes(size)}")
        if rounds := max(disk.rounds for disk in disks):
            yield Tile("rounds", str(rounds), "over what the guest wrote meanwhile")
    if result is not None:
        proven = {"full": "in full", "written": "as written", "none": "no"}[result.verified]
        yield Tile("verified", proven, "", result.verified != "none")


def _proven(material: Material) -> str:
    result = material.result
    if result is not None:
        read = f" Read back: {show_bytes(result.read_back)}." if result.read_back else ""
        mended = f" Copied again, as storage had not kept it: {show_bytes(result.mended)}." if result.mended else ""
        return f"{PROVEN[result.verified]}{read}{mended}"
    return (
        "Not yet: the job is under way."
        if material.status.state == RUNNING
        else "Not verified: it did not come to that."
    )


def _disks(material: Material) -> Iterator[DiskPart]:
    states = {disk.name: disk for disk in material.status.disks}
    results = {disk.name: disk for disk in material.result.disks} if material.result else {}
    for number, agreed in enumerate(material.story.agreed):
        facts = {
            "From": agreed.source,
            "To": f"{agreed.destination} ({agreed.format})",
            "Size": show_bytes(agreed.size),
        }
        if agreed.name in results:
            facts["Allocated there"] = show_bytes(results[agreed.name].allocated)
        if (state := states.get(agreed.name)) is not None:
            facts |= _counted(state)
        drawn = material.maps.get(agreed.name)
        mapped = figures.disk(material, number, agreed.name, drawn) if drawn is not None else None
        yield DiskPart(agreed.name, facts, mapped)


def _counted(state: DiskStatus) -> dict[str, str]:
    counted = {
        "Sent": show_bytes(state.copied),
        "Made zero": show_bytes(state.zeroed),
        "Rounds": str(state.rounds),
    }
    if state.skipped:
        counted["Left as it was there"] = show_bytes(state.skipped)
    if state.percent < 100:
        counted["First pass"] = f"{state.percent:.0f} %"
    if state.dirty:
        counted["Still dirty"] = show_bytes(state.dirty)
    return counted


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text()


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("page.html")
