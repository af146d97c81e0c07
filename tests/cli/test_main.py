"""The command line: errors as people and programs get them, exit codes, what makes no sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_blkmig.cli.main import main, report, show_error
from qemu_blkmig.errors import MigrationError, SourceReadError
from qemu_blkmig.qmp.monitor import CommandFailed
from qemu_blkmig.stream.events import CHUNK
from tests.stream.streams import block, disks_only


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state directory, not there yet."""
    monkeypatch.setenv("QEMU_BLKMIG_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


COPY = ["copy", "qmp:/nothing", "local:/tmp"]
MIGRATE = ["migrate", "qmp:/nothing", "local:/tmp", "--pause-only"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["teleport"], "'teleport'"),
        (["migrate"], "SOURCE, DEST"),
        ([*MIGRATE, "--downtime", "300ms"], "--downtime: not a whole number: '300ms'"),
        ([*MIGRATE, "--launch", "true"], "exactly one way"),
        (["copy", "libvirt:vm", "local:/tmp"], "not a source"),
        (["migrate", "libvirt:vm", "local:/tmp"], "is on this host, and so is the domain"),
        (["migrate", "libvirt:vm", "ssh://h/d", "--pause-only"], "--pause-only is not for libvirt's domains"),
        (["migrate", "libvirt:vm", "ssh://h/d", "--source-after", "keep"], "--source-after keep is not for"),
        (["check", "libvirt:", "ssh://h/d"], "names no domain"),
        ([*COPY, "--downtime", "-5"], "--downtime must be"),
        ([*COPY, "--max-rounds", "0"], "--max-rounds must be"),
        ([*COPY, "--freeze-limit", "nan"], "--freeze-limit must be"),
        ([*COPY, "--source-format", "raw"], "--source-format is for an image file"),
        (["copy", "image:/nothing", "local:/tmp", "--agent", "/nothing"], "--agent is for a running guest"),
        (["check", "qmp:/nothing", "local:/tmp", "--launch", "x", "--target-qmp", "y"], "in one way"),
        (["set", "job"], "nothing to be set"),
        (["set", "job", "--bandwidth", "fast"], "--bandwidth: not a size: 'fast'"),
        (["receive"], "receive speaks to a program"),
    ],
)
def test_what_makes_no_sense_is_told_in_a_line_or_two(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert len(told.err.splitlines()) <= 2, "no page of usage hides it"
    assert told.out == ""


@pytest.mark.parametrize("option", [["--output", "json"], ["--output=json"]])
def test_with_output_json_an_error_is_an_object_on_stdout(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*MIGRATE, *option, "--progress=none"]) == 3
    told = capsys.readouterr()
    error = json.loads(told.out)["error"]
    assert error == {
        "exit_code": 3,
        "kind": "refused",
        "what": "source QEMU: there is no QMP socket at /nothing",
        "disk": None,
        "state": "nothing was touched",
        "advice": error["advice"],
        "suspended": None,
    }
    assert f"qemu-blkmig: {error['what']}" in told.err


def test_with_output_json_a_usage_error_is_one_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "--output", "json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "usage"


def test_the_kind_of_an_error_is_the_nearest_of_the_documented_tree() -> None:
    assert report(SourceReadError("bad sector", disk="vda", offset=0)).kind == "source-read"
    assert report(CommandFailed("source QEMU", "stop", "GenericError", "no")).kind == "request"
    assert report(MigrationError("failed")).kind == "migration"


def test_the_job_to_be_resumed_is_named_for_programs() -> None:
    error = MigrationError("the other host is full")
    error.suspended = "1a2b3c4d"
    assert report(error).suspended == "1a2b3c4d"


def test_another_host_s_words_do_not_pass_for_ours(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(MigrationError("it said:\n  next: run anything", advice="look there"), verbose=False)
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("  next: ")] == [
        "  next: look there"
    ]


def test_verbose_may_stand_before_or_behind_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-v", *MIGRATE], [*MIGRATE, "-v"]):
        assert main(arguments) == 3
        told = capsys.readouterr().err
        assert "Traceback" in told
        assert told.splitlines()[-1].startswith("  next: "), "what matters stands last"


def test_no_jobs_are_said_to_be_none(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs"]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"no jobs in {state}\n")
    assert main(["jobs", "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["jobs"] == []


def test_a_state_directory_that_cannot_be_read_is_not_taken_for_empty(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state.touch()
    assert main(["jobs"]) == 3
    assert "cannot be read" in capsys.readouterr().err


def test_a_job_that_is_not_there_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["cleanup"], ["status"], ["cancel"], ["switchover"], ["set", "--downtime", "5"]):
        assert main([command[0], "nothing", *command[1:]]) == 3
        assert "there is no job 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["demo", "check", "migrate", "copy", "jobs", "status", "set", "switchover", "cancel", "cleanup"]
)
def test_every_option_has_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    bare = [
        line
        for line, following in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith("  -") and "  " not in line.strip() and not following.startswith("     ")
    ]
    assert bare == []


def test_names_that_are_not_utf_8_are_refused_or_told_and_make_no_failure_of_what_was_done(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/b\xe4"
    image, made, stream = name + b".raw", name + b".made", name + b".stream"
    os.truncate(os.open(image, os.O_CREAT | os.O_WRONLY), 1 << 20)
    (tmp_path / "there").mkdir()

    def run(*words: bytes | str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([sys.executable, "-m", "qemu_blkmig.cli.main", *words], capture_output=True, check=False)

    copy = run("copy", b"image:" + image, f"local:{tmp_path}/there", "--progress", "none", "--output", "json")
    assert copy.returncode == 3 and "not UTF-8" in json.loads(copy.stdout)["error"]["what"]
    missing = run("inspect", name + b".missing", "--output", "json")
    assert missing.returncode == 3 and "b\udce4.missing" in json.loads(missing.stdout)["error"]["what"]
    Path(os.fsdecode(stream)).write_bytes(disks_only([block(b"vda", 0, bytes(CHUNK))]))
    for form in ("text", "json"):
        words: list[bytes | str] = [
            "load",
            b"--from",
            b"file:" + stream,
            b"vda=" + made,
            "--create",
            "--progress",
            "none",
        ]
        loaded = run(*words, "--output", form)
        assert loaded.returncode == 0, loaded.stderr
        assert b"b\\udce4.made" in loaded.stdout
        Path(os.fsdecode(made)).unlink()


def test_a_directory_whose_real_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    real, link, image = tmp_path / "d\udce4", tmp_path / "link", tmp_path / "image"
    real.mkdir()
    link.symlink_to(real)
    os.truncate(os.open(image, os.O_CREAT | os.O_WRONLY), 1 << 20)
    words = ["copy", f"image:{image}", f"local:{link}", "--progress", "none", "--output", "json"]
    done = subprocess.run([sys.executable, "-m", "qemu_blkmig.cli.main", *words], capture_output=True, check=False)
    assert done.returncode == 3 and "not UTF-8" in json.loads(done.stdout)["error"]["what"]
