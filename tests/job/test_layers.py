"""Which layers of a chain are brought before the top one, where to, and what is refused before anything is."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest

from qemu_blkmig.destination.protocol import Files, FilesReply, Image, Inspect, InspectReply, Problem
from qemu_blkmig.engine.ports import Clock
from qemu_blkmig.errors import ConnectionLost, Refused
from qemu_blkmig.job import layers
from qemu_blkmig.job.base_choice import BaseChoice, LayerThere
from qemu_blkmig.job.bases import bases_of, paths_there
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.managed_options import ManagedOptions
from qemu_blkmig.job.options import CopyOptions, Selection, Target
from qemu_blkmig.job.place import Ssh
from qemu_blkmig.job.plan import Plan
from qemu_blkmig.job.reporting import Reporter
from qemu_blkmig.job.result import Result
from qemu_blkmig.qmp.disks import Backing, Disk, Layer
from qemu_blkmig.transport.client import AgentClient

NAMES = ("top", "second", "third", "base")
OWNER = (64055, 108)


def _chain(name: str = "vda", top: str = "top", named: Callable[[str], str] = str) -> Disk:
    """`named`: what an image calls the one below it."""
    names = (top, *NAMES[1:], "nothing")
    files = tuple(
        Layer("", "qcow2", f"/src/{each}", filter=False, backing=Backing(named(below), f"/src/{below}", "qcow2"))
        for each, below in pairwise(names)
    )
    return Disk(
        name=name, device="", qdev="", node="", format="qcow2", size=1 << 20, filename=f"/src/{top}",
        backing=files[0].backing, layers=files, cluster_size=None, encrypted=False, allocated=None,
    )  # fmt: skip


@dataclass(frozen=True)
class _Agent:
    """A destination that has these files, some of them incomplete."""

    files: frozenset[str]
    incomplete: frozenset[str] = frozenset()
    directories: frozenset[str] = frozenset({"/there", "/src"})
    links: Mapping[str, str] = field(default_factory=dict)

    async def expect(self, op: Files | Inspect, _reply: type) -> FilesReply | InspectReply:
        if isinstance(op, Files):
            real = [self._followed(name) for name in op.names]
            return FilesReply(
                [("file", 1, 1) if path in self.files else None for path in real], real, [[] for _ in real]
            )
        told = [f"{image.path} was not filled" for image in op.images if image.path in self.incomplete]
        missing = [path for image in op.images if (path := self._followed(image.path)) not in self.files]
        folders = {path: path.rpartition("/")[0] for path in missing}
        faults = [
            Problem("vda", f"{each} is not a directory") for each in folders.values() if each not in self.directories
        ]
        return InspectReply(faults, [], [], told)

    def _followed(self, path: str) -> str:
        directory, _, name = path.rpartition("/")
        directory = posixpath.normpath(self.links.get(directory, directory))
        return f"/{directory.lstrip('/')}/{name}"


class _Chosen:
    """What `BaseChoice` says of disks whose images are to be /there/DISK."""

    def __init__(
        self,
        files: Iterable[str],
        base: str | None = None,
        incomplete: str | None = None,
        links: Mapping[str, str] | None = None,
        **how: bool,
    ):
        self.problems: list[str] = []
        self.warnings: list[str] = []
        agent = _Agent(frozenset(files), frozenset({incomplete} if incomplete else ()), links=links or {})
        selection = Selection(shared_base=True, base=base, flatten=False)
        self.choice = BaseChoice(
            cast(AgentClient, agent), selection, self.problems, self.warnings, **{"layers_first": True, **how}
        )

    async def of(self, *disks: Disk) -> list[str]:
        """The paths that are missing, in the order in which they are brought."""
        for disk in disks:
            await self.choice.choose(disk, Path("/there") / disk.name, OWNER)
            self.choice.check(disk)
        return [layer.path for layer in self.choice.layers if not layer.there]


@pytest.mark.parametrize(
    ("there", "base", "brought"),
    [
        ({"base"}, None, ["third", "second"]),
        ({"base", "third"}, None, ["second"]),
        ({"base", "third"}, "/src/base", ["second"]),
        ({"base", "third"}, "third", ["second"]),
        ({"base", "second"}, None, []),
        ({"base", "second", "third"}, "base", []),
    ],
)
async def test_what_is_missing_above_the_base_is_brought_the_lowest_first(
    there: set[str], base: str | None, brought: list[str]
) -> None:
    chosen = _Chosen((f"/there/{name}" for name in there), base)
    assert await chosen.of(_chain()) == [f"/there/{name}" for name in brought]
    assert chosen.problems == []
    assert [layer.owner for layer in chosen.choice.layers] == [OWNER] * len(chosen.choice.layers)
    for name in brought:
        assert f"/src/{name} to /there/{name}" in chosen.warnings[0]
    assert len(chosen.warnings) == bool(brought)


@pytest.mark.parametrize(("there", "base"), [(set(), None), ({"/there/third"}, "base")])
async def test_where_the_base_is_missing_nothing_is_brought(there: set[str], base: str | None) -> None:
    chosen = _Chosen(there, base)
    assert await chosen.of(_chain()) == []
    assert "the destination has none of its bases: " in chosen.problems[0]


async def test_a_layer_of_two_disks_is_brought_once() -> None:
    chosen = _Chosen({"/there/base"})
    assert await chosen.of(_chain(), _chain("vdb", "other")) == ["/there/third", "/there/second"]


@pytest.mark.parametrize("directory", ["/there/.", "//there", "/there/x/..", "/link"])
async def test_a_layer_that_two_disks_spell_in_two_ways_is_brought_once(directory: str) -> None:
    chosen = _Chosen({"/there/base"}, links={"/link": "/there"})
    other = _chain("vdb", "other", named=lambda name: f"{directory}/{name}")
    layers = tuple(
        replace(layer, backing=Backing(f"{directory}/{below}", f"/src/{below}", "qcow2"))
        for layer, below in zip(other.layers, (*NAMES[1:], "nothing"), strict=True)
    )
    found = await chosen.of(_chain(), replace(other, layers=layers, backing=layers[0].backing))
    assert [posixpath.basename(path) for path in found] == ["third", "second"]
    image = Image("vdc", f"{directory}/second", "qcow2", 1 << 20, create=True)
    await chosen.choice.check_apart({"vdc": image})
    assert "its layer /src/second would come to " in chosen.problems[0]
    assert chosen.problems[0].endswith(", where the image of disk vdc goes")


async def test_a_layer_that_cannot_be_read_without_a_key_is_refused_unless_it_is_there() -> None:
    disk = _chain()
    locked = replace(disk, layers=(*disk.layers[:2], replace(disk.layers[2], encrypted=True), disk.layers[3]))
    chosen = _Chosen({"/there/base"})
    await chosen.of(locked)
    (problem,) = chosen.problems
    assert problem.startswith("disk vda: its layer /src/third is encrypted, and cannot be copied by itself")
    chosen = _Chosen({"/there/base", "/there/third"})
    assert await chosen.of(locked) == ["/there/second"] and chosen.problems == []


async def test_layers_that_are_named_by_their_whole_path_come_to_that_path() -> None:
    chosen = _Chosen({"/src/base"})
    assert await chosen.of(_chain(named=lambda name: f"/src/{name}")) == ["/src/third", "/src/second"]


async def test_a_layer_whose_directory_is_not_there_is_told_before_any_is_copied() -> None:
    chosen = _Chosen({"/src/third/base"})
    await chosen.of(_chain(named=lambda name: f"/src/{'third/' if name == 'base' else ''}{name}"))
    assert chosen.problems == []
    chosen = _Chosen({"/src/base"})
    await chosen.of(_chain(named=lambda name: f"/src/{'deep/' if name == 'third' else ''}{name}"))
    assert "disk vda: a layer cannot come there: /src/deep is not a directory" in chosen.problems


async def test_a_base_without_a_driver_of_its_own_is_raw() -> None:
    disk = _chain()
    lowest = replace(disk.layers[3], driver="file", backing=None)
    chosen = _Chosen({"/there/base"})
    await chosen.of(replace(disk, layers=(*disk.layers[:3], lowest)))
    assert [layer.format for layer in chosen.choice.layers] == ["raw", "qcow2", "qcow2"]


@pytest.mark.parametrize("base_is_there", [True, False])
async def test_two_layers_that_would_come_to_one_path_are_refused_unless_they_are_proven_there(
    base_is_there: bool,
) -> None:
    chosen = _Chosen({"/there/base", *(("/there/third", "/there/second") if base_is_there else ())})
    other = _chain("vdb", "other")
    elsewhere = tuple(replace(layer, filename=layer.filename.replace("/src", "/other")) for layer in other.layers)
    await chosen.of(_chain(), replace(other, layers=elsewhere))
    before = len(chosen.problems)
    await chosen.choice.check_apart({})
    told = chosen.problems[before:]
    assert len(told) == (0 if base_is_there else 2)
    if told:
        assert "its layer /other/second would come to /there/second, and so would /src/second" in told[0]


async def test_a_layer_that_a_job_left_incomplete_is_not_taken_for_there() -> None:
    chosen = _Chosen({"/there/base", "/there/third"}, incomplete="/there/third")
    await chosen.of(_chain())
    assert "is incomplete: /there/third was not filled: qemu-blkmig resume JOB" in chosen.problems[0]


async def test_the_guest_s_own_job_brings_none_and_says_so() -> None:
    chosen = _Chosen({"/there/base"}, layers_first=False)
    await chosen.of(_chain())
    assert "3 layers lie above its base" in chosen.problems[0] and not chosen.warnings


async def test_layers_that_qemu_has_open_under_other_names_cannot_be_named_there() -> None:
    disk = _chain()
    moved = replace(disk.layers[2], filename="/elsewhere/third")
    chosen = _Chosen({"/there/base"})
    await chosen.of(replace(disk, layers=(*disk.layers[:2], moved, *disk.layers[3:])))
    assert "names third as its backing file, but the source QEMU uses /elsewhere/third" in chosen.problems[0]


async def test_no_layer_comes_to_where_an_image_goes() -> None:
    chosen = _Chosen({"/there/base"})
    await chosen.of(_chain())
    image = Image("vdb", "/there/x/../second", "qcow2", 1 << 20, create=True)
    await chosen.choice.check_apart({"vdb": image})
    assert "its layer /src/second would come to /there/second, where the image of disk vdb goes" in chosen.problems[0]


def test_a_relative_name_is_beside_the_layer_that_names_it_or_flattened_beside_the_image() -> None:
    bases = bases_of(_chain(named=lambda name: f"../{name}/{name}"))
    image = Path("/there/web/top")
    assert paths_there(bases[:2], image, flatten=True) == ["/there/web/../second/second", "/there/web/../third/third"]
    assert paths_there(bases[:2], image, flatten=False)[1] == "/there/web/../second/../third/third"


class _Reporter:
    """Says what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[CopyOptions]:
    """What is copied of a domain's two layers, of which the lower one is missing, and the upper one cannot be read."""
    copied: list[CopyOptions] = []

    async def copy(options: CopyOptions, *_: object) -> None:
        copied.append(options)

    (tmp_path / "third").touch()
    found = LayerThere(
        "vda", str(tmp_path / "third"), "qcow2", "/there/third", OWNER, there=False, place="/there/third"
    )
    there = LayerThere("vda", "/src/base", "qcow2", "/there/base", OWNER, there=True, place="/there/base")
    plan = Plan((), (), {}, (), (), layers=(there, found))

    async def looked_at(*_: object) -> tuple[list[str], list[Plan]]:
        return [], [plan, plan]

    monkeypatch.setattr(layers, "_looked_at", looked_at)
    monkeypatch.setattr(layers, "copy", copy)
    return copied


