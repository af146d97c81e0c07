"""The frame of what is sent: parts, their ends, percentages, and chunks planned whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qemu_blkmig.nbd.control import Control
from qemu_blkmig.stream.channel import open_target
from qemu_blkmig.stream.events import CHUNK, Block, Configuration, EndOfPart, Event, Kind, Percent, Section, SectionOver
from qemu_blkmig.stream.sender import StreamSender
from tests.stream.streams import decode, disks

DATA = memoryview(os.urandom(CHUNK))


def sent(path: Path, *, machine: str | None = "pc", footers: bool = True, zero_blocks: bool = True) -> list[Event]:
    """The events of a stream with a bulk part, a round and a completion."""
    control = Control()
    channel = open_target(f"file:{path}")
    sender = StreamSender(channel, machine=machine, footers=footers, zero_blocks=zero_blocks, total=4 * CHUNK)
    sender.begin(control)
    sender.chunks(b"d", [(0, DATA)], control)
    sender.advance(2 * CHUNK, control)
    sender.chunks(b"d", [(CHUNK, None), (2 * CHUNK, None)], control)
    sender.end_part(control)
    sender.end_part(control)
    sender.chunks(b"d", [(3 * CHUNK, DATA[:512])], control)
    sender.end_part(control)
    sender.begin_completion()
    sender.chunks(b"d", [(CHUNK, DATA)], control)
    sender.end_part(control)
    sender.chunks(b"d", [(0, None)], control)
    sender.end_part(control)
    sender.finish(control)
    channel.finish()
    control.close()
    return decode(path.read_bytes())


def test_each_round_is_a_part_with_one_end_and_completion_is_the_sections_end(tmp_path: Path) -> None:
    told: list[tuple[Kind, int, int]] = []
    for event in sent(tmp_path / "s"):
        if isinstance(event, Section):
            told.append((event.kind, 0, 0))
        elif isinstance(event, Block):
            told[-1] = (told[-1][0], told[-1][1] + 1, told[-1][2])
        elif isinstance(event, EndOfPart):
            told[-1] = (told[-1][0], told[-1][1], told[-1][2] + 1)
    assert told == [(Kind.START, 0, 1), (Kind.PART, 3, 1), (Kind.PART, 1, 1), (Kind.END, 2, 1)]


def test_the_last_one_sent_of_a_chunk_counts_and_short_ones_are_padded(tmp_path: Path) -> None:
    held = disks(sent(tmp_path / "s"))["d"]
    assert held == {
        0: bytes(CHUNK),
        CHUNK: DATA,
        2 * CHUNK: bytes(CHUNK),
        3 * CHUNK: bytes(DATA[:512]) + bytes(CHUNK - 512),
    }


def test_percentages_end_with_100_in_the_sections_end(tmp_path: Path) -> None:
    events = sent(tmp_path / "s")
    assert [event.percent for event in events if isinstance(event, Percent)] == [50, 100]
    last = max(number for number, event in enumerate(events) if isinstance(event, Section))
    assert any(isinstance(event, Percent) and event.percent == 100 for event in events[last:])


@pytest.mark.parametrize("footers", [True, False])
@pytest.mark.parametrize("machine", ["pc", None])
def test_footers_and_configuration_are_there_as_asked(tmp_path: Path, machine: str | None, footers: bool) -> None:
    events = sent(tmp_path / "s", machine=machine, footers=footers)
    assert {event.footer for event in events if isinstance(event, SectionOver)} == {footers}
    assert [event.machine for event in events if isinstance(event, Configuration)] == ([machine] if machine else [])


def test_without_zero_blocks_the_same_is_held(tmp_path: Path) -> None:
    events = sent(tmp_path / "a", zero_blocks=False)
    assert not any(event.zero for event in events if isinstance(event, Block))
    assert disks(events) == disks(sent(tmp_path / "b"))
