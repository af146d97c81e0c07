"""What another host may lack, or may have become, is told in words that help; no guest is needed for that."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from integration.devices import called, loop_device
from integration.far import FarLab, far_laboratory
from integration.hosts import ADDRESSES, PORT
from integration.lab import Disk, Guest, compare_images
from integration.tool import COMMAND, Outcome, finish, start
from qemu_blkmig.demo.guest import Kernel

MIB = 1 << 20


@pytest.fixture(scope="module")
def shared(kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarLab]:
    """A laboratory without guests, for all of this file; `lab` puts it in order again."""

    def none(_agent: bool) -> Path:
        raise AssertionError("there are no guests here")

    with far_laboratory(kernel, none) as lab:
        yield lab


@pytest.fixture
def lab(shared: FarLab) -> Iterator[FarLab]:
    """Two hosts, and nothing at the destination."""
    yield shared
    shared.put_in_order()


@pytest.fixture
def disk(lab: FarLab) -> Disk:
    """16 MiB, a quarter of them data."""
    path = lab.directory / "disk"
    return Disk(path, "raw", 16 * MIB) if path.exists() else lab.disk("disk", 16 * MIB, data=[(MIB, 4 * MIB)])


def copy(lab: FarLab, source: Disk | Guest, *options: object) -> Outcome:
    """Run `copy` in hosta, to hostb."""
    named = f"qmp:{source.qmp}" if isinstance(source, Guest) else f"image:{source.path}"
    return finish(start([*lab.entering, *COMMAND, "copy", named, lab.place, *map(str, options)]))


@contextlib.contextmanager
def configured(lab: FarLab, more: str) -> Iterator[None]:
    """hosta's ssh configuration has this at its end."""
    config = lab.directory / "ssh" / "ssh_config"
    before = config.read_text()
    config.write_text(before + more)
    try:
        yield
    finally:
        config.write_text(before)


def assert_nothing_there(lab: FarLab) -> None:
    """Assert that an attempt left nothing in hostb nor here."""
    lab.assert_no_leftovers()
    assert not list(lab.target.iterdir())
    assert not [path for path in lab.state.iterdir() if path.name not in ("history", "bases.json")]


def test_a_disk_is_copied_to_another_host(lab: FarLab, disk: Disk) -> None:
    copy(lab, disk, "--verify", "full").succeeded()
    compare_images(disk, replace(disk, path=lab.target / "disk"))
    lab.assert_no_leftovers()


def test_a_lun_that_both_hosts_see_is_not_copied_onto_itself(lab: FarLab, tmp_path: Path) -> None:
    with loop_device(tmp_path / "lun", 16 * MIB, 512) as device, called(lab.hosts, device, "naa.6001405abcdef0123"):
        words = ["copy", f"image:{device}", f"ssh://root@hostb:{PORT}/dev"]
        finish(start([*lab.entering, *COMMAND, *words])).failed(
            3, "the same device at both hosts (device/wwid naa.6001"
        )


@pytest.mark.parametrize("option", ["PermitOpen none", "AllowStreamLocalForwarding remote"])
def test_a_copy_reaches_no_sockets_there(lab: FarLab, disk: Disk, option: str) -> None:
    lab.hosts.start_sshd(option)
    copy(lab, disk).succeeded()
    compare_images(disk, replace(disk, path=lab.target / "disk"))


def test_spaces_and_colons_in_the_directory_are_just_that(lab: FarLab, disk: Disk) -> None:
    odd = lab.target / "a b:c"
    odd.mkdir()
    words = [*lab.entering, *COMMAND, "copy", f"image:{disk.path}", f"{lab.place}/a b:c"]
    finish(start(words)).succeeded()
    compare_images(disk, replace(disk, path=odd / "disk"))
    shutil.rmtree(odd)


def test_what_the_user_s_configuration_shares_and_runs_is_left_alone(lab: FarLab, disk: Disk) -> None:
    own = lab.directory / "own"
    more = f"ControlMaster auto\nControlPath {own}\nControlPersist 60\nRemoteCommand cat\nRequestTTY force\n"
    with configured(lab, more):
        copy(lab, disk).succeeded()
    assert not own.exists()
    compare_images(disk, replace(disk, path=lab.target / "disk"))


