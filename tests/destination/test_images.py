"""Images inspected, prepared and discarded, with the real qemu-img."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from msgspec import structs

from qemu_blkmig import errors
from qemu_blkmig.destination import holders, images, locks
from qemu_blkmig.destination.programs import image_info
from qemu_blkmig.destination.protocol import Backing, Created, Image

MIB = 1 << 20


def new(place: Path, **settings: object) -> Image:
    """A raw image of 1 MiB to be created for disk `d`, but for `settings`."""
    return Image(**{"disk": "d", "path": str(place), "format": "raw", "size": MIB, "create": True} | settings)  # type: ignore[arg-type]


def faults(*wanted: Image) -> str:
    """What inspecting tells, in one string."""
    return "; ".join(problem.what for problem in images.inspect(wanted)[0])


def test_a_fit_image_has_no_faults_and_the_free_space_is_told(tmp_path: Path) -> None:
    problems, [room] = images.inspect([new(tmp_path / "a")])
    assert problems == []
    assert (room.disk, room.device) == ("d", tmp_path.stat().st_dev) and room.free > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"format": "luks"}, "'luks' cannot be written"),
        ({"format": "file"}, "'file' cannot be written"),
        ({"size": 0}, "not a positive multiple of 512"),
        ({"size": 1000}, "not a positive multiple of 512"),
        ({"size": 1 << 63}, "not a positive multiple of 512"),
        ({"path": "relative"}, "not an absolute path"),
        ({"path": "/nowhere/a"}, "/nowhere/a cannot be made: there is no directory /nowhere"),
        ({"path": "/dev/null/a"}, "/dev/null is not a directory"),
        ({"path": "/nowhere/a", "create": False}, "No such file"),
        ({"create": False, "path": "/dev/null"}, "neither a file nor a block device"),
        ({"backing": Backing("base", "raw")}, "cannot have a backing file"),
        ({"format": "qcow2", "backing": Backing("base", "raw")}, "backing file .*base is missing"),
    ],
    ids=str,
)
def test_a_fault_is_named(tmp_path: Path, settings: dict[str, object], fault: str) -> None:
    wanted = new(tmp_path / "a", **settings)
    with pytest.raises(errors.Refused, match=fault) as caught:
        images.prepare([wanted])
    assert caught.value.disk == "d"
    assert list(tmp_path.iterdir()) == []


def test_two_names_of_one_file_cannot_take_two_disks(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(MIB))
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    told = faults(new(tmp_path / "a", disk="vda"), new(tmp_path / "b", disk="vdb"))
    assert told == f"{tmp_path}/b is the destination of disk vda too"


def test_faults_of_all_images_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    told = faults(new(tmp_path / "there"), new(tmp_path / "b", format="luks"), new(tmp_path / "c"), new(tmp_path / "c"))
    assert "there holds 0 bytes" in told
    assert "luks" in told
    assert "is the destination of disk d too" in told


def test_an_existing_image_must_have_the_size_and_format(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(MIB + 512))
    assert "holds 1049088 bytes, the disk has 1048576" in faults(new(tmp_path / "raw", create=False))
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", tmp_path / "other", "1M"], check=True)
    assert "an image of format qcow2, and raw is wanted" in faults(new(tmp_path / "other", create=False))
    assert "qcow2" in faults(new(tmp_path / "raw", create=False, format="qcow2"))


@pytest.mark.parametrize("image_format", sorted(images.WRITABLE_FORMATS - {"vpc", "parallels"}))
def test_every_format_is_made_with_the_size_and_belongs_to_us_alone(tmp_path: Path, image_format: str) -> None:
    [prepared] = images.prepare([new(tmp_path / "a", format=image_format)])
    assert images.size_of(str(tmp_path / "a"), image_format) == MIB
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert prepared.reads_as_zero
    assert "another migration" in faults(new(tmp_path / "a", format=image_format, create=False))
    images.give_up(prepared)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_taken_as_it_is_and_not_as_zero(tmp_path: Path) -> None:
    data = os.urandom(MIB)
    (tmp_path / "a").write_bytes(data)
    [prepared] = images.prepare([new(tmp_path / "a")])
    assert prepared.created is None
    assert not prepared.reads_as_zero
    images.give_up(prepared)
    assert (tmp_path / "a").read_bytes() == data


def test_what_is_there_must_stand_upon_the_wanted_backing_file(tmp_path: Path) -> None:
    for name in ("base", "other"):
        (tmp_path / name).write_bytes(bytes(MIB))
    command = ["qemu-img", "create", "-qf", "qcow2", "-b", "base", "-F", "raw", str(tmp_path / "a")]
    subprocess.run(command, check=True)
    assert faults(new(tmp_path / "a", format="qcow2", backing=Backing("base", "raw"))) == ""
    assert "not upon the backing file other" in faults(
        new(tmp_path / "a", format="qcow2", backing=Backing("other", "raw"))
    )


def test_all_or_none_are_prepared(tmp_path: Path) -> None:
    bad = new(tmp_path / "b", format="qcow2", cluster_size=12345)
    with pytest.raises(errors.Refused, match=r"(?i)cluster size"):
        images.prepare([new(tmp_path / "a"), bad])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", ["write -P 1 64k 64k", "write -z 64k 64k"])
def test_an_overlay_that_is_there_must_hold_nothing_of_its_own(tmp_path: Path, write: str) -> None:
    (tmp_path / "base").write_bytes(b"x" * MIB)
    wanted = new(tmp_path / "a", format="qcow2", backing=Backing("base", "raw"))
    command = ["qemu-img", "create", "-qf", "qcow2", "-b", "base", "-F", "raw", str(tmp_path / "a")]
    subprocess.run(command, check=True)
    assert faults(wanted) == ""
    subprocess.run(["qemu-io", "-c", write, tmp_path / "a"], check=True, stdout=subprocess.DEVNULL)
    assert "holds data of its own" in faults(wanted)
    assert faults(msgspec.structs.replace(wanted, compared=True)) == ""


@pytest.mark.parametrize("known_zero", [False, True])
def test_an_image_upon_a_backing_file_does_not_read_as_zero(tmp_path: Path, known_zero: bool) -> None:
    (tmp_path / "base").write_bytes(bytes(MIB))
    backing = Backing("base", "raw")
    [prepared] = images.prepare([new(tmp_path / "a", format="qcow2", backing=backing, known_zero=known_zero)])
    assert not prepared.reads_as_zero
    images.give_up(prepared)


def test_only_the_very_file_that_was_made_is_discarded(tmp_path: Path) -> None:
    [mine, replaced, busy] = images.prepare([new(tmp_path / name, disk=name) for name in ("mine", "other", "busy")])
    made = [each.created for each in (mine, replaced, busy) if each.created is not None]
    for each in (mine, replaced, busy):
        os.close(each.descriptor)
    (tmp_path / "other").rename(tmp_path / "elsewhere")
    (tmp_path / "other").touch()
    writer = os.open(tmp_path / "busy", os.O_RDWR)
    assert locks.lock_as_writer(writer)
    removed, left = images.discard([*made, Created(str(tmp_path / "gone"), 1, 1)])
    os.close(writer)
    assert removed == [str(tmp_path / "mine")]
    assert len(left) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["busy", "elsewhere", "other"]


def test_an_image_that_an_agent_is_about_to_let_go_of_is_removed_and_one_that_it_keeps_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine"
    path.touch()
    status = path.stat()
    made = [Created(str(path), status.st_dev, status.st_ino)]
    monkeypatch.setattr(images, "_LAST_LOOK", 0.1)
    agents = os.open(path, os.O_RDWR)
    assert locks.lock_job(agents)
    assert images.discard(made) == ([], [f"{path}: is being written by an agent, process {os.getpid()}"])
    monkeypatch.setattr(images, "_LAST_LOOK", 60.0)
    threading.Timer(0.3, os.close, (agents,)).start()
    assert images.discard(made) == ([str(path)], [])


@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")
def test_a_block_device_behind_a_symlink_is_fit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    made = subprocess.run(
        ["losetup", "--show", "-f", str(tmp_path / "file")], capture_output=True, text=True, check=True
    )
    device = made.stdout.strip()
    try:
        (tmp_path / "link").symlink_to(device)
        [prepared] = images.prepare([new(tmp_path / "link", create=False)])
        assert not prepared.reads_as_zero
        assert images.allocated(prepared.descriptor) == MIB
        identity = prepared.identity
        images.give_up(prepared)
        [again] = images.prepare([new(tmp_path / "link", create=False, identity=identity)])
        images.give_up(again)
        # After a boot the link leads to another node of it.
        os.mknod(tmp_path / "node", 0o600 | stat.S_IFBLK, Path(device).stat().st_rdev)
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to("node")
        [again] = images.prepare([new(tmp_path / "link", create=False, identity=identity)])
        images.give_up(again)
        # A record of before devices had anything to be known by.
        [again] = images.prepare(
            [new(tmp_path / "link", create=False, identity=structs.replace(identity, known_as=""))]
        )
        images.give_up(again)
        other = structs.replace(identity, known_as="loop inode 1 0")
        assert "not the block device (loop inode 1 0) that was being" in faults(new(tmp_path / "link", identity=other))
        (tmp_path / "link").unlink()
        assert "was replaced, or removed" in faults(new(tmp_path / "link", identity=identity))
        (tmp_path / "link").write_bytes(bytes(MIB))
        assert "was replaced, or removed" in faults(new(tmp_path / "link", identity=identity))
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_an_agent_of_the_job_itself_that_hangs_on_an_image_is_named(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "image"
    program = (
        "import sys, time; from qemu_blkmig.destination import images, protocol\n"
        f"image = protocol.Image('d', {str(path)!r}, {image_format!r}, {MIB}, create=True)\n"
        "kept = images.prepare([image], 'cafe')\n"
        "print(kept[0].identity.device, kept[0].identity.inode, flush=True); time.sleep(1000)"
    )
    hangs = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert hangs.stdout is not None
        device, inode = map(int, hangs.stdout.readline().split())
        again = new(path, format=image_format, identity=Created(str(path), device, inode))
        hangs.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, hangs.pid, os.WSTOPPED | os.WNOWAIT)
        who = f"process {hangs.pid} (stopped by a signal) on {socket.gethostname()}"
        [problem] = images.inspect([again], "cafe")[0]
        assert f"an agent of this very job that was lost and hangs, {who}" in problem.what
        assert f"kill -KILL {hangs.pid}" in problem.what
        [problem] = images.inspect([new(path, format=image_format, create=False)], "beef")[0]
        another = f"is the destination of another migration (job cafe, process {hangs.pid} (stopped by a signal))"
        assert problem.what.endswith(another)
    finally:
        hangs.kill()
        hangs.communicate()


def test_whoever_looks_for_the_holder_of_an_image_does_not_touch_what_else_is_open_and_may_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[str] = []
    look = Path.stat

    def stat_of(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if "/fd/" in str(path):
            touched.append(str(path.readlink()))
        return look(path, follow_symlinks=follow_symlinks)

    with (tmp_path / "another").open("wb"):
        [prepared] = images.prepare([new(tmp_path / "image")])
        monkeypatch.setattr(Path, "stat", stat_of)
        assert holders.claimant(str(tmp_path / "image")) == (os.getpid(), False)
        monkeypatch.undo()
        images.give_up(prepared)
    # Other jobs' agents may hold images on this machine, too.
    assert [each for each in touched if Path(each).is_relative_to(tmp_path)] == [str(tmp_path / "image")]


def test_an_image_behind_a_symlink_is_taken_up_again_as_long_as_that_leads_to_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    (tmp_path / "other").write_bytes(bytes(MIB))
    (tmp_path / "link").symlink_to("file")
    [prepared] = images.prepare([new(tmp_path / "link", create=False)])
    identity = prepared.identity
    images.give_up(prepared)
    [again] = images.prepare([new(tmp_path / "link", create=False, identity=identity)])
    images.give_up(again)
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("other")
    assert "was replaced, or removed" in faults(new(tmp_path / "link", identity=identity))


def test_programs_that_an_image_needs_are_missed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    problems, _ = images.inspect([new(tmp_path / "a", format="qcow2"), new(tmp_path / "b", format="qcow2", disk="e")])
    assert [problem.disk for problem in problems] == [None, None, None]
    assert "program setpriv is not in PATH" in "; ".join(problem.what for problem in problems)
    assert faults(new(tmp_path / "a")) == ""


@pytest.mark.parametrize("create", [True, False], ids=["new", "existing"])
def test_the_descriptor_of_an_image_that_cannot_be_locked_is_closed_just_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create: bool
) -> None:
    path = tmp_path / "disk"
    if not create:
        path.write_bytes(bytes(MIB))
    closed: list[int] = []
    opened: list[int] = []
    close = os.close

    def note(descriptor: int) -> None:
        closed.append(descriptor)
        close(descriptor)

    def refuse(descriptor: int) -> bool:
        opened.append(descriptor)
        monkeypatch.setattr(os, "close", note)
        return False

    monkeypatch.setattr("qemu_blkmig.destination.locks.lock_as_writer", refuse)
    with pytest.raises(errors.Refused, match="open for writing"):
        images.prepare([new(path, create=create)])
    assert closed.count(opened[0]) == 1
    assert path.exists() != create


@pytest.mark.parametrize(
    ("image_format", "how", "allocated"),
    [
        ("raw", "off", False),
        ("raw", "falloc", True),
        ("raw", "full", True),
        ("qcow2", "metadata", False),
        ("qcow2", "falloc", True),
        ("qcow2", "full", True),
    ],
)
def test_an_image_is_preallocated_as_asked_and_reads_as_zero(
    tmp_path: Path, image_format: str, how: str, allocated: bool
) -> None:
    [prepared] = images.prepare([new(tmp_path / "a", format=image_format, preallocation=how)])
    assert (images.allocated(prepared.descriptor) >= MIB) == allocated
    assert prepared.reads_as_zero
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", tmp_path / "zero", str(MIB)], check=True)
    compared = [
        "qemu-img",
        "compare",
        "-U",
        "-f",
        image_format,
        "-F",
        "raw",
        str(tmp_path / "a"),
        str(tmp_path / "zero"),
    ]
    assert subprocess.run(compared, stdout=subprocess.DEVNULL, check=False).returncode == 0
    images.give_up(prepared)


@pytest.mark.parametrize("image_format", sorted(images.WRITABLE_FORMATS))
def test_an_image_is_made_in_the_format_of_one_whose_clusters_are_known(tmp_path: Path, image_format: str) -> None:
    """qemu-img tells their size of most formats, and takes it of few."""
    theirs = tmp_path / "theirs"
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, theirs, str(8 * MIB)], check=True)
    asked = ["qemu-img", "info", "--output=json", "-f", image_format, str(theirs)]
    told = json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)
    wanted = new(tmp_path / "a", format=image_format, size=told["virtual-size"], cluster_size=told.get("cluster-size"))
    [prepared] = images.prepare([wanted])
    images.give_up(prepared)


def test_a_preallocation_that_a_format_does_not_know_is_told(tmp_path: Path) -> None:
    assert "format raw knows no preallocation 'metadata'" in faults(new(tmp_path / "a", preallocation="metadata"))
    assert "format vdi knows no preallocation 'full'" in faults(new(tmp_path / "a", format="vdi", preallocation="full"))
    overlay = new(tmp_path / "a", format="qcow2", backing=Backing("base", "raw"), preallocation="full")
    assert "never preallocated" in faults(overlay)


@pytest.mark.parametrize("look", [lambda image: image_info(image.path, "qcow2"), images._mend])
def test_of_an_image_whose_name_is_not_utf_8_it_is_told_that_it_is_damaged(
    look: Callable[[Image], object], tmp_path: Path
) -> None:
    path = tmp_path / os.fsdecode(b"a\xff")
    path.write_text("no image")
    with pytest.raises(errors.Refused, match=r"a\\xff'.*: Image is not in qcow2 format"):
        look(new(path, format="qcow2", create=False))
