"""Ownership records: what they say, where they lie, and that they come and go with the images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qemu_blkmig import errors
from qemu_blkmig.destination import images, ownership
from qemu_blkmig.destination.hashtable import table_path
from qemu_blkmig.destination.protocol import Image

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> str:
    return str(tmp_path / "vm.qcow2")


def state(image: str) -> tuple[str, str] | None:
    told = ownership.read(image)
    return (told.state, told.job) if told else None


def new(place: Path | str, **settings: object) -> Image:
    """A raw image of 1 MiB to be created for disk `d`, but for `settings`."""
    usual = {"disk": "d", "path": str(place), "format": "raw", "size": MIB, "create": True, "origin": "a:/from"}
    return Image(**usual | settings)  # type: ignore[arg-type]


def test_the_record_is_a_hidden_json_file_beside_the_image(image: str, tmp_path: Path) -> None:
    ownership.announce(image, "1a2b", "vda", "hosta:/old/vm.qcow2")
    assert ownership.path_of(image) == tmp_path / ".vm.qcow2.blkmig"
    told = json.loads((tmp_path / ".vm.qcow2.blkmig").read_text())
    assert told.pop("when").endswith("Z")
    wanted = {"version": 1, "state": "incoming", "job": "1a2b", "disk": "vda", "image": image}
    assert told == wanted | {"peer": "hosta:/old/vm.qcow2"}
    assert [path.name for path in tmp_path.iterdir()] == [".vm.qcow2.blkmig"]


def test_a_link_to_the_image_has_the_image_s_record(image: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(image)
    ownership.move(image, "1", "d", "there")
    assert state(str(tmp_path / "elsewhere" / "link")) == ("moved", "1")


def test_complete_is_said_only_by_the_job_that_filled_the_image_and_may_be_said_twice(image: str) -> None:
    assert not ownership.complete(image, "1")
    ownership.announce(image, "1", "d", "a")
    assert not ownership.complete(image, "2")
    assert state(image) == ("incoming", "1")
    assert ownership.complete(image, "1") and ownership.complete(image, "1")
    assert state(image) == ("complete", "1")


def test_what_was_recorded_before_comes_back_when_nothing_was_written(image: str) -> None:
    ownership.move(image, "1", "d", "there")
    ownership.announce(image, "2", "d", "a")
    ownership.announce(image, "2", "d", "a")
    ownership.withdraw(image, "3")
    assert state(image) == ("incoming", "2")
    ownership.withdraw(image, "2")
    assert state(image) == ("moved", "1")
    ownership.withdraw(image, "2")
    assert state(image) == ("moved", "1")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "state": "moved"}'])
def test_a_damaged_record_is_named(image: str, text: str) -> None:
    ownership.path_of(image).write_text(text)
    with pytest.raises(ownership.Damaged, match=r"\.vm\.qcow2\.blkmig"):
        ownership.read(image)
    ownership.announce(image, "1", "d", "a")
    assert state(image) == ("incoming", "1")


def test_a_record_that_cannot_be_written_leaves_the_old_one(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ownership.move(image, "1", "d", "there")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            ownership.announce(image, "2", "d", "a")
    assert state(image) == ("moved", "1")
    assert len(list(Path(image).parent.iterdir())) == 1


def test_reading_records_needs_the_standard_library_only() -> None:
    program = (
        "import sys; import qemu_blkmig.destination.ownership\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('msgspec', 'asyncio', 'nbd', 'qemu')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_prepared_image_is_incoming_and_its_record_goes_with_it(tmp_path: Path) -> None:
    [prepared] = images.prepare([new(tmp_path / "a")], "1")
    told = ownership.read(prepared.image.path)
    assert told is not None and (told.state, told.job, told.disk, told.peer) == ("incoming", "1", "d", "a:/from")
    images.give_up(prepared)
    assert list(tmp_path.iterdir()) == []


def test_discarding_an_image_removes_its_record_and_the_hashes_that_were_kept(tmp_path: Path) -> None:
    [prepared] = images.prepare([new(tmp_path / "a")], "1")
    os.close(prepared.descriptor)
    table_path(prepared.image.path).touch()
    assert prepared.created is not None
    images.discard([prepared.created])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("later", "noted", "left"), [(-60, True, False), (60, True, True), (-60, False, True)])
def test_an_image_that_may_have_been_written_to_since_stays_where_that_is_asked_for(
    tmp_path: Path, later: int, *, noted: bool, left: bool
) -> None:
    [prepared] = images.prepare([new(tmp_path / "a")], "1")
    os.close(prepared.descriptor)
    path = prepared.image.path
    if noted:
        table_path(path).touch()
    written = time.time() + later
    os.utime(path, (written, written))
    assert prepared.created is not None
    told = images.discard([prepared.created], [path], "1", unless_written=True)
    stays = f"{path}: somebody else may have written to it since this job did"
    assert told == (([], [stays]) if left else ([path], []))
    assert ownership.path_of(path).exists() is left
    assert not table_path(path).exists()


@pytest.mark.parametrize("complete", [True, False])
def test_an_image_that_another_job_has_filled_since_is_left_alone_by_the_one_that_made_it(
    tmp_path: Path, complete: bool
) -> None:
    [first] = images.prepare([new(tmp_path / "a")], "1")
    begun = first.identity
    os.close(first.descriptor)
    [second] = images.prepare([new(tmp_path / "a")], "2")
    os.close(second.descriptor)
    path = first.image.path
    table_path(path).touch()
    if complete:
        ownership.complete(path, "2")
    assert first.created is not None
    again = new(path, identity=begun)
    with pytest.raises(errors.Refused, match="was filled by job 2 since"):
        images.prepare([again], "1")
    assert images.inspect([again], "2")[0] == []
    assert images.discard([first.created], [path], "1") == ([], [f"{path}: was filled by job 2 since"])
    images.mark([path], "1", "untouched")
    assert table_path(path).exists() and state(path) == ("complete" if complete else "incoming", "2")
    assert images.discard([first.created], [path], "2") == ([path], [])


@pytest.mark.parametrize("end", ["complete", "untouched"])
def test_hashes_that_were_kept_go_when_the_job_is_over(tmp_path: Path, end: str) -> None:
    [prepared] = images.prepare([new(tmp_path / "a")], "1")
    os.close(prepared.descriptor)
    table_path(prepared.image.path).touch()
    images.mark([prepared.image.path], "1", end)
    assert not table_path(prepared.image.path).exists()


def test_hashes_go_before_the_record_is_written_which_may_need_their_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [prepared] = images.prepare([new(tmp_path / "a")], "1")
    os.close(prepared.descriptor)
    table = table_path(prepared.image.path)
    table.touch()
    monkeypatch.setattr(ownership, "complete", lambda *_: pytest.fail("too early") if table.exists() else True)
    images.mark([prepared.image.path], "1", "complete")


@pytest.mark.parametrize(("untouched", "then"), [(True, ("complete", "0")), (False, ("incoming", "1"))])
def test_an_image_that_was_there_keeps_its_history_until_it_is_written_to(
    tmp_path: Path, untouched: bool, then: tuple[str, str]
) -> None:
    there = tmp_path / "a"
    there.write_bytes(bytes(MIB))
    ownership.announce(str(there), "0", "d", "a")
    ownership.complete(str(there), "0")
    [prepared] = images.prepare([new(there)], "1")
    assert state(str(there)) == ("incoming", "1")
    images.give_up(prepared, untouched=untouched)
    assert state(str(there)) == then


def test_a_refused_image_leaves_no_record_of_any(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(errors.DestinationWriteError):
        images.prepare([new(tmp_path / "b"), new(tmp_path / ("c" * 250))], "1")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
