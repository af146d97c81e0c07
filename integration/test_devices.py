"""Block devices at both ends, with sectors of 512 and of 4096 bytes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from integration.devices import loop_device
from integration.lab import Disk, Hardware, Lab, assert_records_sound
from integration.luck import Attempt, command
from integration.tool import migrate
from qemu_blkmig.demo.guest import Orders

MIB = 1 << 20


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_guest_moves_from_one_block_device_to_another(lab: Lab, tmp_path: Path, sector: int) -> None:
    size = 16 * MIB
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(loop_device(tmp_path / "here", size, sector))
        larger = stack.enter_context(loop_device(tmp_path / "larger", size + MIB, sector))
        there = stack.enter_context(loop_device(tmp_path / "there", size, sector))
        stack.callback(lab.close)
        there.write_bytes(b"what was there before" * 100_000)
        guest = lab.boot([Disk(here, "raw", size)], Orders(rate=100), Hardware(style="drive"))
        guest.wait_for_writing(more=20)
        (lab.target / here.name).symlink_to(larger)
        outcome, _ = migrate(lab, guest)
        outcome.failed(3, f"holds {size + MIB} bytes, the disk has {size}", now="the guest runs at the source")
        lab.guests.pop()
        (lab.target / here.name).unlink()
        (lab.target / here.name).symlink_to(there)
        outcome, arrived = migrate(lab, guest, "--verify", "full", "--on-stall", "pause")
        outcome.succeeded()
        arrived.pause()
        assert_records_sound(arrived.disks[0], arrived.acked())
        told = {}
        for place in lab.state.rglob("*.blkmig"):
            record = json.loads(place.read_text())
            told[Path(record["image"]).resolve()] = record["state"]
        assert told == {here: "moved", there: "complete"}
        arrived.quit()


@pytest.mark.parametrize("known", [True, False])
def test_a_job_is_not_gone_on_with_on_another_device_of_the_same_name(lab: Lab, tmp_path: Path, known: bool) -> None:
    """`known`: the device has something that it is known by; else what lies there tells."""
    size = 16 * MIB
    with contextlib.ExitStack() as stack:
        there = stack.enter_context(loop_device(tmp_path / "there", size, 512))
        other = stack.enter_context(loop_device(tmp_path / "other", size, 512))
        stack.callback(lab.close)
        content = os.urandom(size)
        other.write_bytes(content)
        guest = lab.boot([lab.disk("disk", size, data=[(0, size)])], Orders(rate=50, span=MIB), Hardware(style="drive"))
        guest.wait_for_writing()
        link = lab.target / "disk"
        link.symlink_to(there)
        attempt = Attempt(lab, guest, "--bandwidth", "4M")
        attempt.wait_event(lambda event: event.get("percent", 0) >= 40, "40 %")
        attempt.signal(signal.SIGHUP)
        attempt.outcome()
        link.unlink()
        link.symlink_to(other)
        if not known:
            record = lab.state / attempt.job() / "record.json"
            told = json.loads(record.read_text())
            for identity in told["identities"]:
                assert identity.pop("known_as")
            record.write_text(json.dumps(told))
        refused = command("resume", attempt.job())
        refused.failed(3, f"{link} is not the block device" if known else "not what was written, but another's")
        os.sync()
        assert other.read_bytes() == content
        link.unlink()
        link.symlink_to(there)
        command("resume", attempt.job(), "--bandwidth", "1000").succeeded()
        arrived = attempt.destination
        arrived.pause()
        assert_records_sound(arrived.disks[0], arrived.acked())
        arrived.quit()
