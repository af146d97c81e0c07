"""The old wire format with real guests: an old QEMU's stream into images and on to a new QEMU, and a saved guest."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from integration.lab import (
    Disk,
    Format,
    Guest,
    Hardware,
    Lab,
    Qmp,
    agent_execute,
    assert_files_sound,
    assert_records_sound,
    compare_images,
    wait_until,
)
from integration.thorough import also
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20
SIZE = 48 * MIB
ORDERS = Orders(rate=200)


def blkmig(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qemu_blkmig", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], *, status: int = 0) -> str:
    """What it printed."""
    output, said = process.communicate(timeout=120)
    assert process.returncode == status, said
    return output + said


def until_listening(path: Path) -> None:
    wait_until(path.exists, f"a listener on {path}", 20)


def migrate_old(guest: Guest, uri: str) -> None:
    """The old engine; a downtime limit of 1 ms keeps it from losing data (FACTS.md)."""
    guest.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40, "downtime-limit": 1})
    guest.execute("migrate", {"uri": uri, "blk": True})


def migrate_while_writing(guest: Guest, uri: str) -> None:
    """As `migrate_old`, slowly at first: the guest writes meanwhile, and is paused before the end.

    QEMU 7.2 under TCG loses RAM that a running guest writes while it is migrated with its disks, without us just as
    well (the guest's kernel panics at the destination); paused before the end it comes over whole.
    """
    guest.execute("migrate-set-parameters", {"max-bandwidth": 40 * MIB, "downtime-limit": 1})
    guest.execute("migrate", {"uri": uri, "blk": True})
    guest.wait_for_writing(more=20)
    guest.pause()
    assert migration_status(guest) == "active"
    guest.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})


def migration_status(guest: Guest) -> str:
    return str(guest.execute("query-migrate").get("status"))


def waiting_destination(lab: Lab, guest: Guest, place: Path) -> Guest:
    """A QEMU with the guest's devices and empty images, that waits for a stream on the socket `place`."""
    destination = lab.destination(guest)
    for disk in destination.disks:
        subprocess.run(["qemu-img", "create", "-q", "-f", disk.format, disk.path, str(disk.size)], check=True)
    with (lab.directory / "destination.stderr").open("wb") as errors:
        command = [*destination.arguments(), "-incoming", f"unix:{place}"]
        destination.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=errors)
    until_listening(place)
    return destination


