"""What the plan refuses, with real QEMUs: files that are not what they seem to be."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import AsyncMock

import pytest

from qemu_blkmig.destination import devices, files, ownership
from qemu_blkmig.destination.files import boot_id
from qemu_blkmig.destination.protocol import Files, FilesReply, Inspect, InspectReply, Room
from qemu_blkmig.job import plan as plan_module
from qemu_blkmig.job.options import Selection
from qemu_blkmig.job.plan import Placed, Plan, Planner
from qemu_blkmig.qmp.disks import Disk, Layer
from qemu_blkmig.transport.client import AgentClient
from qemu_blkmig.transport.local import LocalHost
from tests.qmp.conftest import MakeImage, Qemu, StartQemu

BACKING_FORMAT = bytes.fromhex("e2792aca")
UNKNOWN = bytes.fromhex("12345678")


async def plan(
    qemu: Qemu, directory: Path, *, shared_base: bool = False, with_ram: bool = False, ignore_ownership: bool = False
) -> Plan:
    directory.mkdir(exist_ok=True)
    agent = await LocalHost().start_agent()
    try:
        selection = Selection(shared_base=shared_base, ignore_ownership=ignore_ownership)
        planner = Planner(agent, selection, directory)
        return await planner.plan(qemu.monitor, None, "blkmig-test", with_ram=with_ram)
    finally:
        await agent.close()


@pytest.mark.parametrize("way", ["itself", "hard link", "symbolic link"])
async def test_the_source_s_own_file_is_no_destination(
    start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path, way: str
) -> None:
    image = make_image("disk.img", format="raw")
    blockdev = f"driver=raw,node-name=d,file.driver=file,file.filename={image},file.locking=off"
    qemu = await start_qemu("-blockdev", blockdev, "-device", "virtio-blk,drive=d,id=d")
    directory = tmp_path if way == "itself" else tmp_path / "target"
    directory.mkdir(exist_ok=True)
    if way == "hard link":
        os.link(image, directory / image.name)
    elif way == "symbolic link":
        (directory / image.name).symlink_to(image)
    [problem] = (await plan(qemu, directory)).problems
    assert "is a file of the source itself" in problem
    assert (await plan(qemu, tmp_path / "elsewhere")).problems == ()


async def test_the_base_of_the_source_is_no_destination(
    start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path
) -> None:
    (tmp_path / "above").mkdir()
    overlay = make_image("above/disk", backing=make_image("disk"))
    drive = f"if=none,id=d,format=qcow2,file={overlay}"
    qemu = await start_qemu("-drive", drive, "-device", "virtio-blk,drive=d,share-rw=on")
    assert any("is a file of the source itself" in problem for problem in (await plan(qemu, tmp_path)).problems)


@dataclass(frozen=True)
class Attached:
    """The agent of a host that a device is attached to, under these names."""

    names: list[str]
    boot: str = "another"

    @property
    def there(self) -> SimpleNamespace:
        """See `AgentClient`."""
        return SimpleNamespace(boot_id=self.boot)

    async def expect(self, op: Files | Inspect, _: type) -> FilesReply | InspectReply:
        """See `AgentClient`."""
        if isinstance(op, Inspect):
            return InspectReply([], [], [], [])
        return FilesReply([("device", 8, 0) for _ in op.names], op.names, [self.names for _ in op.names])


@pytest.mark.parametrize(
    ("names", "certain", "told"),
    [
        (["device/wwid naa.6001405a"], True, "is the same device at both hosts (device/wwid naa.6001405a)"),
        (["serial 1"], False, "is the same device at both hosts (serial 1)"),
        (["inode 13 on nfs4"], True, None),
        (["inode 12 on nfs4"], False, "is the same file at both hosts (inode 12 on nfs4)"),
        (["device/wwid naa.6001405b"], True, None),
        ([], True, None),
    ],
)
async def test_what_both_hosts_see_is_not_copied_onto_itself(
    monkeypatch: pytest.MonkeyPatch, names: list[str], certain: bool, told: str | None
) -> None:
    here = {"/dev/disk": ("device", 7, 0), "/nfs/base": ("file", 40, 12), "/local": ("file", 41, 13)}
    monkeypatch.setattr(plan_module, "file_id", here.get)
    monkeypatch.setattr(devices, "names", {7: ["device/wwid naa.6001405a", "serial 1"]}.get)
    monkeypatch.setattr(files, "shared_file_systems", lambda: {40: "nfs4"})
    layers = tuple(Layer(path, "raw", path, filter=False) for path in here)
    disk = Disk("vdb", "", "", "d", "raw", 1 << 20, "/dev/disk", None, layers, None, False, None)
    for boot in ("another", boot_id()):
        planner = Planner(cast("AgentClient", Attached(names, boot)), Selection(), Path("/"))
        problems = (await planner.plan_image(disk, Placed("vdb", "/dev/mapper/x"))).problems
        assert len(problems) == (told is not None)
        assert all(each.startswith(f"disk vdb: /dev/mapper/x {told}") for each in problems)
        assert all("--migrate-disks" in each and ("if these are two" in each) != certain for each in problems)


async def test_two_disks_that_are_one_file_are_refused(
    start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path
) -> None:
    image = make_image("disk.img", format="raw")
    arguments = []
    for name in "xy":
        arguments += ["-drive", f"if=none,id={name},format=raw,file={image}"]
        arguments += ["-device", f"virtio-blk,drive={name},share-rw=on"]
    [problem] = (await plan(await start_qemu(*arguments), tmp_path / "target")).problems
    assert "disk y is the same file as disk x" in problem


async def test_the_format_of_a_base_is_known_where_the_overlay_does_not_tell_it(
    start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path
) -> None:
    overlay = make_image("overlay", backing=make_image("base"))
    overlay.write_bytes(overlay.read_bytes().replace(BACKING_FORMAT, UNKNOWN))
    drive = f"if=none,id=d,format=qcow2,file={overlay}"
    qemu = await start_qemu("-drive", drive, "-device", "virtio-blk,drive=d")
    planned = await plan(qemu, tmp_path / "target", shared_base=True)
    assert planned.problems == ()
    backing = planned.images["d"].backing
    assert backing is not None and backing.format == "qcow2"


async def test_a_disk_that_libvirt_knows_nothing_of_is_not_left_behind_unless_it_is_firmware_or_that_is_wanted(
    start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path
) -> None:
    arguments = ["-drive", f"if=pflash,format=raw,file={make_image('f.img', '4M', 'raw')}"]
    for name in "xyz":
        arguments += ["-drive", f"if=none,id={name},format=raw,file={make_image(name, format='raw')}"]
        arguments += ["-device", f"virtio-blk,drive={name},id=dev{name}"]
    qemu = await start_qemu(*arguments)
    agent = await LocalHost().start_agent()
    try:
        for known in ({"devx", "devy"}, None):
            placed = {"devx": Placed("vda", str(tmp_path / "there" / "x"))}
            planner = Planner(agent, Selection(), tmp_path, placed=placed, known=known)
            problems = (await planner.plan(qemu.monitor, None, "blkmig-test", with_ram=False)).problems
            told = [problem for problem in problems if "none that libvirt knows of" in problem]
            assert len(told) == (known is not None)
            assert all(each.startswith(f"disk z ({tmp_path}/z)") and "--unsafe" in each for each in told)
    finally:
        await agent.close()


async def test_room_is_looked_for_on_each_file_system_for_the_disks_that_go_there(
    start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path
) -> None:
    arguments = []
    for name in ("one", "two"):
        path = make_image(name, "4M", "raw")
        path.write_bytes(os.urandom(4 << 20))
        arguments += ["-drive", f"if=none,id={name},format=raw,file={path}"]
        arguments += ["-device", f"virtio-blk,drive={name},id=dev{name}"]
    placed = {f"dev{name}": Placed(name, f"/{name}/image") for name in ("one", "two")}
    agent = AsyncMock()
    agent.there = SimpleNamespace(boot_id="another")
    agent.expect.side_effect = lambda op, _: (
        InspectReply([], [Room("one", 1, 5 << 20), Room("two", 2, 3 << 20)])
        if isinstance(op, Inspect)
        else FilesReply([None for _ in op.names], op.names, [[] for _ in op.names])
    )
    planner = Planner(agent, Selection(), None, placed=placed)
    qemu = await start_qemu(*arguments)
    warnings = (await planner.plan(qemu.monitor, None, "blkmig-test", with_ram=False)).warnings
    assert [each for each in warnings if "free" in each] == [
        "/two has 3.0 MiB free, the disks that go there occupy 4.0 MiB"
    ]


async def test_why_a_domain_s_disk_cannot_be_copied_is_told(
    start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    arguments = []
    for name in ("full", "empty"):
        path = tmp_path / "empty" if name == "empty" else make_image(name, format="raw")
        arguments += ["-drive", f"if=none,id={name},format=raw,file={path}"]
        arguments += ["-device", f"virtio-blk,drive={name},id=dev{name}"]
    qemu = await start_qemu(*arguments)
    for ids, told in (
        ({"devfull": "vda", "devempty": "vdb"}, "disk vdb: it cannot be copied: its size is 0"),
        ({"devfull": "vda", "devgone": "vdb"}, "disk vdb: the source QEMU has no such disk that could be read"),
        ({}, "none of the domain's disks is to be copied: virsh migrate moves such a one"),
    ):
        placed = {device: Placed(target, str(tmp_path / target)) for device, target in ids.items()}
        planner = Planner(None, Selection(), None, placed=placed)
        assert told in (await planner.plan(qemu.monitor, None, "blkmig-test", with_ram=False)).problems


@pytest.mark.parametrize("instead", ["other", "null"])
async def test_a_base_is_not_shared_that_the_source_does_not_use(
    start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path, instead: str
) -> None:
    overlay, other = make_image("overlay", backing=make_image("base")), make_image("other")
    backing = "null" if instead == "null" else f'{{"driver":"qcow2","file":{{"driver":"file","filename":"{other}"}}}}'
    file = f'{{"driver":"file","filename":"{overlay}"}}'
    blockdev = f'{{"driver":"qcow2","node-name":"d","file":{file},"backing":{backing}}}'
    qemu = await start_qemu("-blockdev", blockdev, "-device", "virtio-blk,drive=d")
    [problem] = (await plan(qemu, tmp_path / "target", shared_base=True)).problems
    assert "that base cannot be shared" in problem


async def test_a_base_named_by_a_relative_path_is_shared(
    start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path
) -> None:
    base, overlay = make_image("base"), make_image("overlay", backing=Path("base"))
    (tmp_path / "target").mkdir()
    shutil.copy(base, tmp_path / "target")
    drive = f"if=none,id=d,format=qcow2,file={overlay}"
    qemu = await start_qemu("-drive", drive, "-device", "virtio-blk,drive=d")
    assert (await plan(qemu, tmp_path / "target", shared_base=True)).problems == ()


async def test_what_qemu_will_not_migrate_is_told_before(start_qemu: StartQemu, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    drive = f"if=none,id=d,format=raw,file={image}"
    qemu = await start_qemu("-drive", drive, "-device", "nvme,drive=d,serial=1")
    [problem] = (await plan(qemu, tmp_path / "target", with_ram=True)).problems
    assert "QEMU cannot migrate this guest" in problem and "nvme" in problem
    assert (await plan(qemu, tmp_path / "target")).problems == ()


@pytest.mark.parametrize("state", ["incoming", "moved"])
async def test_an_image_that_its_record_forbids_is_not_migrated_unless_told_to(
    start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path, state: str
) -> None:
    image = make_image("disk.img", format="raw")
    if state == "incoming":
        ownership.announce(str(image), "1a2b", "vda", "hosta:/old/disk.img")
    else:
        ownership.move(str(image), "1a2b", "vda", "hostb:/new/disk.img")
    qemu = await start_qemu("-drive", f"if=none,id=d,format=raw,file={image}", "-device", "virtio-blk,drive=d")
    [problem] = (await plan(qemu, tmp_path / "target")).problems
    assert "job 1a2b" in problem and ":/" in problem and "--ignore-ownership" in problem
    assert (await plan(qemu, tmp_path / "target", ignore_ownership=True)).problems == ()


async def test_the_base_of_an_overlay_may_have_moved_but_not_be_incomplete(
    start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path
) -> None:
    base = make_image("base")
    overlay = make_image("overlay", backing=base)
    drive = f"if=none,id=d,format=qcow2,file={overlay}"
    qemu = await start_qemu("-drive", drive, "-device", "virtio-blk,drive=d")
    ownership.move(str(base), "1a2b", "vda", "hostb:/new/base")
    assert (await plan(qemu, tmp_path / "target")).problems == ()
    ownership.announce(str(base), "1a2b", "vda", "hosta:/old/base")
    [problem] = (await plan(qemu, tmp_path / "target")).problems
    assert f"{base} is incomplete" in problem


async def test_a_capability_that_ram_cannot_be_migrated_with_is_told_before(
    start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path
) -> None:
    drive = f"if=none,id=d,format=qcow2,file={make_image('disk')}"
    qemu = await start_qemu("-drive", drive, "-device", "virtio-blk,drive=d")
    switches = [{"capability": name, "state": True} for name in ("multifd", "auto-converge")]
    await qemu.user.execute("migrate-set-capabilities", {"capabilities": switches})
    [problem] = (await plan(qemu, tmp_path / "target", with_ram=True)).problems
    assert "source QEMU: the migration capability multifd is set: it needs several connections" in problem
    assert (await plan(qemu, tmp_path / "target")).problems == ()


async def test_internal_snapshots_are_not_lost_silently_and_a_data_file_is_told(
    start_qemu: StartQemu, tmp_path: Path
) -> None:
    image, raw = tmp_path / "disk", tmp_path / "data.raw"
    make_images(image, tmp_path / "other", raw)
    arguments = []
    for name in ("disk", "other"):
        arguments += ["-drive", f"if=none,id={name},format=qcow2,file={tmp_path / name}"]
        arguments += ["-device", f"virtio-blk,drive={name}"]
    planned = await plan(await start_qemu(*arguments), tmp_path / "target")
    [problem] = planned.problems
    assert "disk disk: the internal snapshots of its image (before-the-upgrade) would be lost" in problem
    assert any(str(raw) in warning and "disk other" in warning for warning in planned.warnings)


@pytest.mark.parametrize("named", [True, False])
async def test_a_data_file_that_only_the_image_names_is_none_of_the_source_s(
    start_qemu: StartQemu, tmp_path: Path, named: bool
) -> None:
    image, raw = tmp_path / "other", tmp_path / "data.raw"
    make_images(tmp_path / "disk", image, raw)
    blockdev = f"driver=qcow2,node-name=d,file.driver=file,file.filename={image}"
    if not named:
        shutil.copyfile(raw, tmp_path / "own.raw")
        blockdev += f",data-file.driver=file,data-file.filename={tmp_path / 'own.raw'}"
    qemu = await start_qemu("-blockdev", blockdev, "-device", "virtio-blk,drive=d,id=d")
    [found] = (await plan(qemu, tmp_path / "target")).source_images("hostb")
    assert found.data_file == (str(raw) if named else None)


def make_images(with_snapshot: Path, with_data_file: Path, data: Path) -> None:
    options = f"data_file={data},data_file_raw=on"
    for command in (
        ["create", "-q", "-f", "qcow2", with_snapshot, "8M"],
        ["snapshot", "-c", "before-the-upgrade", with_snapshot],
        ["create", "-q", "-f", "qcow2", "-o", options, with_data_file, "8M"],
    ):
        subprocess.run(["qemu-img", *map(str, command)], check=True)


async def test_an_incomplete_image_of_another_job_is_told_of_before_it_is_overwritten(
    start_qemu: StartQemu, make_image: MakeImage, tmp_path: Path
) -> None:
    drive = f"if=none,id=d,format=qcow2,file={make_image('disk')}"
    qemu = await start_qemu("-drive", drive, "-device", "virtio-blk,drive=d")
    (tmp_path / "target").mkdir()
    there = make_image("target/disk")
    ownership.announce(str(there), "1a2b", "d", "hosta:/old/disk")
    planned = await plan(qemu, tmp_path / "target")
    assert planned.problems == ()
    assert any("job 1a2b was filling it" in warning for warning in planned.warnings)
