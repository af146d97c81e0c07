"""`load`: streams into real images, over every kind of channel, and what it leaves when the stream is bad."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qemu_blkmig.errors import BlkmigError, ConnectionLost, MigrationError, Refused, StreamError, UsageError
from qemu_blkmig.job.interrupts import Interrupts
from qemu_blkmig.job.load import load
from qemu_blkmig.job.load_options import LoadOptions
from qemu_blkmig.job.load_result import LoadResult
from qemu_blkmig.observe.progress import progress
from qemu_blkmig.stream.events import CHUNK, BlockData, DeviceState
from qemu_blkmig.stream.receiver import Receiver
from tests.stream.streams import block, captured, captured_chunk, decode, disks_only, passed

DATA = random.Random(3).randbytes(CHUNK)
OTHER = random.Random(4).randbytes(CHUNK)
DISK = b"".join(captured_chunk(chunk) for chunk in range(4))


async def loaded(options: LoadOptions) -> LoadResult:
    with progress("none") as reporter:
        return await load(options, reporter, Interrupts(reporter.note))


def saved(directory: Path, stream: bytes) -> str:
    path = directory / "stream"
    path.write_bytes(stream)
    return f"file:{path}"


def make_image(path: Path, image_format: str, size: int, fill: int | None = None) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, path, str(size)], check=True)
    if fill is not None:
        subprocess.run(["qemu-io", "-f", image_format, "-c", f"write -q -P {fill} 0 {size}", path], check=True)


async def until_there(path: Path) -> None:
    """And, if it is a file, that something is in it."""
    while not path.exists() or (path.is_file() and not path.stat().st_size):  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.01)


def raw(path: Path, image_format: str) -> bytes:
    """What the image holds."""
    copy = path.with_suffix(".copy")
    subprocess.run(["qemu-img", "convert", "-f", image_format, "-O", "raw", path, copy], check=True)
    return copy.read_bytes()


@pytest.fixture(params=["raw", "qcow2"])
def image_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", ["full", "zero-blocks", "old-machine"])
async def test_a_real_stream_becomes_the_image_that_was_sent(tmp_path: Path, name: str, image_format: str) -> None:
    image = tmp_path / "image"
    options = LoadOptions(
        saved(tmp_path, captured(name)), {"vda": str(image)}, create=True, format=image_format,
        sizes={None: len(DISK)}, expected={"vda": len(DISK)}, require_complete=True,
    )  # fmt: skip
    result = await loaded(options)
    assert raw(image, image_format) == DISK
    assert result.disks[0].missing == 0
    assert image.stat().st_blocks * 512 < 2 * CHUNK + (1 << 20), "zeroes must stay sparse"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "image.copy", "stream"]


async def test_several_disks_go_to_their_images(tmp_path: Path) -> None:
    paths = {"vda": str(tmp_path / "a"), "vdb": str(tmp_path / "b")}
    options = LoadOptions(saved(tmp_path, captured("two-disks")), paths, create=True, sizes={"vdb": 3 * CHUNK // 2})
    await loaded(options)
    assert (tmp_path / "a").read_bytes() == DISK
    assert (tmp_path / "b").read_bytes() == captured_chunk(0) + bytes(CHUNK // 2)


async def test_an_incremental_stream_fills_in_an_image_and_leaves_the_rest(tmp_path: Path, image_format: str) -> None:
    image = tmp_path / "image"
    make_image(image, image_format, 4 * CHUNK, fill=7)
    options = LoadOptions(
        saved(tmp_path, captured("incremental")), {"vda": str(image)}, format=image_format, incremental=True
    )
    result = await loaded(options)
    assert raw(image, image_format) == (
        b"\7" * (2 * CHUNK) + b"\x55" * 65536 + captured_chunk(2)[65536:] + b"\7" * CHUNK
    )
    assert (result.disks[0].missing, result.disks[0].first_missing) == (3 * CHUNK, 0)


async def test_of_blocks_that_come_again_the_last_one_counts(tmp_path: Path, image_format: str) -> None:
    image = tmp_path / "image"
    records = [block(b"d", 0, DATA), block(b"d", 0, OTHER)] * 20 + [block(b"d", CHUNK, DATA), block(b"d", CHUNK, None)]
    options = LoadOptions(
        saved(tmp_path, disks_only(records)), {"d": str(image)}, create=True, format=image_format,
        sizes={None: 2 * CHUNK},
    )  # fmt: skip
    await loaded(options)
    assert raw(image, image_format) == OTHER + bytes(CHUNK)


async def test_of_blocks_that_lie_across_others_the_last_one_counts(tmp_path: Path, image_format: str) -> None:
    image = tmp_path / "image"
    half = CHUNK // 2
    records = [block(b"d", 0, DATA), block(b"d", CHUNK, DATA), block(b"d", half, None), block(b"d", CHUNK, OTHER)] * 10
    options = LoadOptions(
        saved(tmp_path, disks_only(records)), {"d": str(image)}, create=True, format=image_format,
        sizes={None: 2 * CHUNK},
    )  # fmt: skip
    await loaded(options)
    assert raw(image, image_format) == DATA[:half] + bytes(half) + OTHER


async def test_zeroes_are_written_over_what_an_image_holds(tmp_path: Path, image_format: str) -> None:
    image = tmp_path / "image"
    make_image(image, image_format, 3 * CHUNK, fill=7)
    records = [block(b"d", 0, None), block(b"d", CHUNK, bytes(CHUNK)), block(b"d", 2 * CHUNK, DATA)]
    await loaded(LoadOptions(saved(tmp_path, disks_only(records)), {"d": str(image)}, format=image_format))
    assert raw(image, image_format) == bytes(2 * CHUNK) + DATA


async def test_what_lies_beyond_the_end_in_the_last_chunk_is_ignored(tmp_path: Path, image_format: str) -> None:
    image = tmp_path / "image"
    stream = saved(tmp_path, disks_only([block(b"d", 0, DATA), block(b"d", CHUNK, OTHER)]))
    size = CHUNK + 1536
    await loaded(
        LoadOptions(
            stream, {"d": str(image)}, create=True, format=image_format, sizes={"d": size}, expected={"d": size}
        )
    )
    assert raw(image, image_format)[:size] == DATA + OTHER[:1536]


@pytest.mark.parametrize("kind", ["fd", "exec", "unix", "tcp"])
async def test_a_stream_comes_over_any_channel(tmp_path: Path, kind: str) -> None:
    stream = captured("full")
    (tmp_path / "stream").write_bytes(stream)
    with _sender(kind, tmp_path) as source:
        await loaded(LoadOptions(source, {"vda": str(tmp_path / "image")}, create=True))
    assert (tmp_path / "image").read_bytes() == DISK


@contextlib.contextmanager
def _sender(kind: str, directory: Path) -> Iterator[str]:
    """What to load from; for fd and sockets, a socat-like process that sends the stream."""
    stream = directory / "stream"
    if kind == "exec":
        yield f"exec:cat {stream}"
    elif kind == "fd":
        with subprocess.Popen(["cat", stream], stdout=subprocess.PIPE) as cat:
            assert cat.stdout is not None
            yield f"fd:{cat.stdout.fileno()}"
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        where = f"unix:{directory}/sock" if kind == "unix" else f"tcp:127.0.0.1:{port}"
        script = (
            "import socket,sys,time\n"
            "family, place = (socket.AF_UNIX, sys.argv[1]) if sys.argv[2] == '0' else"
            " (socket.AF_INET, ('127.0.0.1', int(sys.argv[2])))\n"
            "while True:\n"
            "    peer = socket.socket(family)\n"
            "    try:\n        peer.connect(place)\n        break\n"
            "    except OSError:\n        time.sleep(0.02)\n"
            "peer.sendall(open(sys.argv[3], 'rb').read())\n"
        )
        arguments = [f"{directory}/sock", "0" if kind == "unix" else str(port), str(stream)]
        with subprocess.Popen(["python3", "-c", script, *arguments]) as sender:
            yield where
            assert sender.wait(20) == 0


@pytest.mark.parametrize("introduction", [b"\x11\x22\x33\x44", b"GET / HTTP/1.1", b""], ids=["RAM", "other", "silent"])
async def test_a_source_that_connects_once_more_for_its_ram_is_refused_and_others_are_not_heard(
    tmp_path: Path, introduction: bytes
) -> None:
    sock = tmp_path / "sock"
    loading = asyncio.create_task(loaded(LoadOptions(f"unix:{sock}", {"vda": str(tmp_path / "image")}, create=True)))
    await until_there(sock)
    _, source = await asyncio.open_unix_connection(str(sock))
    source.write(captured("full")[:100])
    await source.drain()
    _, another = await asyncio.open_unix_connection(str(sock))
    another.write(introduction)
    if introduction[:1] == b"\x11":
        with pytest.raises(Refused, match="turn its capability multifd off"):
            await loading
    else:
        another.close()
        source.write(captured("full")[100:])
        source.close()
        await loading
        assert (tmp_path / "image").read_bytes() == DISK
    assert not sock.exists()
    source.close()
    another.close()


async def failing(options: LoadOptions, kind: type[BlkmigError], words: str) -> BlkmigError:
    with pytest.raises(kind, match=words) as failed:
        await loaded(options)
    assert failed.value.state
    return failed.value


BAD = {
    "unknown device": (disks_only([block(b"vda", 0, DATA), block(b"vdx", 0, DATA)]), "byte 1048640 .* device 'vdx'"),
    "truncated": (disks_only([block(b"vda", 0, DATA)])[:-20], "the stream ends"),
    "beyond the end": (disks_only([block(b"vda", 0, DATA), block(b"vda", 8 * CHUNK, DATA)]), "beyond the image's"),
    "corrupt": (disks_only([block(b"vda", 0, DATA), b"\xff" * 8]), "0xffffffffffffffff"),
}


@pytest.mark.parametrize(("stream", "words"), BAD.values(), ids=BAD)
async def test_a_created_image_is_removed_if_the_stream_is_bad(tmp_path: Path, stream: bytes, words: str) -> None:
    image = tmp_path / "image"
    options = LoadOptions(saved(tmp_path, stream), {"vda": str(image)}, create=True, sizes={None: 4 * CHUNK})
    error = await failing(options, StreamError, words)
    assert "removed again" in str(error.state)
    assert [path.name for path in tmp_path.iterdir()] == ["stream"]


@pytest.mark.parametrize(("stream", "words"), BAD.values(), ids=BAD)
async def test_an_image_that_was_there_is_marked_if_the_stream_is_bad(
    tmp_path: Path, stream: bytes, words: str, image_format: str
) -> None:
    image, mark = tmp_path / "image", tmp_path / "image.incomplete"
    make_image(image, image_format, 4 * CHUNK)
    options = LoadOptions(saved(tmp_path, stream), {"vda": str(image)}, format=image_format)
    error = await failing(options, StreamError, words)
    assert "marked" in str(error.state)
    assert image.exists() and mark.exists()
    await loaded(replace(options, source=saved(tmp_path, captured("full"))))
    assert not mark.exists(), "a load that succeeds takes the mark away"
    assert raw(image, image_format) == DISK


async def test_parts_that_never_came_are_warned_of_or_refused(tmp_path: Path) -> None:
    stream = disks_only([block(b"d", 0, DATA), block(b"d", 3 * CHUNK, DATA)])
    options = LoadOptions(saved(tmp_path, stream), {"d": str(tmp_path / "a")}, create=True, sizes={None: 4 * CHUNK})
    result = await loaded(options)
    assert "2.0 MiB of 4.0 MiB never came, the first of it at 1048576" in result.warnings[0]
    (tmp_path / "a").unlink()
    assert not (await loaded(replace(options, incremental=True))).warnings
    (tmp_path / "a").unlink()
    await failing(replace(options, require_complete=True), MigrationError, "disk d: 2.0 MiB of 4.0 MiB never came")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("size", [CHUNK, 3 * CHUNK, 2 * CHUNK + 512])
async def test_a_stream_that_does_not_reach_to_the_expected_end_is_refused(tmp_path: Path, size: int) -> None:
    stream = disks_only([block(b"d", 0, DATA), block(b"d", CHUNK, DATA)])
    options = LoadOptions(saved(tmp_path, stream), {"d": str(tmp_path / "a")}, create=True, sizes={None: 4 * CHUNK})
    await failing(replace(options, sizes={}, expected={"d": size}), BlkmigError, "beyond|highest block")


async def test_the_size_is_taken_from_the_highest_block_and_said_to_be(tmp_path: Path, image_format: str) -> None:
    stream = disks_only([block(b"d", 0, DATA), block(b"d", 5 * CHUNK, None), block(b"d", 2 * CHUNK, OTHER)])
    image = tmp_path / "a"
    options = LoadOptions(saved(tmp_path, stream), {"d": str(image)}, create=True, format=image_format)
    result = await loaded(options)
    assert raw(image, image_format) == DATA + bytes(CHUNK) + OTHER + bytes(3 * CHUNK)
    assert any("its size was not given" in warning for warning in result.warnings)


async def test_an_image_grows_with_a_block_that_only_begins_within_it(tmp_path: Path) -> None:
    half = CHUNK // 2
    stream = disks_only([block(b"d", 0, DATA), block(b"d", half, OTHER)])
    image = tmp_path / "a"
    await loaded(LoadOptions(saved(tmp_path, stream), {"d": str(image)}, create=True))
    assert image.read_bytes() == DATA[:half] + OTHER


async def test_from_a_pipe_an_image_that_cannot_grow_needs_its_size(tmp_path: Path) -> None:
    saved(tmp_path, captured("full"))
    options = LoadOptions(f"exec:cat {tmp_path}/stream", {"vda": str(tmp_path / "a")}, create=True, format="qcow2")
    await failing(options, UsageError, "--size")


async def test_a_stream_without_disks_is_refused(tmp_path: Path) -> None:
    options = LoadOptions(saved(tmp_path, captured("no-disks")), {"vda": str(tmp_path / "a")}, create=True)
    await failing(options, StreamError, "no block section")


async def test_an_image_that_is_there_is_not_created_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"precious")
    options = LoadOptions(saved(tmp_path, captured("full")), {"vda": str(tmp_path / "a")}, create=True)
    await failing(options, Refused, "is there already")
    assert (tmp_path / "a").read_bytes() == b"precious"


async def test_a_container_is_not_taken_for_a_raw_image(tmp_path: Path) -> None:
    image = tmp_path / "a"
    make_image(image, "qcow2", 4 * CHUNK)
    before = image.read_bytes()
    await failing(LoadOptions(saved(tmp_path, captured("full")), {"vda": str(image)}), Refused, "looks like qcow2")
    assert image.read_bytes() == before


async def test_a_command_that_fails_is_no_success(tmp_path: Path) -> None:
    saved(tmp_path, captured("full"))
    options = LoadOptions(f"exec:cat {tmp_path}/stream; exit 3", {"vda": str(tmp_path / "a")}, create=True)
    await failing(options, ConnectionLost, "status 3")


async def test_a_cancelled_load_ends_and_leaves_nothing(tmp_path: Path) -> None:
    options = LoadOptions(f"unix:{tmp_path}/sock", {"vda": str(tmp_path / "a")}, create=True)
    loading = asyncio.create_task(loaded(options))
    await until_there(tmp_path / "sock")
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert not list(tmp_path.iterdir())


async def test_a_source_that_waits_for_answers_is_told_to_the_user(tmp_path: Path) -> None:
    options = LoadOptions(f"unix:{tmp_path}/sock", {"vda": str(tmp_path / "a")}, create=True)
    loading = asyncio.create_task(loaded(options))
    await until_there(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as source:
        source.connect(str(tmp_path / "sock"))
        source.sendall(b"QEVM" + bytes([0, 0, 0, 3, 8, 0, 1, 0, 0]))
        with pytest.raises(StreamError, match="return-path off"):
            await loading


async def test_everything_but_the_disks_is_forwarded_untouched(tmp_path: Path) -> None:
    stream = captured("two-disks")
    paths = {"vda": str(tmp_path / "a"), "vdb": str(tmp_path / "b")}
    options = LoadOptions(saved(tmp_path, stream), paths, create=True, forward=f"exec:cat >{tmp_path}/rest")
    await loaded(options)
    assert (tmp_path / "rest").read_bytes() == passed(decode(stream, pass_on=True))
    assert (tmp_path / "a").read_bytes() == DISK


async def test_device_state_is_not_forwarded_unless_the_disks_are_as_expected(tmp_path: Path) -> None:
    stream = captured("incremental")
    rest = tmp_path / "rest"
    options = LoadOptions(
        saved(tmp_path, stream), {"vda": str(tmp_path / "a")}, create=True, require_complete=True,
        forward=f"exec:trap '' TERM; cat >{rest}",
    )  # fmt: skip
    await failing(options, MigrationError, "never came")
    before = next(event.offset for event in decode(stream) if isinstance(event, DeviceState))
    blocks = sum(len(bytes(event.data)) for event in decode(stream) if isinstance(event, BlockData))
    assert rest.stat().st_size < before - blocks
    assert not (tmp_path / "a").exists()


async def test_a_receiver_of_the_rest_that_goes_away_is_told(tmp_path: Path) -> None:
    options = LoadOptions(
        saved(tmp_path, captured("full")),
        {"vda": str(tmp_path / "a")},
        create=True,
        forward="exec:head -c 200 >/dev/null",
    )
    await failing(options, ConnectionLost, "cannot be written|status")


async def test_an_image_whose_load_was_killed_is_marked_and_can_be_loaded_again(tmp_path: Path) -> None:
    image, mark = tmp_path / "a", tmp_path / "a.incomplete"
    source = saved(tmp_path, captured("full"))
    command = [sys.executable, "-m", "qemu_blkmig", "load", "--from", f"exec:head -c 2000000 {source[5:]}; sleep 5"]
    loading = await asyncio.create_subprocess_exec(
        *command, "--create", "--size", "4M", f"vda={image}", start_new_session=True
    )
    await until_there(mark)
    loading.kill()
    await loading.wait()
    assert str(image) in mark.read_text()
    await loaded(LoadOptions(source, {"vda": str(image)}, sizes={}, format="raw", incremental=True))
    assert not mark.exists()


async def test_a_mark_that_was_there_stays_if_the_load_fails_before_it_writes(tmp_path: Path) -> None:
    image, mark = tmp_path / "a", tmp_path / "a.incomplete"
    make_image(image, "raw", 4 * CHUNK)
    options = LoadOptions(
        saved(tmp_path, captured("full")), {"vda": str(image)}, format="raw", forward=f"unix:{tmp_path}/nobody"
    )
    error = await failing(options, Refused, "cannot be opened")
    assert "untouched" in str(error.state)
    assert not mark.exists()
    mark.write_text("a load was killed\n")
    error = await failing(options, Refused, "cannot be opened")
    assert "is incomplete as it was before" in str(error.state)
    assert mark.exists()


async def test_a_mark_that_was_there_stays_if_that_of_another_image_cannot_be_made(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for image in (first, second):
        make_image(image, "raw", 4 * CHUNK)
    (tmp_path / "a.incomplete").mkdir()
    (tmp_path / "b.incomplete").write_text("a load was killed\n")
    options = LoadOptions(saved(tmp_path, captured("full")), {"vda": str(first), "vdb": str(second)}, format="raw")
    error = await failing(options, Refused, "cannot be made")
    assert f"{second} is incomplete as it was before" in str(error.state)
    assert (tmp_path / "b.incomplete").exists()


async def test_a_defect_of_ours_leaves_no_created_image_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(_self: Receiver) -> None:
        raise OverflowError("a defect")

    monkeypatch.setattr(Receiver, "receive_disks", defect)
    options = LoadOptions(saved(tmp_path, captured("full")), {"vda": str(tmp_path / "a")}, create=True)
    with pytest.raises(OverflowError):
        await loaded(options)
    assert [path.name for path in tmp_path.iterdir()] == ["stream"]


async def test_a_device_that_never_came_and_has_no_size_is_an_error(tmp_path: Path) -> None:
    images = {"vda": str(tmp_path / "a"), "vdx": str(tmp_path / "x")}
    options = LoadOptions(saved(tmp_path, captured("full")), images, create=True)
    await failing(options, MigrationError, "disk vdx: no block of it came")
    assert [path.name for path in tmp_path.iterdir()] == ["stream"]


async def test_a_device_without_a_name_is_warned_of(tmp_path: Path) -> None:
    stream = saved(tmp_path, disks_only([block(b"", 0, DATA)]))
    result = await loaded(LoadOptions(stream, {"": str(tmp_path / "a")}, create=True))
    assert any("-blockdev" in warning for warning in result.warnings)
    (tmp_path / "a").unlink()
    options = LoadOptions(stream, {"": str(tmp_path / "a")}, create=True, require_complete=True)
    await failing(options, MigrationError, "-blockdev")


async def test_a_file_that_only_a_part_was_forwarded_to_is_removed(tmp_path: Path) -> None:
    stream = captured("full")
    options = LoadOptions(
        saved(tmp_path, stream[: len(stream) // 2]),
        {"vda": str(tmp_path / "a")},
        create=True,
        forward=f"file:{tmp_path}/f",
    )
    error = await failing(options, StreamError, "the stream ends")
    assert "f was removed again" in str(error.state)
    assert [path.name for path in tmp_path.iterdir()] == ["stream"]


async def test_a_fifo_that_nobody_writes_to_can_be_got_away_from(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    options = LoadOptions(f"file:{tmp_path}/fifo", {"vda": str(tmp_path / "a")}, create=True)
    loading = asyncio.create_task(loaded(options))
    await until_there(tmp_path / "a.incomplete")
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert [path.name for path in tmp_path.iterdir()] == ["fifo"]


async def test_nobody_need_connect_to_be_told_that_a_size_is_missing(tmp_path: Path) -> None:
    options = LoadOptions(f"unix:{tmp_path}/in", {"vda": str(tmp_path / "a")}, create=True, format="qcow2")
    await failing(options, UsageError, "--size")


@pytest.mark.parametrize("uri", ["fd:99999999999999", "tcp:localhost:65536", "tcp:localhost", "fd:\u0663", "ftp:x"])
async def test_what_names_no_stream_is_a_usage_error(tmp_path: Path, uri: str) -> None:
    options = LoadOptions(saved(tmp_path, captured("full")), {"vda": str(tmp_path / "a")}, create=True)
    await failing(replace(options, source=uri), UsageError, "stream|number|port")
    await failing(replace(options, forward=uri), UsageError, "stream|number|port")
    assert [path.name for path in tmp_path.iterdir()] == ["stream"]


async def test_a_block_up_to_which_no_file_can_grow_is_told_with_its_place_in_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow(_size: int) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    stream = disks_only([block(b"d", 0, DATA), block(b"d", 1 << 46, DATA)])
    options = LoadOptions(saved(tmp_path, stream), {"d": str(tmp_path / "a")}, create=True)
    monkeypatch.setattr("qemu_blkmig.job.load_images.grower", lambda _descriptor: grow)
    error = await failing(options, StreamError, f"disk d: byte {52 + 10 + CHUNK} of the stream: .* cannot grow: File")
    assert "removed again" in str(error.state)
