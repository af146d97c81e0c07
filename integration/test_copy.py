"""`copy`: point-in-time consistent copies of running guests' disks, and of image files; the guest stays where it is."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from integration.lab import (
    Disk,
    Lab,
    agent_execute,
    assert_files_sound,
    assert_records_sound,
    compare_images,
)
from integration.tool import (
    assert_figures_add_up,
    assert_nothing_left,
    assert_runs_on,
    assert_writes_soundly,
    device_names,
    run,
)
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20
SECTOR = 512


def copied(lab: Lab, disk: Disk) -> Disk:
    """The copy of a disk."""
    return replace(disk, path=lab.target / disk.path.name)


def test_the_copy_of_a_running_guest_is_of_one_moment_and_can_be_made_anew_over_the_old_one(lab: Lab) -> None:
    raw = lab.disk("raw", 16 * MIB + SECTOR, data=[(MIB, 2 * MIB)])
    qcow2 = replace(lab.disk("qcow2", 8 * MIB, "qcow2", data=[(0, MIB)]), bus="scsi")
    guest = lab.boot([raw, qcow2], Orders(rate=400))
    guest.wait_for_writing(more=50)
    for options in ((), ("--verify", "full", "--granularity", "4k", "--connections", 2)):
        acked = {name: guest.acked(name) for name in device_names(guest)}
        result = run("copy", guest, lab.target, "--output", "json", *options).succeeded().result
        assert result["outcome"] == "copied" and result["consistency"] == "crash"
        assert result["guest"] == "the guest runs at the source"
        assert result["downtime"]["total"] > 0
        assert_figures_add_up(result)
        for disk, name in zip(guest.disks, acked, strict=True):
            assert_records_sound(copied(lab, disk), acked[name])
        assert_runs_on(lab, guest)

    guest.pause()
    result = run("copy", guest, lab.target, "--output", "json", "--migrate-disks", "dev0").succeeded().result
    assert result["guest"] == "the guest is at the source, paused as it was" and result["downtime"] is None
    assert guest.status() == "paused"
    compare_images(raw, copied(lab, raw))
    guest.resume()
    assert_runs_on(lab, guest)


def test_file_systems_are_frozen_by_the_guest_agent_and_thawed_and_a_hung_agent_is_given_up_on(lab: Lab) -> None:
    disk = lab.disk("disk", 64 * MIB)
    guest = lab.boot([disk], Orders(agent=True))
    acked = guest.wait_for_writing(more=20)
    outcome = run("copy", guest, lab.target, "--agent", guest.agent, "--output", "json").succeeded()
    assert outcome.result["consistency"] == "file systems"
    assert "froze 1 file systems" in outcome.stderr
    assert_files_sound(copied(lab, disk), acked)
    assert agent_execute(guest.agent, "guest-fsfreeze-status") == "thawed"
    guest.wait_for_writing(more=20)
    assert_nothing_left(lab, guest)

    with _silent_agent(lab.directory / "silent") as silent:
        outcome = run("copy", guest, lab.target, "--agent", silent, "--output", "json").succeeded()
    assert outcome.result["consistency"] == "crash"
    assert any("given up on" in warning and "crash-consistent" in warning for warning in outcome.result["warnings"])
    assert outcome.result["downtime"]["total"] < 5
    outcome = run("copy", guest, lab.target, "--agent", lab.directory / "no-agent", "--output", "json").succeeded()
    assert outcome.result["consistency"] == "crash" and "no-agent" in outcome.stderr
    assert agent_execute(guest.agent, "guest-fsfreeze-status") == "thawed"
    guest.wait_for_writing(more=20)
    assert_nothing_left(lab, guest)


def test_file_systems_that_somebody_else_has_frozen_stay_so(lab: Lab) -> None:
    guest = lab.boot([lab.disk("disk", 64 * MIB)], Orders(agent=True))
    guest.wait_for_writing()
    agent_execute(guest.agent, "guest-fsfreeze-freeze")
    outcome = run("copy", guest, lab.target, "--agent", guest.agent, "--output", "json").succeeded()
    assert outcome.result["consistency"] == "crash"
    assert any("somebody else has frozen" in warning for warning in outcome.result["warnings"])
    assert agent_execute(guest.agent, "guest-fsfreeze-status") == "frozen"
    agent_execute(guest.agent, "guest-fsfreeze-thaw")
    guest.wait_for_writing(more=20)
    assert_nothing_left(lab, guest)


@contextlib.contextmanager
def _silent_agent(path: Path) -> Iterator[Path]:
    """A socket that takes clients and never answers."""
    taken: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(8)

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(listener.accept()[0])

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for client in taken:
                client.close()


def test_an_image_file_is_copied_flattened_or_with_its_base_shared_but_not_under_a_running_guest(lab: Lab) -> None:
    raw = lab.disk("raw", 4 * MIB + SECTOR, data=[(MIB, MIB)])
    base = lab.disk("base", 8 * MIB, data=[(0, 4 * MIB)])
    overlay = lab.disk("overlay", 8 * MIB, "qcow2", backing=base, data=[(MIB, 65536)])
    looks_like_it = run("copy", overlay.path, lab.target)
    looks_like_it.failed(3, f"goes on in {base.path}", "--source-format qcow2", now="nothing was touched")
    for disk in (raw, overlay):
        options = ("--source-format", disk.format, "--output", "json", "--verify", "full")
        result = run("copy", disk.path, lab.target, *options).succeeded().result
        assert result["outcome"] == "copied" and result["downtime"] is None and result["consistency"] is None
        assert_figures_add_up(result)
        compare_images(disk, copied(lab, disk))
    assert "backing-filename" not in _info(copied(lab, overlay))

    (lab.target / "overlay").unlink()
    told = run("copy", overlay.path, lab.target, "--source-format", "qcow2", "--shared-base", "--output", "json")
    result = told.succeeded().result
    assert result["disks"][0]["copied"] == 65536
    assert result["disks"][0]["skipped"] == overlay.size - 65536
    compare_images(overlay, copied(lab, overlay))
    assert _info(copied(lab, overlay))["backing-filename"] == str(base.path)
    lab.assert_no_leftovers(directories=[lab.target])

    run("copy", raw.path, raw.path.parent).failed(3, "disk raw: ", str(raw.path), now="nothing was touched")

    guest = lab.boot([raw], Orders(rate=400))
    guest.wait_for_writing(more=20)
    before = copied(lab, raw).path.read_bytes()
    outcome = run("copy", raw.path, lab.target)
    outcome.failed(3, str(raw.path), "if a guest is using it, copy from the guest", now="nothing was touched")
    assert copied(lab, raw).path.read_bytes() == before
    outcome = run("copy", lab.directory / "no-such-image", lab.target)
    outcome.failed(3, "no-such-image", "No such file", now="nothing was touched")
    outcome = run("copy", overlay.path, lab.target, "--source-format", "vmdk")
    outcome.failed(3, str(overlay.path), "VMDK", now="nothing was touched")
    assert_writes_soundly(guest)
    assert_nothing_left(lab, guest)


def _info(disk: Disk) -> dict[str, object]:
    told = subprocess.run(["qemu-img", "info", "--output=json", disk.path], check=True, capture_output=True)
    parsed: dict[str, object] = json.loads(told.stdout)
    return parsed
