"""`inspect` and `load --list`, run as a user does, and the map of chunks behind them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_blkmig.errors import StreamError
from qemu_blkmig.stream.chunkmap import MOST_REGIONS, REGION, ChunkMap, ChunkMaps
from qemu_blkmig.stream.events import CHUNK, Block
from tests.stream.streams import block, captured, disks_only


def blkmig(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "qemu_blkmig", *arguments], input=stdin, capture_output=True)


def test_inspect_tells_what_a_real_stream_holds() -> None:
    done = blkmig("inspect", "-", "--output", "json", stdin=captured("two-disks"))
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["machine"] == "pc-i440fx-7.2"
    assert found["footers"] is True
    assert {(d["name"], d["chunks"], d["zero_blocks"], d["end"]) for d in found["devices"]} == {
        ("vda", 4, 2, 4 * CHUNK),
        ("vdb", 2, 1, 2 * CHUNK),
    }
    assert sum(each["blocks"] for each in found["iterations"]) == 6
    assert all(each["part"] in ("PART", "END") for each in found["iterations"])
    assert found["ram"]["filled_pages"] > 0
    assert found["end"] == "device state"


def test_inspect_draws_a_map_of_each_disk() -> None:
    stream = disks_only([block(b"d", 0, bytes(CHUNK)), block(b"d", CHUNK, None), block(b"d", 3 * CHUNK, None)])
    text = blkmig("inspect", "-", "--map", stdin=stream).stdout.decode()
    assert "    #0.0\n" in text
    assert "    #0.0\n" not in blkmig("inspect", "-", stdin=stream).stdout.decode(), "only on a terminal, unless asked"


def test_inspect_tells_what_there_is_before_the_flaw() -> None:
    stream = disks_only([block(b"d", 0, None), b"\xff" * 8])
    done = blkmig("inspect", "-", stdin=stream)
    assert done.returncode == 1
    assert "device 'd': 1 blocks (1 zero)" in done.stdout.decode()
    assert "flaw: byte 62 of the stream" in done.stdout.decode()


def test_list_prints_every_block_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(captured("zero-blocks"))
    done = blkmig("load", "--from", f"file:{tmp_path}/s", "--list")
    lines = sorted(line.split("\t") for line in done.stdout.decode().splitlines())
    assert lines == [["vda", str(chunk * CHUNK), "zero" if chunk % 2 else "data"] for chunk in range(4)]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_what_a_stream_says_does_not_steer_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(disks_only([block(b"v\x1b[2J\n", 0, None)]))
    assert blkmig("load", "--from", f"file:{tmp_path}/s", "--list").stdout == b"v\\x1b[2J\\n\t0\tzero\n"


def test_list_prints_objects_with_output_json() -> None:
    done = blkmig("load", "--from", "fd:0", "--list", "--output", "json", stdin=disks_only([block(b"d", CHUNK, None)]))
    assert json.loads(done.stdout) == {"offset": 52, "device": "d", "position": CHUNK, "zero": True}


def test_a_reader_of_the_list_that_has_seen_enough_is_no_failure_of_ours(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(disks_only([block(b"d", number * CHUNK, None) for number in range(100_000)]))
    command = f"{sys.executable} -m qemu_blkmig load --from file:{tmp_path}/s --list | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, b"d\t0\tzero\n", b"")


@given(st.lists(st.tuples(st.integers(0, 3 * REGION), st.booleans())), st.integers(1, 4 * REGION * CHUNK))
def test_the_map_knows_what_never_came(marks: list[tuple[int, bool]], size: int) -> None:
    chunks = ChunkMap()
    for chunk, zero in marks:
        chunks.mark(Block(0, "d", chunk * CHUNK, zero))
    came = {chunk for chunk, _ in marks}
    missing = {chunk for each in chunks.missing(size) for chunk in range(each.offset // CHUNK, -(-each.end // CHUNK))}
    assert missing == set(range(-(-size // CHUNK))) - came
    assert chunks.received == len(came)
    assert all(each.end <= size for each in chunks.missing(size))


def test_a_stream_that_claims_endless_disks_is_refused_with_bounded_memory() -> None:
    maps = ChunkMaps()
    with pytest.raises(StreamError, match="64 TiB"):
        for number in range(MOST_REGIONS + 1):
            maps.mark(Block(0, f"disk{number % 1000}", number * REGION * CHUNK, False))
    with pytest.raises(StreamError, match="64 TiB"):
        chunks = ChunkMap()
        for number in range(MOST_REGIONS + 1):
            chunks.mark(Block(0, "d", number * REGION * CHUNK, True))
    highest = (1 << 64) - CHUNK
    chunks = ChunkMap()
    chunks.mark(Block(0, "d", highest, True))
    assert chunks.picture(10)[-1] == "+"
    assert sum(each.length for each in chunks.missing(highest + CHUNK)) == highest
