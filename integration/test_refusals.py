"""What cannot be migrated is refused, each with its reason, and everything is as it was: the guest writes all along."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from re import sub

import pytest

from integration.lab import Guest, Hardware, Lab, Qmp, assert_records_sound, compare_images, laboratory, wait_until
from integration.tool import (
    COMMAND,
    Outcome,
    arguments,
    assert_nothing_left,
    assert_runs_on,
    assert_writes_soundly,
    finish,
    migrate,
    run,
    start,
)
from qemu_blkmig.demo.guest import Kernel, Orders

MIB = 1 << 20


@pytest.fixture(scope="module")
def shared(kernel: Kernel, initramfs: Callable[[bool], Path]) -> Iterator[tuple[Lab, Guest]]:
    """One guest that no refused attempt may hurt, with every kind of drive that is left out."""
    with laboratory(kernel, initramfs) as lab:
        disk = lab.disk("disk", 8 * MIB)
        other = replace(lab.disk("other", 4 * MIB, "qcow2"), bus="scsi")
        fixed = replace(lab.disk("fixed", MIB), read_only=True)
        hardware = Hardware(cdrom=lab.disk("cd", MIB).path, empty_drive=True)
        guest = lab.boot([disk, other, fixed], Orders(rate=200), hardware)
        guest.wait_for_writing(more=20)
        yield lab, guest


@pytest.fixture
def scene(shared: tuple[Lab, Guest], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The shared guest and a new destination; what is there before is there afterwards, byte for byte."""
    lab, guest = shared
    target = lab.directory / f"target{len(list(lab.directory.iterdir()))}"
    target.mkdir()
    yield Scene(lab, guest, target)
    assert_runs_on(lab, guest, target)


@dataclass(frozen=True)
class Scene:
    """A guest, and a destination that is new."""

    lab: Lab
    guest: Guest
    target: Path

    def command(self, *replaced: tuple[str, str]) -> str:
        """The launch command, with words in it replaced."""
        command = self.guest.launch_command(self.target)
        for old, new in replaced:
            assert old in command
            command = command.replace(old, new)
        return command

    def refused(self, *words: str, launch: str | None = None, options: tuple[object, ...] = ()) -> Outcome:
        """Assert that a migration is refused with all the `words`, and that the destination is as it was."""
        before = _contents(self.target)
        outcome = run("migrate", self.guest, self.target, "--launch", launch or self.command(), *options)
        outcome.failed(3, *words)
        assert _contents(self.target) == before
        return outcome


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def _image(path: Path, size: int, format: str = "raw") -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", format, path, str(size)], check=True)


def test_check_says_that_all_is_well_and_names_the_drives_that_are_left_out(scene: Scene) -> None:
    options = ("--launch", scene.command())
    outcome = run("check", scene.guest, scene.target, "--output", "json", *options).succeeded()
    assert outcome.result["ready"] and not outcome.result["problems"]
    assert [disk["name"] for disk in outcome.result["disks"]] == ["dev0", "dev1"]
    assert [disk["virtual_size"] for disk in outcome.result["disks"]] == [8 * MIB, 4 * MIB]
    told = run("check", scene.guest, scene.target, *options).succeeded().stdout
    assert "note: dev2 is not migrated: it is read-only" in told
    assert "note: cd0 is not migrated: it is a CD-ROM" in told
    assert "note: dev-cd1 is not migrated: it is an empty CD-ROM drive" in told
    assert told.endswith("ready\n") and not list(scene.target.iterdir())


def test_check_tells_all_problems_at_once_and_touches_nothing(scene: Scene) -> None:
    _image(scene.target / "disk", 4 * MIB)
    (scene.target / "other").write_bytes(b"no qcow2")
    before = _contents(scene.target)
    options = ("--launch", "no-such-program -m 160", "--output", "json")
    outcome = run("check", scene.guest, scene.target, *options)
    assert outcome.code == 3
    problems = "\n".join(outcome.result["problems"])
    assert "disk dev0: " in problems and f"{4 * MIB} bytes" in problems and f"{8 * MIB}" in problems
    assert "disk dev1: " in problems and "other" in problems
    assert "no-such-program" in problems
    assert _contents(scene.target) == before


def test_unknown_and_unfit_disks_cannot_be_asked_for(scene: Scene) -> None:
    scene.refused("no disk 'nope'", "dev0, dev1", options=("--migrate-disks", "dev0,nope"))
    scene.refused("disk cd0: cannot be migrated: it is a CD-ROM", options=("--migrate-disks", "cd0"))
    scene.refused("disk dev2: cannot be migrated: it is read-only", options=("--migrate-disks", "dev2"))


