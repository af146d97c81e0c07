"""The laboratory judges the migrations, so it is judged first: guests write, and every kind of damage is seen."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration.lab import (
    Disk,
    Format,
    Guest,
    Hardware,
    Lab,
    LabError,
    Machine,
    Style,
    agent_execute,
    assert_files_sound,
    assert_records_sound,
    check_records,
    compare_images,
    laboratory,
    wait_until,
)
from integration.thorough import also
from qemu_blkmig.demo.guest import Kernel, Orders, Writer, build_initramfs, find_kernel
from qemu_blkmig.demo.records import MAGIC, RecordsReport
from qemu_blkmig.errors import Refused

MIB = 1 << 20
RECORD = 4096
ZONE = MIB * 7 // 8
"""Where the zone of zeroes and discards begins on a disk of 1 MiB."""


def paused(guest: Guest, *, more: int) -> int:
    """Let the guest write `more` records and pause it; what it had acknowledged."""
    guest.wait_for_writing(more=more)
    guest.pause()
    return guest.acked()


@pytest.mark.parametrize(
    ("format", "writer"),
    [
        ("raw", "random"),
        ("qcow2", "hot"),
        *also(("qcow2", "sequential"), ("raw", "idle"), ("raw", "zipf"), ("raw", "log")),
    ],
)
def test_records_of_a_paused_guest_are_all_on_its_disk(lab: Lab, format: Format, writer: Writer) -> None:
    disk = lab.disk("a", 16 * MIB, format, data=[(0, 3 * MIB), (9 * MIB, MIB)])
    guest = lab.boot([disk], Orders(writer=writer))
    acked = paused(guest, more=10 if writer == "idle" else 1500)
    report = assert_records_sound(disk, acked)
    assert report.verified > 0
    assert 0 < report.longest_gap <= guest.longest_gap()


def test_disks_of_odd_sizes_are_written_and_checked(lab: Lab) -> None:
    sizes = [512, 1536, 65536 - 512, 65536, 65536 + 512, MIB + 65536, 3 * MIB + 5 * 512]
    disks = [lab.disk(f"size-{size}", size) for size in sizes]
    guest = lab.boot(disks, Orders(rate=100))
    paused(guest, more=300)
    for number, disk in enumerate(disks):
        assert_records_sound(disk, guest.acked(f"vd{chr(ord('a') + number)}"))


def test_a_large_sparse_disk_stays_sparse_and_is_written_up_to_its_end(lab: Lab) -> None:
    disk = lab.disk("a", 64 << 30)
    guest = lab.boot([disk], Orders(writer="sequential", span=4 * MIB))
    acked = paused(guest, more=1500)
    assert_records_sound(disk, acked)
    with disk.path.open("rb") as image:
        image.seek(-RECORD, os.SEEK_END)
        last_block = image.read()
    assert disk.path.stat().st_blocks * 512 < 16 * MIB
    assert last_block.startswith(MAGIC) or last_block == bytes(RECORD)


@pytest.mark.parametrize(("machine", "style"), [("q35", "blockdev"), ("pc", "drive")])
def test_a_guest_with_every_kind_of_drive_writes_to_all_writable_disks(
    lab: Lab, machine: Machine, style: Style
) -> None:
    virtio = lab.disk("virtio", 8 * MIB)
    threaded = lab.disk("threaded", 8 * MIB, "qcow2")
    scsi = lab.disk("scsi", 8 * MIB)
    fixed = lab.disk("fixed", MIB, data=[(0, MIB)])
    hardware = Hardware(
        machine=machine,
        style=style,
        cdrom=lab.disk("cd", MIB, data=[(0, MIB)]).path,
        empty_drive=True,
    )
    disks = [
        virtio,
        Disk(threaded.path, "qcow2", threaded.size, iothread=True),
        Disk(scsi.path, "raw", scsi.size, bus="scsi"),
        Disk(fixed.path, "raw", fixed.size, read_only=True),
    ]
    before = fixed.path.read_bytes()
    guest = lab.boot(disks, Orders(rate=200), hardware)
    paused(guest, more=200)
    for disk, name in zip(disks, ("vda", "vdb", "sda"), strict=False):
        assert_records_sound(disk, guest.acked(name))
    assert fixed.path.read_bytes() == before


def test_zeroes_and_discards_take_turns_with_records(lab: Lab) -> None:
    disk = lab.disk("a", MIB)
    guest = lab.boot([disk], Orders(writer="sequential"))
    acked = paused(guest, more=3000)
    assert_records_sound(disk, acked)
    zone = disk.path.read_bytes()[ZONE:]
    blocks = [zone[offset : offset + RECORD] for offset in range(0, len(zone), RECORD)]
    assert bytes(RECORD) in blocks
    assert any(block.startswith(MAGIC) for block in blocks)


def test_a_reset_guest_starts_a_new_epoch_whose_records_are_checked(lab: Lab) -> None:
    disk = lab.disk("a", 4 * MIB)
    guest = lab.boot([disk], Orders(rate=500))
    guest.wait_for_writing(more=200)
    guest.execute("system_reset")
    wait_until(lambda: guest.console().count("blkmig writer vda") == 2, "the second start of the writer")
    time.sleep(1)
    guest.pause()
    report = assert_records_sound(disk)
    assert 0 < report.highest < guest.acked() + 1000
    guest.resume()
    before = report.highest
    wait_until(lambda: _highest_while_paused(guest, disk) > before, "records of the new epoch")


def _highest_while_paused(guest: Guest, disk: Disk) -> int:
    guest.pause()
    report = assert_records_sound(disk)
    guest.resume()
    return report.highest


def test_the_guests_longest_gap_counts_the_time_that_it_was_paused(lab: Lab) -> None:
    guest = lab.boot([lab.disk("a", 4 * MIB)], Orders(rate=200))
    guest.wait_for_writing(more=600)
    before = guest.longest_gap()
    guest.pause()
    time.sleep(before + 1.5)
    guest.resume()
    wait_until(lambda: guest.longest_gap() >= before + 1.4, "a gap as long as the pause", 15, guest.console)


@dataclass(frozen=True)
class Written:
    """A raw disk with sound records that no guest has open, its content, and what it held some time before."""

    disk: Disk
    content: bytes
    before: bytes

    def damaged(self, offset: int, instead: bytes) -> RecordsReport:
        """What the checker says of the disk when `instead` stands at `offset`."""
        self.disk.path.write_bytes(self.content[:offset] + instead + self.content[offset + len(instead) :])
        return check_records(self.disk)

    def block(self, offset: int) -> bytes:
        return self.content[offset : offset + RECORD]

    def number(self, offset: int) -> int:
        return _number(self.block(offset))

    def newest_first(self) -> list[int]:
        """Offsets of the records outside the zone of zeroes."""
        offsets = [offset for offset in range(0, ZONE, RECORD) if self.content.startswith(MAGIC, offset)]
        return sorted(offsets, key=self.number, reverse=True)


def _number(record: bytes) -> int:
    return int.from_bytes(record[16:24], "little")


@pytest.fixture(scope="module")
def contents(kernel: Kernel, initramfs: Callable[[bool], Path]) -> tuple[bytes, bytes]:
    """What a disk of 1 MiB holds after some hundred records, and after some hundred more."""
    with laboratory(kernel, initramfs) as lab:
        disk = lab.disk("a", MIB)
        guest = lab.boot([disk], Orders(writer="hot", rate=1000))
        assert_records_sound(disk, paused(guest, more=400))
        before = disk.path.read_bytes()
        guest.resume()
        assert_records_sound(disk, paused(guest, more=800))
        return before, disk.path.read_bytes()


@pytest.fixture
def written(contents: tuple[bytes, bytes], tmp_path: Path) -> Written:
    """What a guest wrote, to be damaged."""
    before, content = contents
    disk = Disk(tmp_path / "a", "raw", MIB)
    disk.path.write_bytes(content)
    return Written(disk, content, before)


def _facts(report: RecordsReport) -> list[tuple[int, int, int | None]]:
    return [(lost.offset, lost.expected, lost.found) for lost in report.lost]


def test_an_older_record_put_back_is_a_lost_record(written: Written) -> None:
    stale = next(
        offset
        for offset in written.newest_first()[1:]
        if written.before.startswith(MAGIC, offset) and _number(written.before[offset:]) < written.number(offset)
    )
    older = written.before[stale : stale + RECORD]
    report = written.damaged(stale, older)
    assert not report.sound
    assert _facts(report) == [(stale, written.number(stale), _number(older))]


def test_a_record_that_became_zeroes_is_a_lost_record(written: Written) -> None:
    victim = written.newest_first()[3]
    report = written.damaged(victim, bytes(RECORD))
    assert not report.sound
    assert _facts(report) == [(victim, written.number(victim), None)]


@pytest.mark.parametrize("sector", [1, *also(0, 7)])
def test_a_record_with_one_sector_of_another_is_torn(written: Written, sector: int) -> None:
    victim, other = written.newest_first()[3:5]
    start = sector * 512
    report = written.damaged(victim + start, written.block(other)[start : start + 512])
    assert not report.sound
    assert report.torn == (victim,)


def test_a_record_overwritten_by_something_else_is_torn(written: Written) -> None:
    victim = written.newest_first()[3]
    assert written.damaged(victim, os.urandom(RECORD)).torn == (victim,)


def test_a_record_in_the_place_of_another_is_misplaced(written: Written) -> None:
    victim, other = written.newest_first()[3:5]
    report = written.damaged(victim, written.block(other))
    assert not report.sound
    assert report.misplaced == (victim,)


def test_damage_to_the_first_block_does_not_hide_the_rest(written: Written) -> None:
    report = written.damaged(0, os.urandom(RECORD))
    assert report.torn == (0,)
    assert report.verified > 50


def test_zeroes_that_did_not_arrive_leave_an_older_record_that_is_seen(written: Written) -> None:
    zeroed = [
        offset
        for offset in range(ZONE, MIB, RECORD)
        if written.block(offset) == bytes(RECORD) and written.before.startswith(MAGIC, offset)
    ]
    olders = {offset: written.before[offset : offset + RECORD] for offset in zeroed}
    reports = {offset: written.damaged(offset, older) for offset, older in olders.items()}
    unsound = {offset: report for offset, report in reports.items() if not report.sound}
    assert unsound, "none but discarded blocks, after which nothing is expected"
    for offset, report in unsound.items():
        assert _facts(report) == [(offset, 0, _number(olders[offset]))]


def test_a_disk_older_than_what_was_acknowledged_is_not_sound(written: Written) -> None:
    highest = check_records(written.disk).highest
    assert check_records(written.disk, highest).sound
    assert not check_records(written.disk, highest + 1).sound


def test_a_disk_without_records_is_not_sound(lab: Lab) -> None:
    assert not check_records(lab.disk("a", MIB, data=[(0, MIB)])).sound


def test_a_difference_between_images_is_seen(lab: Lab) -> None:
    first = lab.disk("a", 4 * MIB, data=[(MIB, MIB)])
    second = Disk(lab.directory / "b", "qcow2", first.size)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", first.path, second.path], check=True)
    compare_images(first, second)
    subprocess.run(["qemu-io", "-c", "write -P 7 3M 512", second.path], check=True, stdout=subprocess.DEVNULL)
    with pytest.raises(AssertionError, match="mismatch"):
        compare_images(first, second)


@pytest.mark.parametrize("kind", ["bitmap", "server", "process", "file", "throttle"])
def test_everything_that_a_tool_could_leave_behind_is_seen(lab: Lab, kind: str) -> None:
    guest = lab.boot([lab.disk("a", MIB)])
    lab.assert_no_leftovers(guest)
    if kind == "bitmap":
        guest.execute("block-dirty-bitmap-add", {"node": "disk0", "name": "blkmig-x"})
    elif kind == "server":
        guest.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(lab.directory / "nbd")}}})
    elif kind == "process":
        subprocess.run("sleep 60 & disown", shell=True, executable="/bin/bash", check=True)
    elif kind == "file":
        (lab.temporary / "blkmig-x.sock").touch()
    else:
        limits = {"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 9, "iops_rd": 0, "iops_wr": 0}
        guest.execute("block_set_io_throttle", {"id": "/machine/peripheral/dev0/virtio-backend", **limits})
    with pytest.raises(AssertionError, match="left behind"):
        lab.assert_no_leftovers(guest, within=0.5)


def test_the_launch_command_starts_the_same_guest_on_the_images_of_the_destination(lab: Lab) -> None:
    disk = lab.disk("a", 2 * MIB)
    guest = lab.boot([disk])
    destination = lab.destination(guest)
    command = guest.launch_command(lab.target)
    assert str(lab.target / "a") in command
    assert str(disk.path) not in command.split()
    assert str(guest.qmp) not in command
    subprocess.run(["qemu-img", "create", "-q", lab.target / "a", str(disk.size)], check=True)
    process = subprocess.Popen([*destination.arguments(), "-S", "-incoming", "defer"])
    wait_until(destination.running, "the destination")
    assert destination.status() == "inmigrate"
    destination.kill()
    process.wait()


@pytest.mark.parametrize(("key", "event"), [("o", "SHUTDOWN"), ("c", "GUEST_PANICKED"), *also(("b", "RESET"))])
def test_a_guest_can_be_shut_down_reset_and_crashed_from_outside(lab: Lab, key: str, event: str) -> None:
    panic = ("-device", "pvpanic-pci", "-action", "panic=pause", "-action", "shutdown=pause")
    guest = lab.boot([lab.disk("a", MIB)], hardware=Hardware(extra=panic))
    guest.wait_for_writing()
    guest.press_sysrq(key)
    guest.control.wait_event(event)


@pytest.mark.parametrize("format", ["qcow2", *also("raw")])
def test_the_agent_freezes_a_mounted_ext4_whose_files_are_then_all_on_the_disk(lab: Lab, format: Format) -> None:
    disk = lab.disk("a", 64 * MIB, format)
    guest = lab.boot([disk], Orders(agent=True, rate=100))
    guest.wait_for_writing(more=80)
    assert agent_execute(guest.agent, "guest-fsfreeze-freeze") == 1
    assert agent_execute(guest.agent, "guest-fsfreeze-status") == "frozen"
    acked = guest.acked()
    guest.pause()
    copy = Disk(lab.directory / "copy", "raw", disk.size)
    subprocess.run(["qemu-img", "convert", "-U", "-f", format, "-O", "raw", disk.path, copy.path], check=True)
    guest.resume()
    assert_files_sound(copy, acked)
    assert agent_execute(guest.agent, "guest-fsfreeze-thaw") == 1
    assert agent_execute(guest.agent, "guest-fsfreeze-status") == "thawed"
    guest.wait_for_writing(more=20)


def test_an_unfrozen_ext4_is_not_taken_for_a_clean_one(lab: Lab) -> None:
    disk = lab.disk("a", 64 * MIB)
    guest = lab.boot([disk], Orders(agent=True))
    guest.wait_for_writing(more=20)
    guest.pause()
    with pytest.raises(AssertionError, match="not frozen"):
        assert_files_sound(disk, 0)


def test_a_guest_without_a_running_agent_is_told_by_a_time_out(lab: Lab) -> None:
    disk = lab.disk("a", 64 * MIB)
    guest = lab.boot([disk], Orders(agent=True))
    guest.pause()
    with pytest.raises(LabError, match="does not answer"):
        agent_execute(guest.agent, "guest-ping", timeout=1)


def test_what_the_host_lacks_is_named_with_its_package(tmp_path: Path) -> None:
    with pytest.raises(Refused) as no_kernel:
        find_kernel(tmp_path, tmp_path)
    assert "linux-image-cloud-amd64" in str(no_kernel.value.advice)
    for name in ("modules.dep", "modules.builtin"):
        (tmp_path / name).touch()
    with pytest.raises(Refused, match="virtio_pci"):
        build_initramfs(tmp_path / "out", Kernel(tmp_path / "vmlinuz", "1", tmp_path))


def test_monitor_events_are_kept_for_those_who_wait(lab: Lab) -> None:
    guest = lab.boot([lab.disk("a", MIB)])
    guest.pause()
    assert json.dumps(guest.control.wait_event("STOP"))
