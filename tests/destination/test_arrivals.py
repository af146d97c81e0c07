"""Which QEMUs wait for a guest that goes on with an image."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_blkmig.destination import arrivals
from qemu_blkmig.destination.process import ProcessId

_WAITS = [sys.executable, "-c", "print(flush=True); input()"]


@contextmanager
def _process(*words: str) -> Iterator[ProcessId | None]:
    with subprocess.Popen([*_WAITS, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield ProcessId.of(process.pid)
        process.communicate(b"\n")


@pytest.mark.parametrize(
    "word", ['{"driver":"file","filename":"%s","node-name":"n"}', "file=%s,if=virtio", "driver=file,filename=%s", "%s"]
)
def test_a_qemu_that_waits_is_found_by_the_image_that_it_was_told(tmp_path: Path, word: str) -> None:
    image = str(tmp_path / "disk.raw")
    with _process("-blockdev", word % image, "-incoming", "defer") as process:
        assert arrivals.waiting([str(tmp_path / "other"), image]) == {process}
    assert not arrivals.waiting([image])


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("a,b.raw", "file=%s/a,,b.raw,if=virtio"),
        ("a,b.raw", '{"filename":"%s/a,b.raw"}'),
        ('a"b\\c.raw', '{"filename":"%s/a\\"b\\\\c.raw"}'),
        ("\u00e4.raw", '{"filename":"%s/\\u00e4.raw"}'),
        ("\u00e4.raw", '{"filename":"%s/\u00e4.raw"}'),
        ("a.raw", "file=file:%s/a.raw,if=virtio"),
    ],
)
def test_it_is_found_however_its_command_line_has_the_name(tmp_path: Path, name: str, word: str) -> None:
    with _process("-drive", word.replace("%s", str(tmp_path)), "-incoming", "defer") as process:
        assert arrivals.waiting([str(tmp_path / name)]) == {process}


def test_it_is_found_by_what_the_image_is_really_called(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("disk.raw")
    with _process("-incoming", "defer", f"file={tmp_path}/disk.raw") as process:
        assert arrivals.waiting([str(link)]) == {process}


@pytest.mark.parametrize("word", ["%s2", "%s/x", "/srv%s", "%s.old,if=virtio"])
def test_one_with_an_image_of_a_similar_name_is_not(tmp_path: Path, word: str) -> None:
    image = str(tmp_path / "disk")
    with _process("-incoming", "defer", word % image):
        assert not arrivals.waiting([image])


def test_nor_is_one_that_waits_for_nobody_or_was_there_before_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = str(tmp_path / "disk")
    with _process(f"file={image}"):
        assert not arrivals.waiting([image])
    with _process("-incoming", "defer", f"file={image}"), _process() as later:
        assert later is not None
        monkeypatch.setattr(os, "getpid", lambda: later.pid)
        # Clock ticks are coarse: two that follow each other may have begun in the same one.
        before = ProcessId.of

        def of(pid: int) -> ProcessId | None:
            there = before(pid)
            return ProcessId(pid, there.start + 1) if there is not None and pid == later.pid else there

        monkeypatch.setattr(ProcessId, "of", staticmethod(of))
        assert not arrivals.waiting([image])