def test_the_source_must_be_a_free_qmp_socket(scene: Scene) -> None:
    def refused(path: Path, *words: str) -> None:
        outcome = run("migrate", f"qmp:{path}", scene.target, "--launch", scene.command())
        outcome.failed(3, "source QEMU", str(path), *words, now="nothing was touched")
        assert not list(scene.target.iterdir())

    refused(scene.lab.directory / "nothing", "there is no QMP socket")
    refused(scene.guest.disks[0].path, "not a socket")
    with socket.socket(socket.AF_UNIX) as chatty:
        chatty.bind(str(scene.lab.directory / "chatty"))
        chatty.listen(1)
        process = start(arguments("migrate", f"qmp:{scene.lab.directory}/chatty", scene.target, "--pause-only"))
        client, _ = chatty.accept()
        client.sendall(b"220 mail.example.org ESMTP\r\n")
        finish(process).failed(3, "chatty", "QMP", now="nothing was touched")
        client.close()
    (scene.lab.directory / "chatty").unlink()
    with Qmp(scene.guest.qmp):
        refused(scene.guest.qmp, "already in use by another client")


def test_the_destination_must_be_a_directory_that_can_be_written(scene: Scene) -> None:
    missing = scene.target / "missing"
    outcome = run("migrate", scene.guest, missing, "--launch", scene.command())
    outcome.failed(3, f"there is no directory {missing}", now="the guest runs at the source")
    missing.write_text("a file")
    outcome = run("migrate", scene.guest, missing, "--launch", scene.command())
    outcome.failed(3, f"{missing} is not a directory", now="the guest runs at the source")
    assert missing.read_text() == "a file"
    read_only = scene.lab.directory / "read-only"
    read_only.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", read_only], check=True)
    try:
        outcome = run("migrate", scene.guest, read_only, "--launch", scene.command())
        outcome.failed(3, f"{read_only} cannot be written", now="the guest runs at the source")
    finally:
        subprocess.run(["umount", read_only], check=True)


def test_images_that_do_not_fit_are_left_alone(scene: Scene) -> None:
    _image(scene.target / "disk", 8 * MIB + 512)
    _image(scene.target / "other", 4 * MIB, "raw")
    scene.refused("disk dev0: ", f"{8 * MIB + 512} bytes", f"{8 * MIB}", "disk dev1: ", "qcow2")


def test_an_image_that_a_qemu_writes_to_is_left_alone(scene: Scene) -> None:
    disk = scene.lab.disk(f"in-use-{scene.target.name}", 8 * MIB)
    user = scene.lab.boot([disk], Orders(rate=200))
    try:
        user.wait_for_writing(more=20)
        (scene.target / "disk").symlink_to(disk.path)
        outcome = run("migrate", scene.guest, scene.target, "--launch", scene.command())
        outcome.failed(3, "disk dev0: ", "is open for writing in a QEMU", now="the guest runs at the source")
        assert_writes_soundly(user)
    finally:
        user.kill()
        (scene.target / "disk").unlink()


def test_a_launch_command_that_does_not_fit_the_guest_is_refused_with_what_it_said(scene: Scene) -> None:
    wrong_image = scene.lab.directory / "wrong-image"
    _image(wrong_image, 8 * MIB)
    scene.refused("no-such-program", "not found", launch="no-such-program")
    scene.refused("status 1", "broken-option", launch=scene.command(("-nodefaults", "-broken-option")))
    # It may have listened before it looked.
    scene.refused("it said", "nowhere", launch=scene.command((f"{scene.target}/disk", "/nowhere")))
    scene.refused("disk dev0: ", "no such disk", "dev7", launch=scene.command(("id=dev0", "id=dev7")))
    scene.refused(
        "disk dev0: ", str(wrong_image), f"{scene.target}/disk",
        launch=scene.command((f"{scene.target}/disk", str(wrong_image))),
    )  # fmt: skip
    smaller = scene.command(("driver=raw,node-name=disk0", f"driver=raw,node-name=disk0,size={4 * MIB}"))
    scene.refused("disk dev0: ", f"{4 * MIB}", launch=smaller)
    scene.refused("status 3", launch="sh -c 'exit 3'")
    # As a QEMU does that opens its sockets, and then does not like an image.
    listens = "from socket import *; s = socket(AF_UNIX); s.bind(sys.argv[-1].split(':')[1].split(',')[0]); s.listen()"
    ends = f'import sys; {listens}; s.accept(); sys.exit("the image is amiss")'
    scene.refused("does not answer any more", "the image is amiss", launch=shlex.join(["python3", "-c", ends]))


