"""The decoder: real streams, streams cut anywhere, every RAM record, and what it refuses."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qemu_blkmig.errors import StreamError
from qemu_blkmig.stream.events import (
    CHUNK,
    Block,
    BlockData,
    Command,
    Configuration,
    DeviceState,
    EndOfStream,
    Percent,
    RamSkipped,
    Section,
)
from qemu_blkmig.stream.framing import Decoder
from tests.stream.streams import (
    BLOCK_END,
    BLOCK_PART,
    BLOCK_START,
    CAPTURED,
    EOS,
    FOOTER_1,
    FOOTER_2,
    HEADER,
    PC,
    RAM_EOS,
    RAM_PART,
    block,
    captured,
    captured_chunk,
    decode,
    disks,
    disks_only,
    passed,
    ram_start,
    without_pieces,
)

DATA = random.Random(5).randbytes(CHUNK)


@pytest.mark.parametrize("name", ["full", "zero-blocks", "xbzrle", "compress", "old-machine", "uuid"])
def test_a_real_stream_holds_the_disk_that_was_sent(name: str) -> None:
    held = disks(decode(captured(name)))
    assert held == {"vda": {chunk * CHUNK: captured_chunk(chunk) for chunk in range(4)}}


def test_a_real_stream_of_two_disks_tells_them_apart_and_pads_the_short_one() -> None:
    held = disks(decode(captured("two-disks")))
    assert held["vda"] == {chunk * CHUNK: captured_chunk(chunk) for chunk in range(4)}
    assert held["vdb"] == {0: captured_chunk(0), CHUNK: bytes(CHUNK)}


def test_a_real_incremental_stream_holds_only_what_the_overlay_allocates() -> None:
    held = disks(decode(captured("incremental")))
    assert list(held["vda"]) == [2 * CHUNK]
    assert held["vda"][2 * CHUNK] == b"\x55" * 65536 + captured_chunk(2)[65536:]


def test_a_real_source_with_blockdev_sends_an_empty_device_name() -> None:
    assert set(disks(decode(captured("blockdev")))) == {""}


def test_zero_blocks_are_flagged_in_a_real_stream_only_if_the_source_was_told_to() -> None:
    def flagged(name: str) -> set[int]:
        return {event.position // CHUNK for event in decode(captured(name)) if isinstance(event, Block) and event.zero}

    assert flagged("full") == set()
    assert flagged("zero-blocks") == {1, 3}


@pytest.mark.parametrize("name", CAPTURED)
def test_every_real_stream_is_understood_up_to_its_device_state(name: str) -> None:
    events = decode(captured(name))
    assert isinstance(events[-1], DeviceState)


def test_a_real_stream_tells_the_machine_and_its_uuid() -> None:
    configuration = next(event for event in decode(captured("uuid")) if isinstance(event, Configuration))
    assert configuration.machine == "pc-i440fx-7.2"
    assert configuration.uuid == "00112233-4455-6677-8899-aabbccddeeff"


@pytest.mark.parametrize("name", CAPTURED)
def test_a_real_stream_without_its_block_section_is_one_that_has_none(name: str) -> None:
    events = decode(captured(name), pass_on=True)
    assert not disks(decode(passed(events)))
    assert passed(decode(passed(events), pass_on=True)) == passed(events)


def test_what_is_not_of_the_block_section_is_passed_on_byte_for_byte() -> None:
    stream = captured("no-disks")
    assert passed(decode(stream, pass_on=True)) == stream


@pytest.mark.parametrize("cut", [0, 1, 2], ids=["before", "within", "after"])
def test_no_device_state_is_passed_on_before_it_was_told_of(cut: int) -> None:
    stream = captured("full")
    begin = next(event.offset for event in decode(stream) if isinstance(event, DeviceState))
    events = decode(stream, [begin - 1 + cut], pass_on=True)
    state = next(number for number, event in enumerate(events) if isinstance(event, DeviceState))
    assert passed(events[state:]) == stream[begin:]


cuts = st.lists(st.integers(0, 400_000), max_size=12)


@settings(max_examples=15, deadline=None)
@given(cuts=cuts, name=st.sampled_from(["incremental", "no-disks", "old-machine"]))
@example(cuts=list(range(300)), name="incremental")
@example(cuts=list(range(300)), name="old-machine")
def test_a_real_stream_means_the_same_however_it_is_cut(cuts: list[int], name: str) -> None:
    stream = captured(name)
    whole = decode(stream, pass_on=True)
    pieces = decode(stream, [cut for cut in cuts if cut < len(stream)], pass_on=True)
    assert without_pieces(pieces) == without_pieces(whole)
    assert disks(pieces) == disks(whole)
    assert passed(pieces) == passed(whole)


def test_a_stream_fed_byte_by_byte_means_the_same() -> None:
    stream = disks_only([block(b"a", CHUNK, None), struct.pack(">Q", 50 << 9 | 4)], [block(b"b", 0, None)])
    events = decode(stream, range(len(stream)))
    assert without_pieces(events) == without_pieces(decode(stream))
    assert [type(event) for event in events if isinstance(event, Block | Percent)] == [Block, Percent, Block]


def ram(records: bytes, *, version: int = 4, size: int = 1 << 20) -> bytes:
    """A stream with a RAM section of which `records` is one part."""
    listed = b"\x06pc.ram" + struct.pack(">Q", size) if version == 4 else b""
    setup = ram_start(version) + struct.pack(">Q", size | 4) + listed + RAM_EOS + FOOTER_2
    return HEADER + PC + setup + RAM_PART + records + RAM_EOS + FOOTER_2 + b"\0"


PAGE = bytes(range(256)) * 16
RAM_RECORDS = {
    "plain page": struct.pack(">Q", 0x1008) + b"\x06pc.ram" + PAGE,
    "plain page of the block before": struct.pack(">Q", 0x2028) + PAGE,
    "filled page": struct.pack(">Q", 0x1002) + b"\x06pc.ram" + b"\x5a",
    "filled page of the block before": struct.pack(">Q", 0x1022) + b"\0",
    "xbzrle page": struct.pack(">Q", 0x1060) + b"\x01" + struct.pack(">H", 10) + b"0123456789",
    "compressed page": struct.pack(">Q", 0x1120) + struct.pack(">I", 5) + b"abcde",
    "hook": struct.pack(">Q", 0x80),
}


@pytest.mark.parametrize("record", RAM_RECORDS.values(), ids=RAM_RECORDS)
def test_every_record_of_ram_is_skipped_to_its_end(record: bytes) -> None:
    stream = ram(record + RAM_RECORDS["plain page"])
    counts = [event for event in decode(stream) if isinstance(event, RamSkipped)]
    assert counts[1].plain >= 1
    assert isinstance(decode(stream)[-1], EndOfStream)
    assert isinstance(decode(stream, range(len(stream)))[-1], EndOfStream)


def test_ram_of_version_3_has_no_names() -> None:
    page = struct.pack(">Q", 0x1008) + PAGE
    filled = struct.pack(">Q", 0x2002) + b"\0"
    counts = [event for event in decode(ram(page + filled, version=3)) if isinstance(event, RamSkipped)]
    assert (counts[0].size, counts[1].plain, counts[1].filled) == (1 << 20, 1, 1)


def test_ignored_shared_memory_adds_an_address_to_the_list_of_ram_blocks() -> None:
    subsection = b"\x05\x1aconfiguration/capabilities" + struct.pack(">II", 1, 1) + b"\x0fx-ignore-shared"
    listed = b"\x06pc.ram" + struct.pack(">QQ", 1 << 20, 0)
    section = ram_start() + struct.pack(">Q", 1 << 20 | 4) + listed + RAM_EOS
    events = decode(HEADER + PC + subsection + section + b"\0")
    configuration = next(event for event in events if isinstance(event, Configuration))
    assert configuration.capabilities == ("x-ignore-shared",)
    assert isinstance(events[-1], EndOfStream)


def test_the_size_of_a_page_is_taken_from_the_configuration() -> None:
    subsection = b"\x05\x1econfiguration/target-page-bits" + struct.pack(">II", 1, 16)
    page = struct.pack(">Q", 0x10008) + b"\x03ram" + bytes(1 << 16)
    section = ram_start() + struct.pack(">Q", 1 << 20 | 4) + b"\x03ram" + struct.pack(">Q", 1 << 20) + page + RAM_EOS
    events = decode(HEADER + PC + subsection + section + b"\0")
    assert isinstance(events[-1], EndOfStream)


def test_the_size_of_a_page_can_be_told() -> None:
    page = struct.pack(">Q", 0x2008) + b"\x03ram" + bytes(8192)
    stream = ram(page)
    assert isinstance(decode(stream, page_size=8192)[-1], EndOfStream)
    with pytest.raises(StreamError):
        decode(stream)


def test_commands_are_told_and_passed_on() -> None:
    stream = HEADER + PC + b"\x08" + struct.pack(">HH", 1, 4) + bytes(4) + b"\0"
    events = decode(stream, pass_on=True)
    assert [event for event in events if isinstance(event, Command)] == [Command(15, 1, bytes(4))]
    assert passed(events) == stream


def test_a_description_of_the_devices_may_follow_the_end() -> None:
    stream = disks_only([]) + b"\x06" + struct.pack(">I", 2) + b"{}"
    assert isinstance(decode(stream)[-1], EndOfStream)


BAD_STREAMS = {
    "not a stream": (b"QFI\xfb" + bytes(100), 0, "not with 'QEVM'"),
    "old version": (b"QEVM" + struct.pack(">I", 2), 4, "version 2"),
    "empty": (b"", 0, "the magic"),
    "unknown section": (
        HEADER + b"\x01" + struct.pack(">I", 1) + b"\x04vfio" + struct.pack(">II", 0, 1),
        8,
        "'vfio'",
    ),
    "unknown version of block": (HEADER + BLOCK_START[:-1] + b"\x02", 8, "has version 2"),
    "two block sections": (HEADER + BLOCK_START + EOS + BLOCK_START + EOS, 35, "begins twice"),
    "part of nothing": (HEADER + BLOCK_PART, 8, "never began"),
    "part after the end": (disks_only([])[:-1] + BLOCK_PART, 65, "has ended"),
    "unknown flags": (HEADER + BLOCK_START + struct.pack(">Q", 0x11), 27, "flags 0x11"),
    "end with flags": (HEADER + BLOCK_START + struct.pack(">Q", 0x0A), 27, "flags 0xa"),
    "end with a sector": (HEADER + BLOCK_START + struct.pack(">Q", 0x202), 27, "0x0000000000000202"),
    "percentage": (HEADER + BLOCK_START + struct.pack(">Q", 101 << 9 | 4), 27, "no record"),
    "cut in a chunk": (disks_only([block(b"a", 0, DATA)])[:1000], 62, "data of device 'a' at 0"),
    "footer of another": (HEADER + BLOCK_START + EOS + FOOTER_2, 35, "names section 2"),
    "footer missing": (HEADER + BLOCK_START + EOS + FOOTER_1 + BLOCK_END + EOS + b"\0", 53, "without a footer"),
    "footer too many": (HEADER + BLOCK_START + EOS + BLOCK_END + EOS + FOOTER_1, 48, "with a footer"),
    "section not ended": (HEADER + BLOCK_START + EOS + b"\0", 35, "has not ended"),
    "device state before": (HEADER + BLOCK_START + EOS + b"\x04", 35, "has not ended"),
    "more after the end": (disks_only([]) + b"x", 66, "after its end"),
    "end missing": (disks_only([])[:-1], 65, "a section, a command or the end"),
    "huge machine name": (HEADER + b"\x07" + struct.pack(">I", 1 << 30), 9, "longer than any"),
    "unknown element": (HEADER + b"\x09", 8, "0x09"),
    "multifd": (ram(struct.pack(">Q", 0x200)), 0, "multifd"),
    "mapped-ram": (
        HEADER + PC + b"\x05\x1aconfiguration/capabilities" + struct.pack(">II", 1, 1) + b"\x0amapped-ram",
        47,
        "mapped-ram",
    ),
    "unknown RAM record": (ram(struct.pack(">Q", 0x400)), 0, "0x400"),
    "RAM blocks beyond the total": (
        HEADER + ram_start() + struct.pack(">Q", 0x1004) + b"\x01a" + struct.pack(">Q", 0x2000),
        25,
        "add up to 8192",
    ),
    "huge compressed page": (ram(struct.pack(">Q", 0x120) + struct.pack(">I", 1 << 31)), 0, "2147483648 bytes"),
    "xbzrle": (ram(struct.pack(">Q", 0x60) + b"\x02\0\0"), 0, "encoding 2"),
    "postcopy discards RAM": (HEADER + b"\x08" + struct.pack(">HHI", 6, 4, 9), 8, "postcopy"),
    "postcopy's package": (HEADER + b"\x08" + struct.pack(">HHI", 7, 4, 9), 8, "postcopy"),
    "beyond any disk": (HEADER + BLOCK_START + struct.pack(">Q", (1 << 64) - 512 | 9) + b"\1a", 27, "no disk is that"),
    "end beyond any disk": (HEADER + BLOCK_START + struct.pack(">Q", (1 << 63) - CHUNK | 9) + b"\1a", 27, "no disk"),
}


@pytest.mark.parametrize(("stream", "offset", "words"), BAD_STREAMS.values(), ids=BAD_STREAMS)
def test_what_makes_no_sense_is_refused_with_the_place(stream: bytes, offset: int, words: str) -> None:
    with pytest.raises(StreamError, match=words) as refused:
        decode(stream)
    assert not offset or refused.value.offset == offset
    assert f"byte {refused.value.offset} of the stream" in str(refused.value)


@settings(max_examples=60, deadline=None)
@given(end=st.integers(0, 129_459 - 120_000), name=st.sampled_from(["no-disks", "incremental"]))
def test_a_truncated_stream_is_refused_unless_only_device_state_is_missing(end: int, name: str) -> None:
    stream = captured(name)
    with pytest.raises(StreamError):
        decode(stream[:end])


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["incremental", "old-machine", "two-disks"]),
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_a_damaged_stream_is_decoded_or_refused_and_nothing_else(name: str, places: list[tuple[float, int]]) -> None:
    stream = bytearray(captured(name))
    for place, change in places:
        # Most of a stream is payload; what frames it is where damage hurts.
        at = int(place * 700) if change % 2 else int(place * (len(stream) - 1))
        stream[at] ^= change
    try:
        decode(bytes(stream))
    except StreamError as error:
        assert 0 <= error.offset <= len(stream)


def test_memory_is_flat_however_long_the_stream_is() -> None:
    decoder = Decoder(pass_on=True)
    chunk = block(b"vda", 0, DATA)
    list(decoder.feed(HEADER + PC + BLOCK_START + EOS + FOOTER_1 + BLOCK_PART))
    list(decoder.feed(chunk))
    tracemalloc.start()
    try:
        for _ in range(64):
            for event in decoder.feed(chunk):
                assert isinstance(event, Block | BlockData)
        assert tracemalloc.get_traced_memory()[1] < CHUNK // 4
    finally:
        tracemalloc.stop()


@given(
    blocks=st.lists(
        st.tuples(st.sampled_from(["vda", "", "drive-virtio-disk0"]), st.integers(0, 1 << 40), st.booleans()),
        max_size=3,
    ),
    percent=st.integers(0, 100),
    footers=st.booleans(),
    configured=st.booleans(),
    cuts=st.lists(st.integers(0, 1 << 21), max_size=5),
)
@settings(max_examples=50, deadline=None)
def test_what_is_encoded_by_the_description_is_decoded(
    blocks: list[tuple[str, int, bool]], percent: int, footers: bool, configured: bool, cuts: list[int]
) -> None:
    records = [block(name.encode(), sector << 9, None if zero else DATA) for name, sector, zero in blocks]
    parts = [*([record] for record in records), [struct.pack(">Q", percent << 9 | 4)]]
    stream = disks_only(*parts, footers=footers, configuration=PC if configured else b"")
    events = decode(stream, [cut for cut in cuts if cut < len(stream)])
    told = [(event.device, event.position >> 9, event.zero) for event in events if isinstance(event, Block)]
    assert told == blocks
    assert b"".join(bytes(event.data) for event in events if isinstance(event, BlockData)) == DATA * sum(
        not zero for _, _, zero in blocks
    )
    assert [event.percent for event in events if isinstance(event, Percent)] == [percent]
    assert sum(isinstance(event, Section) for event in events) == len(parts) + 1