async def _bring(persist: Any) -> tuple[ManagedOptions, list[str]]:
    selection = Selection(shared_base=True, base="base", flatten=False, disks=("vda",))
    wanted = ManagedOptions("web", "test:///default", Ssh("hostb", "/"), selection=selection)
    reporter = _Reporter()
    left = await layers.bring_layers(wanted, cast(Reporter, reporter), persist)
    assert isinstance(left, ManagedOptions)
    return left, reporter.notes


async def _persist(work: layers.Work) -> Result:
    return await work(cast(Reporter, None), Interrupts(lambda _: None), cast(Clock, None))


async def test_a_domain_s_layer_is_copied_for_libvirt_s_qemu_and_its_own_job_finds_its_base_anew(
    brought: list[CopyOptions],
) -> None:
    left, notes = await _bring(_persist)
    [copied] = brought
    assert (copied.image_there, copied.owner_there, copied.image_format) == ("/there/third", OWNER, "qcow2")
    assert copied.selection.disks is None and copied.selection.shared_base and copied.place == left.place
    assert left.selection.base is None and left.selection.disks == ("vda",)
    assert notes[0].endswith("is copied first, as a layer of its own (--flatten no)")


async def test_a_layer_whose_copy_was_suspended_is_to_be_resumed_before_the_command_is_repeated(
    brought: list[CopyOptions],
) -> None:
    async def breaks(_: layers.Work) -> Result:
        error = ConnectionLost("the agent is gone", advice="qemu-blkmig resume 1a2b goes on where it was")
        error.suspended = "1a2b"
        raise error

    with pytest.raises(ConnectionLost) as failure:
        await _bring(breaks)
    assert failure.value.state == "what stands upon this layer was not begun yet"
    assert failure.value.advice is not None
    assert failure.value.advice.endswith("once resumed, this layer is there: then run the same command again")
    assert not brought


