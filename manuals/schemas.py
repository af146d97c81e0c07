"""JSON schemas of all that the commands print as JSON, made from the structs that are printed.

They are kept in the repository, qemu_blkmig/schemas/, and installed with the package. `python -m manuals.schemas`
renews them. What programs may rely on does not go away: that a key is dropped, or its type changed, is refused unless
VERSION is raised with it. New keys may come at any time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from qemu_blkmig.cli.hook_commands import Guarded
from qemu_blkmig.cli.main import Failure
from qemu_blkmig.cli.show_job import Cancelled, Cleaned, Jobs, Told
from qemu_blkmig.demo.run import DemoResult
from qemu_blkmig.hooks.install import Standing
from qemu_blkmig.job.check import CheckResult
from qemu_blkmig.job.load_result import LoadResult
from qemu_blkmig.job.managed_check import DomainCheck
from qemu_blkmig.job.result import Result
from qemu_blkmig.job.status import Status
from qemu_blkmig.observe.events import Event
from qemu_blkmig.stream.events import Block
from qemu_blkmig.stream.survey import Inspection

VERSION = 1
DIALECT = "https://json-schema.org/draft/2020-12/schema"
FOLDER = Path(__file__).parents[1] / "qemu_blkmig" / "schemas"
LOST = {"title", "discriminator", "default"}
"""Keys of msgspec's schemas that tell nothing of what is printed: all keys are, whatever their default."""

Schema = dict[str, Any]


@dataclass(frozen=True)
class Output:
    """What is printed as `kind`, in the file `name`.json; `by`: the commands and options that print it."""

    name: str
    kind: Any
    by: str


OUTPUTS = (
    Output("result", Result, "migrate, copy, save, resume, virsh-blkmigrate"),
    Output("error", Failure, "every command that fails"),
    Output("progress", Event, "--progress json, each line"),
    Output("check", CheckResult, "check"),
    Output("plan", DomainCheck, "virsh-blkmigrate --dry-run, check of libvirt:DOMAIN"),
    Output("jobs", Jobs, "jobs"),
    Output("status", Status, "status; with --follow, each line"),
    Output("told", Told, "set, switchover"),
    Output("cancelled", Cancelled, "cancel of a running job"),
    Output("cleaned", Cleaned, "cleanup, cancel of a job that was left behind"),
    Output("load", LoadResult, "load"),
    Output("block", Block, "load --list, each line"),
    Output("inspect", Inspection, "inspect"),
    Output("hooks", Standing, "hooks"),
    Output("guard", Guarded, "guard"),
    Output("demo", DemoResult, "demo"),
)


def schema(output: Output) -> Schema:
    """The schema of an output."""
    (whole,), parts = msgspec.json.schema_components([output.kind], ref_template="#/$defs/{name}")
    return {
        "$schema": DIALECT,
        "$id": f"urn:qemu-blkmig:{VERSION}:{output.name}",
        "title": f"qemu-blkmig: {output.by}",
        **_tidied(whole),
        "$defs": {name: _tidied(part) for name, part in sorted(parts.items())},
    }


def text(output: Output) -> str:
    """The schema as it stands in its file."""
    return json.dumps(schema(output), indent=2) + "\n"


def closed(schema: Schema) -> Schema:
    """The same, with no room for keys that it does not name."""
    parts = {
        name: part | {"additionalProperties": False} if "properties" in part else part
        for name, part in schema["$defs"].items()
    }
    return schema | {"$defs": parts}


def _tidied(part: Any) -> Any:
    if isinstance(part, list):
        return [_tidied(each) for each in part]
    if not isinstance(part, dict):
        return part
    tidied = {key: _tidied(value) for key, value in part.items() if key not in LOST}
    if "properties" in part:
        # By the names that they have, which may be ones that are lost elsewhere.
        tidied["properties"] = {name: _tidied(value) for name, value in part["properties"].items()}
        tidied["required"] = list(part["properties"])
    if "anyOf" in tidied:
        # Releases of msgspec differ in where null stands.
        tidied["anyOf"] = sorted(tidied["anyOf"], key=lambda each: each == {"type": "null"})
    if "description" in tidied and isinstance(tidied["description"], str):
        tidied["description"] = " ".join(tidied["description"].split())
    return tidied


def broken(old: Schema, new: Schema) -> Iterator[str]:
    """What those who rely on the schema `old` would miss in `new`."""
    for part, before in old["$defs"].items():
        now = new["$defs"].get(part, {}).get("properties", {})
        for name, form in before.get("properties", {}).items():
            if name not in now:
                yield f"{part}.{name} is gone"
            elif _form(form) != _form(now[name]):
                yield f"{part}.{name} is of another type"


def _form(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _form(value) for key, value in part.items() if key != "description"}
    return [_form(each) for each in part] if isinstance(part, list) else part


def main() -> int:
    """Renew the files; whether that breaks nothing."""
    FOLDER.mkdir(exist_ok=True)
    code = 0
    for output in OUTPUTS:
        path, new = FOLDER / f"{output.name}.json", schema(output)
        old = json.loads(path.read_text()) if path.exists() else new
        complaints = list(broken(old, new)) if old["$id"] == new["$id"] else []
        for complaint in complaints:
            print(f"{path.name}: {complaint}: raise VERSION, or keep it", file=sys.stderr)
        if complaints:
            code = 1
        else:
            path.write_text(text(output))
    return code


if __name__ == "__main__":
    sys.exit(main())
