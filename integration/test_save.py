"""`save`: into files, pipes and real QEMUs; what is refused, and what is left when the receiver goes away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from integration.thorough import also
from qemu_blkmig.stream.events import CHUNK, Block, BlockData, EndOfPart, EndOfStream, Kind, Percent, Section
from tests.stream.qemus import drive, make_image, qemu, same
from tests.stream.streams import decode, disks

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMU_BLKMIG_STATE_DIR", str(tmp_path / "state"))


def blkmig(*arguments: str, fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qemu_blkmig", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, pass_fds=fds)


def succeed(*arguments: str) -> str:
    done = blkmig(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


SPARSE = ("write -q -P 3 0 3M", "write -q -P 9 17M 64k", "write -q -P 8 20971008 512")


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("size", [32 * MIB, 20 * MIB, 20 * MIB + 1536], ids=["large", "even", "odd"])
def test_an_image_saved_and_loaded_is_the_same(tmp_path: Path, image_format: str, size: int) -> None:
    image = make_image(tmp_path / "a", image_format, size, *SPARSE[:2], f"write -q -P 5 {size - 512} 512")
    succeed("save", f"image:{image}", "--to", f"file:{tmp_path}/s", "--source-format", image_format)
    succeed("load", "--from", f"file:{tmp_path}/s", "--create", "--size", str(size), "--expect-size", str(size),
            "--require-complete", f"a={tmp_path}/b")  # fmt: skip
    assert same(image, image_format, tmp_path / "b", "raw")
    assert (tmp_path / "b").stat().st_blocks * 512 <= 5 * MIB
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "s", "state"]


def test_a_stream_has_the_form_of_the_old_engine(tmp_path: Path) -> None:
    image = make_image(tmp_path / "a", "raw", 4 * MIB, "write -q -P 3 1M 1M")
    succeed("save", f"image:{image}", "--to", f"file:{tmp_path}/s", "--name", "a=virtio0")
    events = decode((tmp_path / "s").read_bytes())
    assert [event.kind for event in events if isinstance(event, Section)] == [Kind.START, Kind.PART, Kind.END]
    assert sum(isinstance(event, EndOfPart) for event in events) == 3
    blocks = {(e.device, e.position // MIB, e.zero) for e in events if isinstance(e, Block)}
    assert blocks == {("virtio0", chunk, chunk != 1) for chunk in range(4)}
    percents = [event.percent for event in events if isinstance(event, Percent)]
    assert percents == sorted(set(percents))
    assert percents[-1] == 100
    assert isinstance(events[-1], EndOfStream)


def test_without_zero_blocks_zeroes_are_sent_as_data(tmp_path: Path) -> None:
    image = make_image(tmp_path / "a", "raw", 3 * MIB, "write -q -P 3 1M 1M")
    succeed("save", f"image:{image}", "--to", f"file:{tmp_path}/s", "--no-zero-blocks")
    events = decode((tmp_path / "s").read_bytes())
    assert not any(event.zero for event in events if isinstance(event, Block))
    assert disks(events) == {"a": {0: bytes(CHUNK), MIB: b"\3" * CHUNK, 2 * MIB: bytes(CHUNK)}}


def test_of_an_overlay_only_chunks_that_it_allocates_are_sent_and_those_whole(tmp_path: Path) -> None:
    base = make_image(tmp_path / "base", "raw", 8 * MIB, "write -q -P 1 0 8M")
    overlay = make_image(
        tmp_path / "a",
        "qcow2",
        8 * MIB,
        "write -q -P 2 3276800 64k",
        "write -q -z 5M 2M",
        "write -q -z 7M 64k",
        base=base,
    )
    succeed("save", f"image:{overlay}", "--source-format", "qcow2", "--to", f"file:{tmp_path}/s", "--shared-base")
    events = decode((tmp_path / "s").read_bytes())
    flagged = {event.position // MIB: event.zero for event in events if isinstance(event, Block)}
    assert flagged == {3: False, 5: True, 6: True, 7: False}
    assert disks(events)["a"][3 * MIB] == b"\1" * 131072 + b"\2" * 65536 + b"\1" * (MIB - 196608)
    assert disks(events)["a"][7 * MIB] == bytes(65536) + b"\1" * (MIB - 65536)


MACHINES = {
    "pc": ("pc", []),
    "q35": ("pc-q35-7.2", []),
    "versioned": ("pc-i440fx-7.2", []),
    "old": ("pc-i440fx-2.3", ["--no-configuration", "--no-footers"]),
}


@pytest.mark.parametrize("image_format", ["qcow2", *also("raw")])
@pytest.mark.parametrize(("machine", "options"), MACHINES.values(), ids=MACHINES)
def test_a_real_qemu_loads_what_was_saved(tmp_path: Path, machine: str, options: list[str], image_format: str) -> None:
    image = make_image(tmp_path / "vda", "raw", 24 * MIB, *SPARSE)
    target = make_image(tmp_path / "target", image_format, 24 * MIB, "write -q -P 7 0 24M")
    named = options or ["--machine", machine]
    place = tmp_path / "in"
    with qemu(
        tmp_path / "q", "-S", "-incoming", f"unix:{place}", *drive(target, image_format), machine=machine
    ) as waiting:
        succeed("save", f"image:{image}", "--to", f"unix:{place}", *named)
        assert waiting.outcome() == "completed"
        waiting.quit()
    assert same(image, "raw", target, image_format)


def test_a_real_qemu_before_zero_blocks_is_served_too(tmp_path: Path) -> None:
    image = make_image(tmp_path / "vda", "raw", 4 * MIB, "write -q -P 3 1M 1M")
    target = make_image(tmp_path / "target", "raw", 4 * MIB, "write -q -P 7 0 4M")
    with qemu(tmp_path / "q", "-S", "-incoming", f"unix:{tmp_path}/in", *drive(target, "raw")) as waiting:
        succeed("save", f"image:{image}", "--to", f"unix:{tmp_path}/in", "--machine", "pc", "--no-zero-blocks")
        assert waiting.outcome() == "completed"
        waiting.quit()
    assert same(image, "raw", target, "raw")


def test_a_disk_that_a_real_qemu_cannot_load_is_refused_before_it_is_bothered(tmp_path: Path) -> None:
    image = make_image(tmp_path / "vda", "raw", 2 * MIB + 512, "write -q -P 3 2M 512")
    target = make_image(tmp_path / "target", "raw", 2 * MIB + 512)
    with qemu(tmp_path / "q", "-S", "-incoming", f"unix:{tmp_path}/in", *drive(target, "raw")) as waiting:
        done = blkmig("save", f"image:{image}", "--to", f"unix:{tmp_path}/in", "--machine", "pc")
        assert done.returncode == 3
        assert "disk vda: its size, 2097664 bytes" in done.stderr
        assert waiting("query-status")["status"] == "inmigrate", "it still waits"
        make_image(tmp_path / "vda", "raw", 2 * MIB + 512, "write -q -P 3 1M 1M")
        succeed("save", f"image:{image}", "--to", f"unix:{tmp_path}/in", "--machine", "pc")
        assert waiting.outcome() == "completed"
        waiting.quit()
    assert same(image, "raw", target, "raw"), "with a tail of zeroes it can be loaded"


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_running_qemu_is_saved_while_its_disks_are_written(tmp_path: Path, image_format: str) -> None:
    size = 64 * MIB
    first = make_image(tmp_path / "one", image_format, size, "write -q -P 1 0 64M")
    second = make_image(tmp_path / "two", image_format, 8 * MIB, *SPARSE[:1])
    with qemu(tmp_path / "q", *drive(first, image_format), *drive(second, image_format, "vdb")) as source:
        command = [sys.executable, "-m", "qemu_blkmig", "save", f"qmp:{source.qmp}", "--to", f"file:{tmp_path}/s"]
        command += ["--bandwidth", "40M", "--output", "json", "--progress", "json"]
        progress = tmp_path / "progress"
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=progress.open("w"), text=True) as saving:
            while not (tmp_path / "s.incomplete").exists():
                time.sleep(0.01)
            # In a bulk pass of two seconds and the first rounds, which put off what is hot.
            for number in range(80):
                source.io("vda", f"write -q -P {number + 2} {number * 7 % 64 * MIB} 128k")
                source.io("vdb", f"write -q -z {number % 4 * MIB} 512k")
                time.sleep(0.02)
            assert '"switchover"' not in progress.read_text(), "`stop` does not hold up the writes of qemu-io"
            output, _ = saving.communicate()
            assert saving.returncode == 0, progress.read_text()
        percents = {event.get("percent") for event in map(json.loads, progress.read_text().splitlines())}
        assert len(percents) > 5, "how far a pass is is told within it, too"
        assert source("query-status")["status"] == "running"
        assert not source("query-block-exports")
        result = json.loads(output)
        assert result["guest"] == "the guest runs at the source"
        assert all(disk["rounds"] for disk in result["disks"])
        source.quit()
    succeed("load", "--from", f"file:{tmp_path}/s", "--create", f"vda={tmp_path}/a", f"vdb={tmp_path}/b")
    assert same(first, image_format, tmp_path / "a", "raw")
    assert same(second, image_format, tmp_path / "b", "raw")
    held = disks(decode((tmp_path / "s").read_bytes()))
    assert {name: sorted(chunks) for name, chunks in held.items()} == {
        "vda": list(range(0, size, MIB)),
        "vdb": list(range(0, 8 * MIB, MIB)),
    }


def test_the_receiver_going_away_is_told_and_the_source_unharmed(tmp_path: Path) -> None:
    image = make_image(tmp_path / "one", "raw", 32 * MIB, "write -q -P 1 0 32M")
    with qemu(tmp_path / "q", *drive(image, "raw")) as source:
        done = blkmig("save", f"qmp:{source.qmp}", "--to", "exec:head -c 3000000 >/dev/null")
        assert done.returncode == 1
        assert "cannot be written: Broken pipe" in done.stderr
        assert "now:" in done.stderr
        assert source("query-status")["status"] == "running"
        assert not source("query-block-exports")
        nodes = source("query-named-block-nodes", flat=True)
        assert not any(node.get("dirty-bitmaps") for node in nodes)


def test_a_command_that_fails_in_the_end_is_a_failure(tmp_path: Path) -> None:
    image = make_image(tmp_path / "one", "raw", MIB)
    done = blkmig("save", f"image:{image}", "--to", "exec:cat >/dev/null; exit 9")
    assert done.returncode == 1
    assert "ended with status 9" in done.stderr


def test_a_file_gets_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    image = make_image(tmp_path / "one", "raw", 8 * MIB, "write -q -P 1 0 8M")
    command = [sys.executable, "-m", "qemu_blkmig", "save", f"image:{image}", "--to", f"file:{tmp_path}/s"]
    with subprocess.Popen([*command, "--bandwidth", "1M"], stderr=subprocess.PIPE) as saving:
        while not (tmp_path / "s.incomplete").exists():
            time.sleep(0.01)
        assert not (tmp_path / "s").exists()
        saving.send_signal(2)
        assert saving.wait(30) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "state"]


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    image = make_image(tmp_path / "one", "raw", MIB)
    (tmp_path / "s").write_bytes(b"precious")
    done = blkmig("save", f"image:{image}", "--to", f"file:{tmp_path}/s")
    assert done.returncode == 3
    assert "is there already" in done.stderr
    assert (tmp_path / "s").read_bytes() == b"precious"
    (tmp_path / "s").rename(tmp_path / "s.incomplete")
    done = blkmig("save", f"image:{image}", "--to", f"file:{tmp_path}/s")
    assert done.returncode == 3
    assert "or was killed while it did" in done.stderr and "remove it" in done.stderr
    assert (tmp_path / "s.incomplete").read_bytes() == b"precious"


def test_a_stream_goes_down_an_inherited_pipe(tmp_path: Path) -> None:
    image = make_image(tmp_path / "one", "raw", 4 * MIB, "write -q -P 1 1M 1M")
    end, start = os.pipe()
    with subprocess.Popen(["cat"], stdin=end, stdout=(tmp_path / "s").open("wb")):
        os.close(end)
        done = blkmig("save", f"image:{image}", "--to", f"fd:{start}", fds=(start,))
        os.close(start)
    assert done.returncode == 0, done.stderr
    assert disks(decode((tmp_path / "s").read_bytes()))["one"][MIB] == b"\1" * MIB


BAD = {
    "unknown disk named": (["--name", "nothing=x"], "not saved"),
    "name too long": (["--name", f"one={'x' * 256}"], "1 to 255 bytes"),
    "machine and none": (["--machine", "pc", "--no-configuration"], "contradict"),
    "no stream": (["--to", "ftp:x"], "names no stream"),
    "machine missing": (["--for-qemu"], "--machine"),
}


@pytest.mark.parametrize(("options", "words"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_a_usage_error(tmp_path: Path, options: list[str], words: str) -> None:
    image = make_image(tmp_path / "one", "raw", MIB)
    done = blkmig("save", f"image:{image}", "--to", "exec:cat >/dev/null", *options)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr


def test_data_survives_a_source_that_answers_in_any_order(tmp_path: Path) -> None:
    image = make_image(tmp_path / "one", "raw", 48 * MIB)
    content = os.urandom(48 * MIB)
    image.write_bytes(content)
    succeed("save", f"image:{image}", "--to", f"file:{tmp_path}/s", "--connections", "4", "--requests", "8")
    events = decode((tmp_path / "s").read_bytes())
    assert b"".join(data for _, data in sorted(disks(events)["one"].items())) == content
    assert sum(isinstance(event, BlockData) for event in events) >= 48