async def test_what_would_fail_of_the_guest_s_own_job_is_told_before_a_layer_is_copied(
    brought: list[CopyOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def looked_at(*_: object) -> tuple[list[str], list[Plan]]:
        return ["a snapshot", "no network"], []

    monkeypatch.setattr(layers, "_looked_at", looked_at)
    with pytest.raises(Refused, match="a snapshot; no network") as failure:
        await _bring(_persist)
    assert failure.value.state == "nothing was touched" and not brought


async def test_certificates_that_the_guest_s_own_job_would_fail_by_are_told_before_a_layer_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = LayerThere("d", "/src/a", "qcow2", "/there/a", None, there=False, place="/there/a")
    socket = AsyncMock()
    planner = AsyncMock(plan=AsyncMock(return_value=Plan((), (), {}, (), (), layers=(found,))))
    monkeypatch.setattr(layers, "looking_at", AsyncMock(return_value=(None, None)))
    monkeypatch.setattr(layers, "SocketMonitor", AsyncMock(connect=AsyncMock(return_value=socket)))
    monkeypatch.setattr(layers, "Planner", lambda *_, **__: planner)
    monkeypatch.setattr(layers, "of_data", AsyncMock(return_value=(["it has expired"], [])))
    selection = Selection(shared_base=True, flatten=False)
    wanted = CopyOptions(Target(Ssh("hostb", "/there")), source="/qmp", selection=selection)
    with pytest.raises(Refused, match="it has expired"):
        await layers.bring_layers(wanted, cast(Reporter, _Reporter()), AsyncMock(side_effect=AssertionError))
