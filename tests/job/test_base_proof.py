"""Shared bases, chosen and proven with real QEMUs and a real agent."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qemu_blkmig.job.options import BaseCheck, Selection
from qemu_blkmig.job.plan import Plan, Planner
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.local import LocalHost
from tests.qmp.conftest import Qemu, StartQemu

MIB = 1 << 20


@pytest.fixture
async def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[AgentClient]:
    monkeypatch.setenv("QEMU_BLKMIG_STATE_DIR", str(tmp_path / "state"))
    client = await LocalHost().start_agent()
    yield client
    await client.close()


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """The directory of base, middle and top, each with data of its own; the base is also at the destination."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    for name, below in (("base", None), ("middle", "base"), ("top", "middle")):
        options = ["-b", below, "-F", "qcow2"] if below else []
        size = [] if below else ["8M"]
        subprocess.run(["qemu-img", "create", "-qf", "qcow2", *options, here / name, *size], check=True)
        write = f"write -P {ord(name[0])} {MIB} 2M"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, here / name], check=True, stdout=subprocess.DEVNULL)
    shutil.copy(here / "base", there)
    return here


async def source(start_qemu: StartQemu, chain: Path) -> Qemu:
    drive = f"if=none,id=d,format=qcow2,file={chain / 'top'}"
    return await start_qemu("-drive", drive, "-device", "virtio-blk,drive=d")


async def plan(qemu: Qemu, agent: AgentClient, chain: Path, told: list[str] | None = None, **wishes: Any) -> Plan:
    selection = Selection(shared_base=True, **wishes)
    tell = (lambda _: None) if told is None else told.append
    planner = Planner(agent, selection, chain.parent / "there", tell)
    return await planner.plan(qemu.monitor, None, "blkmig-test", with_ram=False)


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True)


def change(image: Path, offset: int, length: int) -> None:
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -P 99 {offset} {length}", str(image)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


async def test_the_topmost_layer_that_the_destination_has_is_the_base(
    start_qemu: StartQemu, agent: AgentClient, chain: Path
) -> None:
    qemu = await source(start_qemu, chain)
    planned = await plan(qemu, agent, chain)
    backing = planned.images["d"].backing
    assert planned.problems == () and backing is not None
    assert (planned.private, backing.path) == ({"d": 2}, "base")

    shutil.copy(chain / "middle", chain.parent / "there")
    planned = await plan(qemu, agent, chain)
    backing = planned.images["d"].backing
    assert planned.problems == () and backing is not None
    assert (planned.private, backing.path) == ({"d": 1}, "middle")

    for name in ("base", str(chain / "base")):
        assert (await plan(qemu, agent, chain, base=name)).private == {"d": 2}
    [problem] = (await plan(qemu, agent, chain, base="nothing")).problems
    assert "nothing is none of its bases, which are: " in problem and str(chain / "middle") in problem


async def test_a_destination_without_any_base_and_layers_that_are_to_be_kept_are_refused(
    start_qemu: StartQemu, agent: AgentClient, chain: Path
) -> None:
    qemu = await source(start_qemu, chain)
    [problem] = (await plan(qemu, agent, chain, flatten=False)).problems
    assert (
        "2 layers lie above its base" in problem
        and "copy image:LAYER --source-format FMT --shared-base brings one" in problem
    )
    (chain.parent / "there/base").unlink()
    problems = (await plan(qemu, agent, chain)).problems
    assert any("the destination has none of its bases: " in problem for problem in problems)


async def test_equal_contents_are_proven_whatever_the_images_look_like(
    start_qemu: StartQemu, agent: AgentClient, chain: Path
) -> None:
    qemu = await source(start_qemu, chain)
    there = chain.parent / "there/base"
    qemu_img("convert", "-O", "qcow2", "-o", "cluster_size=4096", "-S", "0", chain / "base", there)
    told: list[str] = []
    planned = await plan(qemu, agent, chain, told)
    assert (planned.problems, planned.warnings) == ((), ())
    assert told[0].startswith(f"disk d: comparing its base {chain / 'base'} with {there}")
    assert told[1].startswith("disk d: the bases are equal (read 2.0 MiB here, ")


async def test_a_base_that_differs_is_refused_and_the_first_bytes_are_named(
    start_qemu: StartQemu, agent: AgentClient, chain: Path
) -> None:
    qemu = await source(start_qemu, chain)
    there = chain.parent / "there/base"
    change(there, 5 * MIB + 1024, 512)
    change(there, 7 * MIB, 512)
    [problem] = (await plan(qemu, agent, chain)).problems
    assert problem.startswith(f"disk d: the base {there} at the destination is not the source's {chain / 'base'}")
    assert f"first in bytes {5 * MIB + 1024} to {5 * MIB + 1535}:" in problem
    assert "without --shared-base (virsh-blkmigrate: without --copy-storage-inc)" in problem

    [warning] = (await plan(qemu, agent, chain, base_check=BaseCheck.SIZE)).warnings
    assert "only the size of the base" in warning and "its content may differ" in warning
    [warning] = (await plan(qemu, agent, chain, base_check=BaseCheck.NONE)).warnings
    assert "was not compared (--base-check none): it is taken on trust" in warning


@pytest.mark.parametrize("check", [BaseCheck.FULL, BaseCheck.SIZE])
async def test_a_base_of_another_size_is_refused(
    start_qemu: StartQemu, agent: AgentClient, chain: Path, check: BaseCheck
) -> None:
    qemu = await source(start_qemu, chain)
    qemu_img("resize", "-q", chain.parent / "there/base", "9M")
    [problem] = (await plan(qemu, agent, chain, base_check=check)).problems
    assert f"holds {9 * MIB} bytes, the source's {chain / 'base'} {8 * MIB}" in problem


async def test_a_base_that_somebody_writes_to_or_that_cannot_be_reached_is_refused(
    start_qemu: StartQemu, agent: AgentClient, chain: Path
) -> None:
    qemu = await source(start_qemu, chain)
    there = chain.parent / "there/base"
    await start_qemu("-drive", f"if=none,id=w,format=qcow2,file={there}", "-device", "virtio-blk,drive=w")
    [problem] = (await plan(qemu, agent, chain)).problems
    assert f"the base {there} cannot be read" in problem and "lock" in problem

    (chain / "base").rename(chain / "gone")
    (chain / "base").symlink_to("nowhere")
    [problem] = (await plan(qemu, agent, chain)).problems
    assert "cannot be read from here" in problem and "--base-check none goes without the proof" in problem