@pytest.mark.parametrize(
    ("way", "named"),
    [
        ("Host far\nHostName 127.0.0.1\nProxyJump root@hostb:{port}\n", "far"),
        ("Host fd77::2\n", "[fd77::2]"),
    ],
    ids=["through a jump host", "by an address of IPv6"],
)
def test_ways_to_a_host_are_ssh_s_affair(lab: FarLab, disk: Disk, way: str, named: str) -> None:
    for number, far in ((1, False), (2, True)):
        lab.hosts.run("ip", "address", "replace", f"fd77::{number}/64", "dev", "net0", "nodad", far=far)
    ssh = lab.directory / "ssh"
    known = f"HostKeyAlias [{ADDRESSES['hostb']}]:{PORT}\nUserKnownHostsFile {ssh}/known_hosts\n"
    identity = f"IdentityFile {ssh}/key\nIdentitiesOnly yes\nIdentityAgent none\n"
    with configured(lab, way.format(port=PORT) + known + identity):
        words = ["copy", f"image:{disk.path}", f"ssh://root@{named}:{PORT}{lab.target}"]
        finish(start([*lab.entering, *COMMAND, *words])).succeeded()
    compare_images(disk, replace(disk, path=lab.target / "disk"))
    lab.assert_no_leftovers()


def test_two_jobs_to_one_host_do_not_get_in_each_other_s_way(lab: FarLab, disk: Disk) -> None:
    other = lab.disk("other", 16 * MIB, data=[(2 * MIB, 4 * MIB)])
    words = [[*lab.entering, *COMMAND, "copy", f"image:{one.path}", lab.place] for one in (disk, other)]
    for process in [start(command) for command in words]:
        finish(process).succeeded()
    for one in (disk, other):
        compare_images(one, replace(one, path=lab.target / one.path.name))
    lab.assert_no_leftovers()


def test_a_host_that_is_another_than_known_is_refused(lab: FarLab, disk: Disk) -> None:
    lab.hosts.change_host_key()
    copy(lab, disk).failed(3, "hostb", "HOST IDENTIFICATION HAS CHANGED", "ssh-keygen -R", now="nothing was touched")
    assert_nothing_there(lab)


def test_a_host_that_does_not_answer_is_told(lab: FarLab, disk: Disk) -> None:
    lab.hosts.power_off()
    copy(lab, disk).failed(1, "hostb")
    lab.hosts.boot()
    assert_nothing_there(lab)


def test_an_agent_of_another_protocol_is_told_with_what_to_install(lab: FarLab, disk: Disk) -> None:
    old = "from qemu_blkmig.destination import protocol; protocol.PROTOCOL = 1; "
    old += "import qemu_blkmig; qemu_blkmig.__version__ = '0.0.9'; "
    old += "from qemu_blkmig.cli.main import main; import sys; sys.exit(main())"
    command = shlex.join([sys.executable, "-c", old])
    copy(lab, disk, "--remote-command", command).failed(3, "hostb (0.0.9) speaks 1", "install")
    assert_nothing_there(lab)


def test_a_destination_that_is_full_is_told(lab: FarLab, disk: Disk) -> None:
    lab.hosts.run("mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", lab.target, far=True)
    try:
        told = copy(lab, disk).failed(1, "disk", "No space left on device", now="is kept at the destination")
        (job,) = (path.parent.name for path in lab.state.glob("*/record.json"))
        assert f"qemu-blkmig resume {job}" in told.stderr
        finish(start([*lab.entering, *COMMAND, "cleanup", job])).succeeded()
        assert lab.hosts.run("ls", lab.target, far=True) == ""
    finally:
        lab.hosts.run("umount", lab.target, far=True)
    assert_nothing_there(lab)


def test_a_directory_that_is_not_there_is_told_with_its_host(lab: FarLab, disk: Disk) -> None:
    lab.target.rmdir()
    copy(lab, disk).failed(3, "hostb", f"there is no directory {lab.target}")
    lab.target.mkdir()
    assert_nothing_there(lab)


def test_a_server_that_lets_nobody_reach_its_own_sockets_is_enough_for_copy(lab: FarLab, disk: Disk) -> None:
    lab.hosts.start_sshd("AllowStreamLocalForwarding remote", "PermitOpen none", "PermitListen none")
    copy(lab, disk).succeeded()
    compare_images(disk, replace(disk, path=lab.target / "disk"))
    lab.assert_no_leftovers()
