"""Block devices at both ends, with sectors of 512 and of 4096 bytes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from integration.devices import loop_device
from integration.lab import Disk, Hardware, Lab, assert_records_sound
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