@pytest.mark.parametrize(
    ("format", "return_path"),
    [("qcow2", False), ("raw", True), *also(("raw", False))],
    ids=["qcow2", "with a return path", "raw"],
)
def test_a_guest_moves_from_an_old_qemu_to_one_without_block_migration(
    lab: Lab, format: Format, return_path: bool
) -> None:
    disk = lab.disk("one", SIZE, format, data=[(SIZE // 2, SIZE // 2)])
    guest = lab.boot([disk], ORDERS, Hardware(style="drive"))
    guest.wait_for_writing()
    destination = forward(lab, guest, migrate_while_writing, return_path=return_path)
    compare_images(disk, destination.disks[0])
    destination.resume()
    assert_goes_on(guest, destination)


def test_a_guest_that_runs_up_to_the_switchover_goes_on_behind_it(lab: Lab) -> None:
    disk = lab.disk("one", SIZE, "qcow2", data=[(SIZE // 2, SIZE // 2)])
    guest = lab.boot([disk], Orders("idle", rate=20), Hardware(style="drive"))
    guest.wait_for_writing()
    destination = forward(lab, guest, migrate_old, arrives="running")
    assert_goes_on(guest, destination)


def forward(
    lab: Lab, guest: Guest, migrate: Callable[[Guest, str], None], *, arrives: str = "paused", return_path: bool = False
) -> Guest:
    """Migrate a guest of one disk by the old engine through `load --forward`; the guest as it `arrives`."""
    old, new = lab.directory / "old.sock", lab.directory / "new.sock"
    destination = waiting_destination(lab, guest, new)
    if return_path:
        for qemu in (guest, destination):
            switch_on(qemu, "return-path")
    moved = destination.disks[0]
    loading = blkmig(
        "load", "--from", f"unix:{old}", "--forward", f"unix:{new}", "--format", moved.format, "--require-complete",
        f"disk0={moved.path}",
    )  # fmt: skip
    until_listening(old)
    migrate(guest, f"unix:{old}")
    assert "passed on" in finish(loading)
    wait_until(lambda: migration_status(guest) == "completed", "the source's migration")
    wait_until(lambda: destination.status() == arrives, "the guest at the destination")
    assert not Path(f"{moved.path}.incomplete").exists()
    return destination


def assert_goes_on(guest: Guest, destination: Guest) -> None:
    """Assert that the guest writes at the destination, and that nothing it ever wrote is lost."""
    before = guest.acked()
    assert destination.wait_for_writing(more=20) > before
    destination.pause()
    assert_records_sound(destination.disks[0], destination.acked())


def switch_on(guest: Guest, *capabilities: str) -> None:
    """Capabilities of its QEMU's migration."""
    switched = [{"capability": name, "state": True} for name in capabilities]
    guest.execute("migrate-set-capabilities", {"capabilities": switched})


def test_the_destination_gets_no_device_state_if_the_disks_do_not_arrive(lab: Lab) -> None:
    disk = lab.disk("one", SIZE, "raw", data=[(0, SIZE)])
    guest = lab.boot([disk], ORDERS, Hardware(style="drive"))
    guest.wait_for_writing()
    old, new = lab.directory / "old.sock", lab.directory / "new.sock"
    destination = waiting_destination(lab, guest, new)
    loading = blkmig("load", "--from", f"unix:{old}", "--forward", f"unix:{new}", f"vdx={destination.disks[0].path}")
    until_listening(old)
    migrate_old(guest, f"unix:{old}")
    assert "a block of device 'disk0', expected 'vdx'" in finish(loading, status=1)
    wait_until(lambda: migration_status(guest) == "failed", "the source's failure")
    wait_until(lambda: guest.status() == "running", "the guest at the source")
    acked = guest.wait_for_writing(more=20)
    guest.pause()
    assert_records_sound(disk, acked)
    wait_until(lambda: not destination.running(), "the end of the destination, whose stream broke off")


@pytest.mark.parametrize(
    ("format", "kind", "hardware", "capabilities"),
    [
        ("raw", "tcp", Hardware(style="drive"), ("xbzrle",)),
        ("qcow2", "unix", Hardware(machine="pc", style="drive"), ("zero-blocks", "compress")),
        ("raw", "tcp", Hardware(style="drive", extra=("-global", "migration.send-configuration=off")), ()),
    ],
    ids=["xbzrle over tcp", "compressed RAM", "no configuration over tcp"],
)
def test_a_writing_guest_is_loaded_from_the_old_engine(
    lab: Lab, format: Format, kind: str, hardware: Hardware, capabilities: Sequence[str]
) -> None:
    disks = [lab.disk("one", SIZE, format, data=[(0, SIZE // 2)]), lab.disk("two", 8 * MIB, "raw")]
    guest = lab.boot(disks, ORDERS, hardware)
    guest.wait_for_writing()
    switch_on(guest, *capabilities)
    loaded = [Disk(lab.target / "one", format, SIZE), Disk(lab.target / "two", format, 8 * MIB)]
    loading = blkmig(
        "load", "--from", f"{kind}:{lab.directory / 'sock' if kind == 'unix' else '127.0.0.1:0'}",
        "--create", "--format", format, "--size", f"disk0={SIZE}",
        "--size", "disk1=8M", "--require-complete", *(f"disk{n}={disk.path}" for n, disk in enumerate(loaded)),
    )  # fmt: skip
    migrate_while_writing(guest, told_to_connect_to(loading))
    finish(loading)
    wait_until(lambda: migration_status(guest) == "completed", "the source's migration")
    for disk, copy in zip(disks, loaded, strict=True):
        compare_images(disk, copy)
    assert_records_sound(loaded[0], guest.acked("vda"))
    lab.assert_no_leftovers(guest)


def told_to_connect_to(loading: subprocess.Popen[str]) -> str:
    """Where `load` says that it waits."""
    assert loading.stderr is not None
    for line in loading.stderr:
        if found := re.search(r"waiting for a connection on (\S+)", line):
            return found[1]
    raise AssertionError("load does not wait")


@pytest.mark.parametrize("kind", ["file", "tcp", *also("unix")])
def test_a_writing_guest_is_saved_and_goes_on(lab: Lab, kind: str) -> None:
    disk = lab.disk("one", SIZE, "qcow2", data=[(SIZE // 2, SIZE // 4)])
    guest = lab.boot([disk], ORDERS, Hardware(style="drive"))
    acked = guest.wait_for_writing(more=20)
    loaded = Disk(lab.target / "one", "raw", SIZE)
    if kind == "file":
        stream = f"file:{lab.directory}/stream"
        said = finish(blkmig("save", f"qmp:{guest.qmp}", "--to", stream))
        finish(blkmig("load", "--from", stream, "--create", "--require-complete", f"disk0={loaded.path}"))
    else:
        said = save_into_qemu(lab, guest, loaded, f"unix:{lab.directory}/in" if kind == "unix" else free_port())
    assert "saved: the guest runs at the source" in said
    assert_records_sound(loaded, acked)
    later = guest.wait_for_writing(more=20)
    guest.pause()
    assert_records_sound(disk, later)
    lab.assert_no_leftovers(guest)


def test_a_save_freezes_the_file_systems_by_the_guest_agent_and_keeps_to_its_bandwidth(lab: Lab) -> None:
    disk = lab.disk("one", SIZE)
    guest = lab.boot([disk], Orders(agent=True))
    acked = guest.wait_for_writing(more=20)
    stream = f"file:{lab.directory}/stream"
    options = (
        "--name",
        "dev0=disk0",
        "--agent",
        str(guest.agent),
        "--bandwidth",
        "16M",
        "--no-zero-blocks",
        "--output",
        "json",
    )
    saving = blkmig("save", f"qmp:{guest.qmp}", "--to", stream, *options)
    output, said = saving.communicate(timeout=120)
    assert saving.returncode == 0, said
    result = json.loads(output)
    assert result["consistency"] == "file systems", result
    assert "froze 1 file systems" in said
    assert result["phases"]["bulk"] > 2, "48 MiB, 16 of them a second"
    assert agent_execute(guest.agent, "guest-fsfreeze-status") == "thawed"
    guest.wait_for_writing(more=20)
    loaded = Disk(lab.target / "one", "raw", SIZE)
    finish(blkmig("load", "--from", stream, "--create", "--require-complete", f"disk0={loaded.path}"))
    assert_files_sound(loaded, acked)
    lab.assert_no_leftovers(guest)


def free_port() -> str:
    """One that nobody listens on, as a migration's URI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp:127.0.0.1:{probe.getsockname()[1]}"


def save_into_qemu(lab: Lab, guest: Guest, loaded: Disk, uri: str) -> str:
    """Save into a QEMU that runs nothing, which then writes out its image."""
    loaded.path.touch()
    os.truncate(loaded.path, loaded.size)
    command = ["qemu-system-x86_64", "-M", guest.hardware.machine, "-accel", "tcg", "-m", "16", "-nodefaults", "-S"]
    command += ["-display", "none", "-incoming", uri, "-qmp", f"unix:{lab.directory}/q,server=on,wait=off"]
    command += ["-drive", f"file={loaded.path},format=raw,if=virtio,id=disk0"]
    with subprocess.Popen(command) as waiting:
        # Its monitor answers only when it listens.
        with Qmp(lab.directory / "q") as monitor:
            assert monitor.execute("query-status")["status"] == "inmigrate"
            said = finish(blkmig("save", f"qmp:{guest.qmp}", "--to", uri))
            wait_until(lambda: monitor.execute("query-migrate").get("status") == "completed", "the QEMU has loaded")
            monitor.execute("quit")
        waiting.wait(20)
    return said
