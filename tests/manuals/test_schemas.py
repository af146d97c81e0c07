"""The JSON schemas in the package are those of the structs that are printed, and hold what is printed."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from integration.promised import assert_output_promised, assert_promised
from manuals.schemas import FOLDER, OUTPUTS, Output, broken, schema, text
from qemu_blkmig.cli.main import main
from qemu_blkmig.observe.progress import JsonLines
from qemu_blkmig.outlet import Outlet
from qemu_blkmig.places import STATE_VARIABLE
from tests.observe.sample import MIB, disk, figures

each_output = pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.name)


@each_output
def test_a_schema_in_the_package_is_the_one_of_its_struct(output: Output) -> None:
    assert (FOLDER / f"{output.name}.json").read_text() == text(output), "run: python -m manuals.schemas"


@each_output
def test_a_schema_is_one_of_draft_2020_12_and_all_that_it_refers_to_is_in_it(output: Output) -> None:
    made = schema(output)
    Draft202012Validator.check_schema(made)
    references = {word.strip('"') for word in json.dumps(made).split() if "#/$defs/" in word}
    assert {each.removeprefix("#/$defs/").rstrip('"},]') for each in references} <= set(made["$defs"])


def test_there_are_no_others() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{output.name}.json" for output in OUTPUTS}


def test_what_programs_rely_on_does_not_go_away_unnoticed() -> None:
    (output,) = (each for each in OUTPUTS if each.name == "told")
    old = schema(output)
    new = copy.deepcopy(old)
    new["$defs"]["Told"]["properties"]["more"] = {"type": "string"}
    new["$defs"]["Told"]["properties"]["text"]["description"] = "in other words"
    assert not list(broken(old, new)), "more may come, and be told of otherwise"
    new["$defs"]["Told"]["properties"]["text"] = {"type": "integer"}
    del new["$defs"]["Told"]["properties"]["job"]
    assert set(broken(old, new)) == {"Told.job is gone", "Told.text is of another type"}


def test_events_are_as_promised() -> None:
    stream = io.StringIO()
    outlet = Outlet(stream)
    display = JsonLines(outlet)
    display.job("1a2b3c4d")
    display.limits(0.3, None)
    display.stage("bulk")
    display.figures(figures(disk(bulk_done=MIB), disk("vdb")))
    display.note("a note")
    outlet.close()
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [each["event"] for each in told] == ["job", "limits", "stage", "figures", "note"]
    for each in told:
        assert_promised("progress", each)


@pytest.mark.parametrize(
    "words",
    [
        ["jobs"],
        ["status", "nothing"],
        ["migrate"],
        ["check", "qmp:/nothing", "local:/nothing", "--launch", "true"],
        ["copy", "qmp:/nothing", "local:/nothing"],
        ["hooks", "status"],
    ],
    ids=" ".join,
)
def test_what_is_printed_is_as_promised(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    words = [*words, "--output=json"]
    main(words)
    stdout = capsys.readouterr().out
    assert stdout.startswith("{")
    assert_output_promised(["qemu-blkmig", *words], stdout, "")


def test_a_key_that_is_missing_or_unknown_is_found() -> None:
    words = ["qemu-blkmig", "set", "1a2b3c4d", "--output", "json"]
    for document in ({"job": "1a2b3c4d"}, {"job": "1a2b3c4d", "text": "", "more": 1}):
        with pytest.raises(AssertionError, match=r"not as told\.json has it"):
            assert_output_promised(words, json.dumps(document), "")