def test_a_target_qemu_that_does_not_wait_is_left_running(scene: Scene) -> None:
    other = scene.lab.boot([scene.lab.disk(f"own-{scene.target.name}", 8 * MIB)], Orders(rate=200))
    try:
        other.wait_for_writing(more=20)
        outcome = run("migrate", scene.guest, scene.target, "--target-qmp", other.qmp)
        outcome.failed(3, "does not wait", "running", now="the guest runs at the source")
        assert "-incoming defer" in outcome.stderr
        assert_writes_soundly(other)
    finally:
        other.kill()


def test_a_waiting_qemu_whose_disks_do_not_fit_is_refused_and_waits_on(scene: Scene) -> None:
    disk = scene.lab.disk(f"small-{scene.target.name}", 4 * MIB)
    waiting = scene.lab.boot([disk], Orders(), Hardware(extra=("-incoming", "defer")))
    try:
        wait_until(lambda: waiting.status() == "inmigrate", "the destination QEMU")
        outcome = run("migrate", scene.guest, scene.target, "--target-qmp", waiting.qmp)
        outcome.failed(3, "disk dev0: ", f"{4 * MIB}", "disk dev1: the destination QEMU has no such disk")
        assert waiting.status() == "inmigrate"
    finally:
        waiting.kill()


def test_an_nbd_server_of_somebody_else_is_left_running(scene: Scene) -> None:
    path = scene.lab.directory / "nbd"
    scene.guest.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(path)}}})
    try:
        scene.refused("NBD server", "somebody else", "nbd-server-stop")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            assert client.recv(8) == b"NBDMAGIC"
    finally:
        scene.guest.execute("nbd-server-stop")


def test_a_block_job_of_somebody_else_goes_on(scene: Scene) -> None:
    copy = scene.lab.directory / "mirror"
    mirror = {"device": "disk0", "job-id": "mine", "target": str(copy), "sync": "full", "format": "raw"}
    scene.guest.execute("drive-mirror", {**mirror, "speed": 65536})
    try:
        scene.refused("block job mine (mirror)")
        assert [job["device"] for job in scene.guest.execute("query-block-jobs")] == ["mine"]
    finally:
        scene.guest.execute("block-job-cancel", {"device": "mine", "force": True})
        wait_until(lambda: not scene.guest.execute("query-block-jobs"), "the end of the job")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("exactly one way", "--launch")),
        (("--launch", "qemu", "--pause-only"), ("exactly one way",)),
        (("--launch", " "), ("--launch",)),
        (("--launch", "qemu 'unclosed"), ("--launch",)),
        (("--pause-only", "--granularity", "1000"), ("--granularity", "power of two")),
        (("--pause-only", "--request-size", "1k"), ("--request-size",)),
        (("--pause-only", "--bandwidth", "12q"), ("--bandwidth",)),
        (("--pause-only", "--bandwidth", "0"), ("--bandwidth",)),
        (("--pause-only", "--connections", "0"), ("--connections",)),
        (("--pause-only", "--connections", "many"), ("--connections",)),
        (("--pause-only", "--downtime", "-1"), ("--downtime",)),
        (("--pause-only", "--max-rounds", "0"), ("--max-rounds",)),
        (("--pause-only", "--on-stall", "hope"), ("--on-stall",)),
        (("--pause-only", "--no-such-option"), ("--no-such-option",)),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_command_line_that_makes_no_sense_is_a_usage_error(options: tuple[str, ...], words: tuple[str, ...]) -> None:
    finish(start([*COMMAND, "migrate", "qmp:/nowhere", "local:/nowhere", *options])).failed(2, *words)


@pytest.mark.parametrize(
    ("source", "destination", "words"),
    [
        ("/a/path", "local:/b", ("not a source", "qmp:")),
        ("image:/a/path", "local:/b", ("no running guest",)),
        ("qmp:", "local:/b", ("not a source",)),
        ("qmp:/a", "/b", ("not a destination", "local:")),
        ("qmp:/a", "ssh://host", ("not a destination", "ssh://[user@]host")),
    ],
)
def test_sources_and_destinations_are_written_in_one_way(source: str, destination: str, words: tuple[str, ...]) -> None:
    finish(start([*COMMAND, "migrate", source, destination, "--pause-only"])).failed(2, *words)


