"""`--shared-base`: the bases of both sides are proven to be the same, and layers above them are sent as one."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from integration.lab import Disk, Hardware, Lab, wait_until
from integration.luck import Attempt, kill
from integration.tool import (
    assert_figures_add_up,
    assert_nothing_left,
    assert_runs_on,
    assert_writes_soundly,
    migrate,
    run,
)
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20
SIZE = 32 * MIB


def _overlay(lab: Lab, name: str, base: Disk) -> Disk:
    """An overlay that names its base as a file beside it."""
    overlay = lab.disk(name, SIZE, "qcow2", backing=base, data=[(2 * MIB, MIB)])
    subprocess.run(["qemu-img", "rebase", "-u", "-b", base.path.name, "-F", "qcow2", overlay.path], check=True)
    return overlay


def _chain(image: Path) -> list[str | None]:
    """What each image of the chain names as its backing file."""
    command = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", str(image)]
    told = subprocess.run(command, check=True, capture_output=True).stdout
    return [each.get("backing-filename") for each in json.loads(told)]


def _change(image: Path, offset: int) -> bytes:
    """Damage 512 bytes of the image; returns what the image was."""
    before = image.read_bytes()
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -P 99 {offset} 512", str(image)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return before


def test_a_base_that_differs_is_refused_and_one_that_is_known_costs_the_second_guest_nothing(lab: Lab) -> None:
    base = lab.disk("base", SIZE, "qcow2", data=[(0, 20 * MIB)])
    overlay = _overlay(lab, "overlay", base)
    there = Path(shutil.copy(base.path, lab.target / base.path.name))
    before = _change(there, 17 * MIB + 512)
    guest = lab.boot([overlay], Orders(writer="sequential", rate=100))
    guest.wait_for_writing(more=20)
    where = f"first in bytes {17 * MIB + 512} to {17 * MIB + 1023}"
    for command in ("copy", "migrate"):
        options = ("--launch", guest.launch_command(lab.target)) if command == "migrate" else ()
        outcome = run(command, guest, lab.target, "--shared-base", *options)
        outcome.failed(3, "disk dev0: the base ", str(there), where, now="the guest runs at the source")
    assert sorted(each.name for each in lab.target.iterdir()) == ["base"]
    outcome = run("copy", guest, lab.target, "--shared-base", "--base-check", "size", "--output", "json").succeeded()
    assert any("its content may differ" in warning for warning in outcome.result["warnings"])
    (lab.target / "overlay").unlink()

    there.write_bytes(before)
    outcome = run("copy", guest, lab.target, "--shared-base")
    assert "the bases are equal (read " in outcome.succeeded().stderr
    # The base at the destination was written just now, and only what has rested for a while is remembered.
    wait_until(
        lambda: "(read 0 B here, 0 B there)" in run("copy", guest, lab.target, "--shared-base", "--compare").stderr,
        "both sides' bases to be known",
        timeout=60,
    )
    assert_runs_on(lab, guest)

    outcome, arrived = migrate(lab, guest, "--shared-base", "--compare", "--verify", "full")
    assert_figures_add_up(outcome.succeeded().result)
    assert "the bases are equal (read 0 B here, 0 B there)" in outcome.stderr
    assert_writes_soundly(arrived)
    assert_nothing_left(lab, arrived)


def test_a_guest_with_an_external_snapshot_arrives_layer_by_layer_or_with_one_overlay(lab: Lab) -> None:
    base = lab.disk("base", SIZE, "qcow2", data=[(0, 20 * MIB)])
    below = _overlay(lab, "below", base)
    top = lab.disk("top", SIZE, "qcow2", backing=below)
    subprocess.run(["qemu-img", "rebase", "-u", "-b", "below", "-F", "qcow2", top.path], check=True)
    shutil.copy(base.path, lab.target / base.path.name)
    guest = lab.boot([top], Orders(writer="random", rate=200, span=MIB))
    guest.wait_for_writing(more=50)
    # Layer by layer, first; slowly, so that the agent can be killed meanwhile.
    guest.pause()
    attempt = Attempt(
        lab, guest, "--shared-base", "--flatten", "no", "--retry", 2, "--bandwidth", "1M", verb="copy", launch=False
    )
    attempt.wait_copying()
    kill(attempt.agent())
    outcome = attempt.outcome().succeeded()
    assert "is copied first, as a layer of its own" in outcome.stderr
    assert "trying again in 1 s (1 of 2)" in outcome.stderr
    guest.resume()
    assert _chain(lab.target / "top") == ["below", "base", None]
    layers = [below.path, lab.target / "below"]
    subprocess.run(["qemu-img", "compare", "-U", *layers], check=True, stdout=subprocess.DEVNULL)
    for name in ("top", "below"):
        (lab.target / name).unlink()
    # And as one.
    outcome, arrived = migrate(lab, guest, "--shared-base", "--verify", "full")
    result = outcome.succeeded().result
    assert_figures_add_up(result)
    assert result["disks"][0]["skipped"] >= 8 * MIB
    assert _chain(arrived.disks[0].path) == ["base", None]
    assert_writes_soundly(arrived)
    assert_nothing_left(lab, arrived)


def test_the_base_of_a_qemu_that_waits_is_compared_too(lab: Lab) -> None:
    base = lab.disk("base", SIZE, "qcow2", data=[(0, 4 * MIB)])
    overlay = _overlay(lab, "overlay", base)
    other = replace(overlay, path=lab.directory / "elsewhere" / "mine")
    other.path.parent.mkdir()
    there = Path(shutil.copy(base.path, other.path.parent / "base"))
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", str(other.path)]
    subprocess.run(command, check=True)
    before = _change(there, 3 * MIB)
    guest = lab.boot([overlay], Orders(writer="sequential", rate=100))
    waiting = lab.boot([other], Orders(writer="sequential", rate=100), Hardware(extra=("-incoming", "defer")))
    guest.wait_for_writing(more=20)
    wait_until(lambda: waiting.status() == "inmigrate", "the destination QEMU")
    options = ("--shared-base", "--target-qmp", waiting.qmp)
    outcome = run("migrate", guest, lab.target, *options)
    outcome.failed(3, str(there), f"first in bytes {3 * MIB} to", now="the guest runs at the source")
    assert waiting.status() == "inmigrate"
    run("check", guest, lab.target, *options).failed(3)
    there.write_bytes(before)
    result = run("migrate", guest, lab.target, *options, "--verify", "full", "--output", "json").succeeded().result
    assert_figures_add_up(result)
    assert_writes_soundly(waiting)
    assert_nothing_left(lab, waiting)