def test_a_guest_without_a_disk_to_migrate_is_refused(lab: Lab) -> None:
    fixed = replace(lab.disk("fixed", MIB), read_only=True)
    empty = lab.disk("empty", 0)
    guest = lab.boot([fixed, empty], Orders(), Hardware(empty_drive=True, cdrom=lab.disk("cd", MIB).path))
    wait_until(lambda: guest.status() == "running", "the guest")
    outcome, _ = migrate(lab, guest)
    outcome.failed(3, "no disk to migrate", "dev0: it is read-only", "dev1: its size is 0", "cd0: it is a CD-ROM")
    outcome.failed(3, "dev-cd1: it is an empty CD-ROM drive", now="the guest runs at the source")
    outcome = run("copy", guest, lab.target)
    outcome.failed(3, "no disk to migrate", now="the guest runs at the source")
    assert guest.status() == "running"
    assert_nothing_left(lab, guest)


def test_of_two_migrations_of_one_guest_the_second_is_refused_and_the_first_completes(lab: Lab) -> None:
    disk = lab.disk("disk", 16 * MIB, data=[(0, 12 * MIB)])
    guest = lab.boot([disk], Orders(writer="idle"))
    guest.wait_for_writing(more=5)
    with Qmp(guest.monitor) as control:  # Paused: RAM is to move slowly, see the stalls in test_migrate.py.
        control.execute("stop")
    arrived = lab.destination(guest)
    command = ("--launch", guest.launch_command(lab.target), "--output", "json", "--verify", "full")
    first = start(arguments("migrate", guest, lab.target, *command, "--progress", "json", "--bandwidth", "1M"))
    assert first.stderr is not None
    while (line := json.loads(first.stderr.readline())).get("stage") != "bulk":
        assert line
    elsewhere = lab.directory / "elsewhere"
    elsewhere.mkdir()
    through_the_same = run("migrate", guest, elsewhere, "--pause-only")
    through_the_same.failed(3, "already in use by another client", now="nothing was touched")
    through_another = run("migrate", f"qmp:{guest.monitor}", elsewhere, "--pause-only")
    through_another.failed(3, "of qemu-blkmig works on it", now="the guest is at the source")
    assert not list(elsewhere.iterdir())
    finish(first).succeeded()
    arrived.resume()
    assert_writes_soundly(arrived, more=5)
    assert_nothing_left(lab, arrived)


def test_an_encrypted_disk_goes_to_plain_text_only_when_that_is_allowed(lab: Lab) -> None:
    disk = lab.disk("disk", MIB)
    secret = "secret,id=key,data=correct horse"
    locked = lab.directory / "locked"
    create = ["qemu-img", "create", "-q", "--object", secret, "-f", "luks", "-o", "key-secret=key,iter-time=10"]
    # qemu-img gives up where a thread's CPU time stands still for a moment ("Unable to get accurate CPU usage").
    patiently = ["sh", "-c", 'for n in 1 2 3 4 5 6 7 8; do "$@" && exit; done; exit 1', "sh"]
    subprocess.run([*patiently, *create, locked, str(4 * MIB)], check=True)
    node = f"driver=luks,node-name=locked,key-secret=key,file.driver=file,file.filename={locked}"
    source = ("-object", secret, "-blockdev", node)
    device = ("-device", "virtio-blk-pci,drive=locked,id=dev-locked")
    guest = lab.boot([disk], Orders(rate=200), Hardware(extra=(*source, *device)))
    guest.wait_for_writing(more=50)
    outcome = run("migrate", guest, lab.target, "--pause-only")
    outcome.failed(3, "disk dev-locked", "encrypted", "plain text", "--allow-plaintext")
    assert not list(lab.target.iterdir())
    outcome = run("migrate", guest, lab.target, "--pause-only", "--allow-plaintext", "--verify", "full")
    outcome.succeeded()
    acked = guest.acked("vdb")
    guest.quit()
    plain = replace(disk, path=lab.target / "locked", size=4 * MIB)
    assert plain.path.stat().st_size == plain.size
    assert_records_sound(plain, acked)
    compare_images(disk, replace(disk, path=lab.target / "disk"))


def test_a_destination_that_cannot_take_the_guest_says_why_and_resume_takes_another(lab: Lab) -> None:
    guest = lab.boot([lab.disk("disk", 4 * MIB)])
    guest.wait_for_writing()
    launched = lab.destination(guest)
    command = sub(r"-m \S+", "-m 128", guest.launch_command(lab.target), count=1)
    outcome = run("migrate", guest, lab.target, "--launch", command)
    outcome.failed(1, "the destination QEMU", "Size mismatch", now="the guest runs at the source")
    (job,) = (path.parent.name for path in lab.state.glob("*/record.json"))
    finish(start([*COMMAND, "resume", job, "--launch", guest.launch_command(lab.target)])).succeeded()
    launched.wait_for_writing(more=5)
    assert_nothing_left(lab, launched)
